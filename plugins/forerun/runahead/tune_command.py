"""`forerun runahead tune`: measures engines and writes the table that chains are split by."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from forerun.runahead.engine_client import EngineClient

__all__ = ["tune"]

_LENGTHS = "512,1024,2048,4096,8192"


def tune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or repository, as vLLM names it.")],
    out: Annotated[Path, typer.Option(help="File of the table.")],
    engines: Annotated[int, typer.Option(help="To start and measure.")] = 2,
    join: Annotated[
        list[str] | None,
        typer.Option(help="An engine that runs already: URL=HOST:PORT of its connector."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts to measure.")] = _LENGTHS,
    repeats: Annotated[int, typer.Option(help="Of every measurement.")] = 3,
    cores: Annotated[str | None, typer.Option(help="Of each engine, such as '0-3|4-7'.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Of each engine, such as '0,1|2,3'.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Its name in the table; this machine's if left out.")] = None,
) -> None:
    """Measure engines, which do nothing else meanwhile, and write the table that chains are split by.

    Further arguments go to vLLM: forerun runahead tune MODEL --out table.json --engines 2 -- --max-model-len 16384
    """
    from forerun.runahead.picture import explain

    try:
        from forerun.runahead import tuning
        from forerun_adapters.transformers import config_of

        config = tuning.with_dtype(config_of(model), context.args)
        measured = sorted({int(length) for length in lengths.split(",")})
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
        with ExitStack() as ends:
            asked = _joined(join) if join else _started(ends, model, engines, context.args, cores, gpus)
            table, found = tuning.tune(
                model, config, asked, measured, where=hardware, repeats=repeats, told=lambda line: typer.echo(line)
            )
        table.save(out)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        typer.echo(f"forerun runahead tune: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{out}: the model is off by {found.error:.1%} at most; engines slow each other by {found.crowding - 1:.1%}"
    )
    Console().print(explain(table.chain, table.split(measured[-1])))


def _joined(given: list[str]) -> list[EngineClient]:
    from forerun.runahead.engine_client import EngineClient
    from forerun.runahead.transport import parse_address

    found = []
    for one in given:
        url, equals, address = one.rpartition("=")
        if not equals:
            raise ValueError(f"{one!r} names no engine; expected URL=HOST:PORT, the port its connector listens on")
        found.append(EngineClient.connect(url, parse_address(address)))
    return found


def _started(
    ends: ExitStack, model: str, count: int, arguments: list[str], cores: str | None, gpus: str | None
) -> list[EngineClient]:
    from forerun.runahead.engine_client import EngineClient
    from forerun.runahead.engines import Engines
    from forerun.runahead.transport import parse_address

    logs = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="forerun-")))
    typer.echo(f"starting {count} engines; their logs: {logs}")
    started = ends.enter_context(Engines(model, count, logs=logs, arguments=arguments, cores=cores, gpus=gpus))
    return [EngineClient.connect(end.url, parse_address(end.address)) for end in started.endpoints]
