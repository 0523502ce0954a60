"""`forerun runahead serve` from its socket to its end: engines, table, front."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from forerun.runahead.engines import Endpoint, Engines
from forerun.runahead.fleet import Fleet
from forerun.runahead.front import Front
from forerun.runahead.refining import Refiner
from forerun.runahead.routing import Router, guess_table
from forerun.runahead.table import Table

__all__ = ["bind", "check_table", "read_config", "serve"]

LEAST = 1024  # tokens of a prompt below which no chain is tried where nothing was measured
_GRACE = 5.0  # seconds that requests have to end once the server is asked to

_logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: who comes too early is refused, and need not wait.

    Raises:
        OSError: The address is taken, or none of this machine's.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def check_table(table: Table, model: str) -> None:
    """Returns if a table is for a model.

    Raises:
        ValueError: It is for another.
    """
    if table.model != model and Path(table.model).resolve() != Path(model).resolve():
        raise ValueError(f"the table is for {table.model}; expected {model}: make one by `forerun runahead tune`")


def read_config(model: str) -> Mapping[str, Any] | None:
    """A model's `config.json`, from its folder or from what was downloaded; None: it is in neither."""
    path = Path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(model, "config.json")
        except ValueError:  # it is no name of a model
            return None
        if not isinstance(found, str):
            return None
        path = Path(found)
    config = json.loads(path.read_text())
    return config if isinstance(config, dict) else None


async def serve(
    listening: socket.socket,
    endpoints: Sequence[Endpoint],
    engines: Engines | None,
    *,
    model: str,
    table: Table | None,
    refined: Path | None,
    least: int | None,
    timeout: float,
    patience: float,
    ready: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        listening: Where clients come; it need not listen yet.
        endpoints: Of all engines.
        engines: Those of them that are child processes.
        model: That they serve.
        table: Of it; what requests take refines it.
        refined: Where the refined table is kept; None: nowhere.
        least: Tokens of a prompt below which no chain is tried.
        timeout: Seconds that an engine may be silent in the middle of a request.
        patience: Seconds in which all engines have to be up.
        ready: Is told, in words, that and how it serves.

    Raises:
        ValueError: The engines are not up in time, or do not fit together.
    """
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    fleet = Fleet(endpoints, engines, timeout)
    runner: web.AppRunner | None = None
    try:
        if not await _unless(over, fleet.start(patience)):
            return
        router, told = await asyncio.to_thread(_router, table, len(endpoints), fleet.engines[0].block, least, model)
        threading.Thread(target=router.complete, daemon=True).start()  # which takes long for many engines
        app = Front(fleet, router, Refiner(router, table, refined) if table is not None else None).app()
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE)
        await runner.setup()
        await web.SockSite(runner, listening, backlog=1024).start()
        host, port = listening.getsockname()[:2]
        ready(f"serving {model} by {len(endpoints)} engines at http://{host}:{port}/v1: {told}")
        await over.wait()
    finally:
        if runner is not None:
            await runner.cleanup()
        await fleet.stop()


async def _unless(over: asyncio.Event, starting: Any) -> bool:
    """Waits for one of two; whether it was not the end."""
    end, start = asyncio.ensure_future(over.wait()), asyncio.ensure_future(starting)
    await asyncio.wait([end, start], return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    if not start.done():
        start.cancel()
        return False
    start.result()
    return True


def _router(table: Table | None, engines: int, block: int, least: int | None, model: str) -> tuple[Router, str]:
    if table is not None:
        router = Router(table, engines, block, least)
        return router, f"prompts of {router.least} tokens or more may go to chains, as the table says"
    config = read_config(model)
    guessed = guess_table(config, engines, block, model)
    router = Router(guessed, engines, block, LEAST if least is None else least)
    told = f"prompts of {router.least} tokens or more go to chains; {guessed.hardware} (`runahead tune` measures)"
    return router, told
