"""`forerun runahead ...`: engines served as one, measured, splits explained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from forerun.runahead import serve_command
from forerun.runahead.tune_command import tune

if TYPE_CHECKING:
    from forerun.runahead.chain import Chain
    from forerun.runahead.partition import Split

__all__ = ["app"]

app = typer.Typer(name="runahead", help="A long prompt's first token from several engines.", no_args_is_help=True)
app.command(context_settings=serve_command.SETTINGS)(serve_command.serve)


@app.callback()
def _room() -> None:
    """A long prompt's first token from several engines."""


@app.command()
def plan(
    tokens: Annotated[int, typer.Option(help="Of the prompt, the cached ones left out.")],
    engines: Annotated[int | None, typer.Option(help="The most that may take part; 2, or the table's.")] = None,
    table: Annotated[Path | None, typer.Option(help="Of splits, as Table.save writes it.")] = None,
    config: Annotated[Path | None, typer.Option(help="A model's config.json, in place of a table.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Of one engine, as it reaches them; with --config.")] = None,
    gbytes: Annotated[float, typer.Option(help="Of the link, a second; with --config. Default: no limit.")] = math.inf,
    latency: Annotated[float, typer.Option(help="Of the link, in seconds; with --config.")] = 0.0,
    block: Annotated[int | None, typer.Option(help="Contexts begin at multiples of it; 1, or the table's.")] = None,
    cached: Annotated[int, typer.Option(help="Tokens before the prompt that every engine holds.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw the timeline into this file too.")] = None,
) -> None:
    """Explain how a prompt would be split: what each engine gets, waits for and sends, and the timeline."""
    try:
        if (table is None) == (config is None):
            raise ValueError("give --table, or --config with --tflops")
        if table is not None:
            chain, split = _from_table(table, tokens, engines, block, cached)
        else:
            from forerun.runahead.partition import search

            chain = _from_config(config, tflops, gbytes, latency)
            split = search(chain, tokens, 2 if engines is None else engines, block=block or 1, cached=cached)
        from forerun.runahead.picture import draw, explain

        if picture is not None:
            draw(chain, split, picture, cached=cached)
    except (ImportError, OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, ModuleNotFoundError):
            reason += ": pip install 'forerun[vllm]'"
        typer.echo(f"forerun runahead plan: {reason}", err=True)
        raise typer.Exit(1) from error
    Console().print(explain(chain, split, cached=cached))
    if picture is not None:
        typer.echo(f"picture: {picture}")


def _from_table(path: Path, tokens: int, engines: int | None, block: int | None, cached: int) -> tuple[Chain, Split]:
    from forerun.runahead.partition import search
    from forerun.runahead.table import Table

    table = Table.load(path)
    if engines is None and block is None:
        return table.chain, table.split(tokens, cached)
    split = search(table.chain, tokens, engines or table.engines, block=block or table.block, cached=cached)
    return table.chain, split


def _from_config(path: Path | None, tflops: float | None, gbytes: float, latency: float) -> Chain:
    from forerun.runahead.chain import Chain
    from forerun.runahead.cost import Link
    from forerun.runahead.shape import Shape

    if path is None or tflops is None:
        raise ValueError("--config needs --tflops, the arithmetic that one engine reaches")
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; expected a model's config.json")
    shape = Shape.from_config(config)
    return Chain(shape.cost(tflops * 1e12), Link(gbytes * 1e9, latency), shape.layers, shape.kv_bytes, shape.before)


app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(tune)
