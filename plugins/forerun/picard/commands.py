"""`forerun picard ...`: reports of parallel runs drawn, Picard Consistency Models trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forerun.picard.report import Report
from forerun.picard.report import plot as draw

__all__ = ["app"]

app = typer.Typer(name="picard", help="Parallel-in-time diffusion sampling.", no_args_is_help=True)


@app.callback()
def _room() -> None:
    """Parallel-in-time diffusion sampling."""


@app.command()
def plot(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT.json...", help="Written by scheduler.report.save.")],
    out: Annotated[Path, typer.Option(help="The picture; its ending chooses the format.")] = Path("picard.png"),
) -> None:
    """Draw how runs converged: the largest change of a point, round by round."""
    try:
        draw([Report.load(report) for report in reports], out)
    except (ImportError, OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        typer.echo(f"forerun picard plot: {reason}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"picture: {out}")


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Everything in a file.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Folder or repository of a diffusers pipeline.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of the result; an interrupted training goes on there.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Folder that keeps sampled trajectories.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, a prompt per line.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps that it is for.")] = None,
    turns: Annotated[int | None, typer.Option(help="Length of the training.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA.")] = None,
    full: Annotated[bool | None, typer.Option("--full", help="All parameters, in place of a LoRA.")] = None,
) -> None:
    """Train a Picard Consistency Model for a pipeline: fewer rounds, the same result."""
    try:
        from forerun.picard.diffusers_train import run
        from forerun.picard.train_settings import TrainSettings

        choices = {"steps": steps, "turns": turns, "rank": rank, "full": full}
        training = {name: value for name, value in choices.items() if value is not None}
        call = {} if prompts is None else {"prompt": prompts.read_text().splitlines()}
        given = {"pipeline": pipeline, "out": out, "cache": cache, "device": device, "training": training, "call": call}
        typer.echo(run(TrainSettings.read(config, given)))
    except (ImportError, OSError, TypeError, ValueError) as error:
        typer.echo(f"forerun picard train: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(1) from error
