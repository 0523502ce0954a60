"""One OpenAI-compatible server before several engines: long prompts go to chains of them, all else to one each.

A completion that a chain could shorten is tokenized by an engine, and `Router` says whether it would. Then all engines
of the chain are asked at once: the last one by the client's own request, the others for the prompt up to the end of
their contexts. Whatever else comes goes to one engine as it is.
"""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from forerun.runahead.asking import CHAT, COMPLETIONS, read_ask
from forerun.runahead.completion import Completion
from forerun.runahead.counts import Counts, merge
from forerun.runahead.engine import Engine, EngineLost
from forerun.runahead.fleet import Fleet
from forerun.runahead.refining import Refiner
from forerun.runahead.relaying import begin, error_response, finish, onward
from forerun.runahead.routing import Router

__all__ = ["Front"]

_BODY = 1 << 28  # bytes of a request, at most
_READ = 300.0  # seconds in which it has to come

_logger = logging.getLogger(__name__)


class Front:
    """The server's handlers.

    Args:
        fleet: The engines.
        router: Chooses among them.
        refiner: Of the router's table; None: it stays as it is.
    """

    def __init__(self, fleet: Fleet, router: Router, refiner: Refiner | None = None) -> None:
        self._fleet, self._router, self._refiner, self._counts = fleet, router, refiner, Counts()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_BODY)
        app.router.add_post(COMPLETIONS, self._complete)
        app.router.add_post(CHAT, self._complete)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._fleet.up else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        async def ask(engine: Engine) -> str:
            try:
                async with engine.ask("GET", "/metrics", {}, timeout=10) as response:
                    return (await engine.read(response)).decode(errors="replace")
            except EngineLost:
                return ""

        engines = self._fleet.up
        texts = await asyncio.gather(*map(ask, engines))
        self._counts.up.set(len(engines))
        self._counts.restarts.set(self._fleet.restarts)
        self._counts.refined.set(self._refiner.refined if self._refiner is not None else 0)
        whole = merge({str(engine.number): text for engine, text in zip(engines, texts, strict=True)})
        return web.Response(text=self._counts.text() + whole, content_type="text/plain", charset="utf-8")

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """Any other request goes to the engine that has the least to do."""
        engines = sorted(self._fleet.take_turns(), key=lambda engine: (engine.prefill, engine.decoding))
        if not engines:
            return error_response("no engine is up", 503)
        try:
            data = await _body(request) if request.can_read_body else None
            begun = await begin(engines[0], request.method, request.path_qs, onward(request.headers), data)
        except EngineLost as lost:
            return self._failed(lost)
        return await finish(begun, request, self._note)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            raw = await _body(request)
            ask = read_ask(request.path, raw)
            front = (self._fleet, self._router, self._counts, self._refiner)
            return await Completion(*front, request, raw, ask).answer()
        except EngineLost as lost:
            return self._failed(lost)
        except (asyncio.CancelledError, ConnectionResetError):
            self._counts.gone.inc()
            raise

    def _note(self, lost: EngineLost) -> None:
        self._counts.errors.inc()
        _logger.warning("a request fails: %s", lost)

    def _failed(self, lost: EngineLost) -> web.Response:
        self._note(lost)
        if lost.body.startswith(b"{"):
            return web.Response(status=lost.status, body=lost.body, content_type="application/json")
        return error_response(str(lost), lost.status)


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_READ):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the request's body did not come in {_READ:.0f} s") from None
