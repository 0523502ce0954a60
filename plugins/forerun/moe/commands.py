"""`forerun moe ...`: a model's routing profiled, its experts planned onto ranks, a plan shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(name="moe", help="Expert placement for mixture-of-experts models.", no_args_is_help=True)


@app.callback()
def _room() -> None:
    """Expert placement for mixture-of-experts models."""


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="Folder or repository of a transformers MoE model.")],
    texts: Annotated[
        list[Path] | None, typer.Argument(metavar="TEXT...", help="Text files like those it will serve.")
    ] = None,
    sglang: Annotated[
        list[Path] | None, typer.Option(help="In place of texts: a dump of SGLang's recorder, mode per_token, rank 0.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The profile.")] = Path("profile.safetensors"),
    tokens: Annotated[int | None, typer.Option(help="After about so many the rest is left.")] = None,
    length: Annotated[int, typer.Option(help="Tokens that run as one sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences that run together.")] = 8,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Such as float32 or bfloat16; auto: as saved.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sample of paths; differs between profiles to be merged.")] = 0,
) -> None:
    """Run a model over text files and count which experts its tokens are sent to."""
    with _one_line_errors("profile"):
        from rich.progress import Progress

        if bool(texts) == bool(sglang):
            raise ValueError("expected text files, or dumps of SGLang's recorder (--sglang), one of both")
        for text in (*(texts or ()), *(sglang or ())):
            text.open().close()
        with Progress(transient=True) as bar:
            task = bar.add_task("tokens", total=None)
            if sglang:
                from forerun.moe.sglang_profile import profile_dumps

                found = profile_dumps(sglang, model, seed=seed, progress=lambda count: bar.advance(task, count))
            else:
                from forerun.moe.transformers import profile_path

                found = profile_path(
                    model,
                    (text.read_text(errors="replace") for text in texts or ()),
                    length=length,
                    batch=batch,
                    tokens=tokens,
                    device=device,
                    dtype=dtype,
                    seed=seed,
                    progress=lambda count: bar.advance(task, count),
                )
        found.save(out)
        pairs = int(found.counts.sum())
        counted = pairs // (found.identity.top_k * len(found.identity.layers))
        typer.echo(f"{found.identity}: {counted} tokens\nprofile: {out}")


@app.command()
def plan(
    profiles: Annotated[list[Path], typer.Argument(metavar="PROFILE...", help="Of one model; they are merged.")],
    ranks: Annotated[int, typer.Option(help="Ranks that share the experts.")],
    hosts: Annotated[int, typer.Option(help="Of equally many ranks each, next to each other.")] = 1,
    near: Annotated[float, typer.Option(help="What a transfer inside a host saves: 1 - its cost / between hosts.")] = 0,
    experts: Annotated[float, typer.Option(help="Most load of a rank's experts, over the mean.")] = 1.25,
    tokens: Annotated[float, typer.Option(help="Most tokens at home on a rank, over the mean.")] = 1.1,
    effort: Annotated[int | None, typer.Option(help="Descents a layer; by default about ten seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Folder of the model: tokens never seen answer as their embedding's neighbour.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The plan.")] = Path("plan.safetensors"),
) -> None:
    """Group a model's experts onto ranks by the tokens that use them, and predict each token's ranks."""
    with _one_line_errors("plan"):
        from rich.console import Console
        from rich.progress import Progress

        from forerun.moe.planning import make_plan
        from forerun.moe.profile import Profile, merge
        from forerun.moe.report import as_table
        from forerun.moe.task import Limits

        whole = merge(*(Profile.load(path) for path in profiles))
        embeddings = None
        if model is not None:
            from forerun.moe.transformers import embeddings_of

            embeddings = embeddings_of(model)
        with Progress(transient=True) as bar:
            task = bar.add_task("layers", total=len(whole.identity.layers))
            found = make_plan(
                whole,
                ranks,
                hosts=hosts,
                near=near,
                limits=Limits(experts, tokens),
                effort=effort,
                seed=seed,
                embeddings=embeddings,
                progress=lambda layer: bar.advance(task),
            )
        found.save(out)
        Console().print(as_table(found))
        for report in found.layers:
            if report.experts > experts * (1 + 1e-6) or report.tokens > tokens * (1 + 1e-6):
                typer.echo(
                    f"layer {report.layer}: no placement was found within the limits; "
                    f"loads are {report.experts:.2f} (experts) and {report.tokens:.2f} (tokens)",
                    err=True,
                )
        typer.echo(f"plan: {out}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="Written by forerun moe plan.")],
    picture: Annotated[Path | None, typer.Option(help="A picture too; its ending chooses the format.")] = None,
    sglang: Annotated[
        Path | None, typer.Option(help="Its placement too, as a file of SGLang's --init-expert-location (JSON).")
    ] = None,
    row_bytes: Annotated[
        int | None,
        typer.Option(help="Bytes of a token's hidden state, such as 4096 x 2: then bytes a token sends, too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a plan: local activation rate, ranks a token reaches, rows sent, loads, prediction, layer by layer."""
    with _one_line_errors("show"):
        import json
        from dataclasses import asdict

        from rich.console import Console

        from forerun.moe.plan import Plan
        from forerun.moe.report import as_table, draw, moved_bytes

        found = Plan.load(path)
        if as_json:
            layers = [asdict(report) for report in found.layers]
            if row_bytes is not None:
                for layer, report in zip(layers, found.layers, strict=True):
                    layer["bytes"], layer["contiguous_bytes"] = moved_bytes(report, row_bytes)
            told = {"identity": found.identity.as_json(), "ranks": found.ranks}
            typer.echo(json.dumps({**told, "layers": layers}, indent=2))
        else:
            Console().print(as_table(found, row_bytes))
        if picture is not None:
            draw(found, picture)
            typer.echo(f"picture: {picture}", err=as_json)
        if sglang is not None:
            from forerun.moe.sglang_location import location

            sglang.write_text(json.dumps(location(found)) + "\n")
            typer.echo(f"placement: {sglang}", err=as_json)


@contextlib.contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        typer.echo(f"forerun moe {command}: {str(reason).splitlines()[0]}", err=True)
        raise typer.Exit(1) from error
