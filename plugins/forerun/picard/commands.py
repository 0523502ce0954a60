"""`forerun picard ...`: what a user does with the reports of parallel runs."""

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
