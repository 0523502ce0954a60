"""`forerun runahead serve`: several vLLM engines as one server."""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from forerun.runahead.engines import Endpoint

__all__ = ["SETTINGS", "serve"]

SETTINGS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="As vLLM names it.")],
    engines: Annotated[int, typer.Option(help="To start on this machine; 0 with --join: none.")] = 2,
    join: Annotated[
        list[str] | None,
        typer.Option(metavar="URL=HOST:PORT", help="An engine that runs; its connector."),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Measured splits, by `forerun runahead tune`.")] = None,
    refined: Annotated[
        Path | None, typer.Option(help="Keep the table here as requests refine it (the same file: in its place).")
    ] = None,
    least: Annotated[int | None, typer.Option(help="Tokens of a prompt below which no chain is tried.")] = None,
    host: Annotated[str, typer.Option(help="That clients come to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="That clients come to.")] = 8000,
    cores: Annotated[str | None, typer.Option(help="Of each engine, as 0-3|4-7; by default all are dealt out.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Of each engine, as 0|1; by default all are dealt out.")] = None,
    listen: Annotated[str, typer.Option(help="Host that engines started here take keys and values on.")] = "127.0.0.1",
    chain_timeout: Annotated[float, typer.Option(help="Seconds that an engine waits for the one before.")] = 30.0,
    timeout: Annotated[float, typer.Option(help="Seconds that an engine may be silent within a request.")] = 1800.0,
    start_timeout: Annotated[float, typer.Option(help="Seconds in which the engines have to be up.")] = 1800.0,
    logs: Annotated[Path | None, typer.Option(help="Folder of the engines' logs; a temporary one.")] = None,
) -> None:
    """Start vLLM engines and serve them as one, long prompts by chains of them; other options go to vLLM.

    With --join, engines take part that run elsewhere, each with RunaheadConnector and the same FORERUN_RUNAHEAD_SECRET.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s forerun: %(message)s")
    try:
        import asyncio

        from forerun.runahead.engines import EngineError, Engines
        from forerun.runahead.serving import bind, check_table
        from forerun.runahead.serving import serve as run
        from forerun.runahead.table import Table
    except ModuleNotFoundError as error:
        _fail(f"{error}: pip install 'forerun[vllm]'", error)
    try:
        if model.startswith("-"):
            raise ValueError(f"the model comes before {model}, as in: forerun runahead serve MODEL {model} …")
        if model.startswith(("/", "./", "../")) and not Path(model).is_dir():
            raise ValueError(f"there is no folder {model}; expected a model's, or its name on Hugging Face")
        joined = [_endpoint(text) for text in join or []]
        if engines < 0 or engines + len(joined) < 1:
            raise ValueError(f"--engines is {engines}; expected 1 or more, or 0 with --join")
        if engines == 0 and context.args:
            raise ValueError(f"{context.args} are for engines started here, and --engines is 0")
        if refined is not None and table is None:
            raise ValueError("--refined keeps a refined --table: give one, by `forerun runahead tune`")
        measured = Table.load(table) if table is not None else None
        if measured is not None:
            check_table(measured, model)
        with ExitStack() as stack:
            listening = stack.enter_context(bind(host, port))
            own = None
            if engines:
                folder = logs or Path(tempfile.mkdtemp(prefix="forerun-"))
                options = {"timeout": chain_timeout}
                own = Engines(
                    model,
                    engines,
                    logs=folder,
                    arguments=context.args,
                    cores=cores,
                    gpus=gpus,
                    listen=listen,
                    options=options,
                    patience=start_timeout,
                )
                typer.echo(f"starting {engines} engines; their logs: {folder}", err=True)
                stack.enter_context(own)
            endpoints = (*(own.endpoints if own is not None else ()), *joined)
            asyncio.run(
                run(
                    listening,
                    endpoints,
                    own,
                    model=model,
                    table=measured,
                    refined=refined,
                    least=least,
                    timeout=timeout,
                    patience=start_timeout,
                    ready=lambda told: typer.echo(told, err=True),
                )
            )
    except OSError as error:
        where = error.filename or f"{host}:{port}"
        _fail(f"{where}: {error.strerror or error}", error)
    except (EngineError, ValueError) as error:
        _fail(str(error), error)


def _endpoint(text: str) -> Endpoint:
    from forerun.runahead.engines import Endpoint
    from forerun.runahead.transport import parse_address

    url, equals, address = text.rpartition("=")
    if not equals or not url.startswith(("http://", "https://")):
        raise ValueError(f"--join {text!r}: expected URL=HOST:PORT, as in http://10.0.0.2:8000=10.0.0.2:7001")
    parse_address(address)
    return Endpoint(url.rstrip("/"), address)


def _fail(reason: str, error: Exception) -> NoReturn:
    typer.echo(f"forerun runahead serve: {reason}", err=True)
    raise typer.Exit(1) from error
