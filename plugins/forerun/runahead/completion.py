"""One completion: its tokens, its engines, what each is asked; asked again where one fails before it answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Sequence

from aiohttp import web

from forerun.runahead.asking import COMPLETIONS, Ask
from forerun.runahead.cost import Compute
from forerun.runahead.counts import Counts
from forerun.runahead.engine import Engine, EngineLost
from forerun.runahead.fleet import Fleet
from forerun.runahead.prefixes import block_keys, digest, token_bytes
from forerun.runahead.refining import Refiner
from forerun.runahead.relaying import Begun, begin, finish, onward
from forerun.runahead.routing import Route, Router

__all__ = ["Completion"]

_TOKENIZE = 30.0  # seconds; the request goes to one engine if it takes longer
_TEXT = 4  # bytes that are taken for a token where nothing was tokenized

_logger = logging.getLogger(__name__)


class _StageLost(Exception):
    """An engine of a chain, the last one left out, failed while the last one may still wait for it."""


class Completion:
    """A client's request for one.

    Args:
        fleet, router, counts, refiner: The front's.
        request: As it came.
        raw: Its body.
        ask: What that means.
    """

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        counts: Counts,
        refiner: Refiner | None,
        request: web.Request,
        raw: bytes,
        ask: Ask,
    ) -> None:
        self._fleet, self._router, self._counts, self._refiner = fleet, router, counts, refiner
        self._request, self._raw, self._ask = request, raw, ask
        self._headers = onward(request.headers)
        self._json = self._headers.copy()
        self._json["Content-Type"] = "application/json"
        self._tokens: Sequence[int] | None = ask.tokens
        self._keys: list[bytes] = []
        self._size = 1  # tokens of what a key stands for

    async def answer(self) -> web.StreamResponse:
        """Asks the engines and gives the client what they answer.

        Raises:
            EngineLost: No engine is up, or two have failed.
        """
        why = await self._prepare()
        lost: list[Engine] = []
        while True:
            route = self._route(why, lost)
            engines = [self._fleet.engines[number] for number in route.engines]
            reason = why or ("sooner" if len(engines) > 1 else "no gain")
            self._counts.requests.labels("chain" if len(engines) > 1 else "single", reason).inc()
            try:
                return await self._run(route, engines)
            except _StageLost as stage:
                _logger.warning("a chain is given up: %s", stage)
                why = "stage lost"
            except EngineLost as error:
                failed = error.engine
                if failed is None or lost or error.status == 504 or not {*self._fleet.up} - {failed}:
                    raise
                _logger.warning("a request is asked again: %s", error)
                self._counts.retries.inc()
                lost.append(failed)
                why = "engine lost"

    async def _prepare(self) -> str | None:
        """Finds the prompt's tokens where they matter; why one engine has to answer, or None."""
        ask, up = self._ask, self._fleet.up
        if not up:
            return "no engine"
        why = ask.alone
        if why is None and len(up) < 2:
            why = "no other engine"
        if why is None and ask.longest < self._router.least:
            why = "short"
        if why is None and self._tokens is None:
            self._tokens = await self._tokenize(min(up, key=lambda engine: (engine.prefill, engine.decoding)))
            why = "not tokenized" if self._tokens is None else None
        content, self._size = ask.content, up[0].block
        if self._tokens is not None:
            content = token_bytes(self._tokens)
        width = 8 * self._size if self._tokens is not None else _TEXT * self._size
        self._keys = block_keys(content, width, f"{ask.root} {self._tokens is None}")
        return why

    async def _tokenize(self, engine: Engine) -> list[int] | None:
        body = json.dumps(self._ask.tokenize).encode()
        try:
            async with engine.ask("POST", "/tokenize", self._json, body, timeout=_TOKENIZE) as response:
                told = json.loads(await engine.read(response)) if response.status == 200 else {}
        except (EngineLost, ValueError) as error:
            _logger.warning("a prompt is not tokenized: %s", error)
            return None
        return told.get("tokens") or None

    @property
    def _length(self) -> int:
        """Of the prompt, in tokens; a guess where it was not tokenized."""
        return max(1, len(self._tokens) if self._tokens is not None else len(self._ask.content) // _TEXT)

    def _route(self, why: str | None, lost: Sequence[Engine]) -> Route:
        up = self._fleet.take_turns(but=lost)
        if not up:
            raise EngineLost(None, "no engine is up", 503)
        standings = [engine.standing(engine.prefixes.match(self._keys) * self._size) for engine in up]
        return self._router.route(standings, self._length, alone=why is not None)

    async def _run(self, route: Route, engines: Sequence[Engine]) -> web.StreamResponse:
        began, kind = time.monotonic(), "chain" if len(engines) > 1 else "single"
        bodies, starts = self._bodies(route, engines), (route.cached, *route.ends)
        loads = [end - start for start, end in zip(starts, route.ends, strict=False)]
        stages = [
            asyncio.create_task(self._stage(engine, bodies[i], loads[i], route.ends[i], first=i == 0))
            for i, engine in enumerate(engines[:-1])
        ]
        with engines[-1].busy(loads[-1], route.ttft) as prefilled:
            answer = asyncio.create_task(
                begin(engines[-1], self._request.method, self._request.path_qs, self._headers, bodies[-1])
            )
            try:
                await _first(answer, stages)
                begun = answer.result()
                prefilled()
                if begun.streams:
                    self._counts.seen.labels(kind).observe(time.monotonic() - began)
                    self._counts.expected.labels(kind).observe(route.ttft)
                if begun.response.status == 200:
                    engines[-1].prefixes.add(self._keys)
                return await finish(begun, self._request, self._broken)
            finally:
                await _end(answer, stages)

    def _broken(self, lost: EngineLost) -> None:
        self._counts.errors.inc()
        _logger.warning("an answer breaks off: %s", lost)

    async def _stage(self, engine: Engine, body: bytes, tokens: int, end: int, *, first: bool) -> None:
        """Has an engine that is not the last compute its context.

        Raises:
            _StageLost: It does not.
        """
        idle = engine.decoding == 0 and engine.prefixes.match(self._keys) * self._size == end - tokens
        began, turn = time.monotonic(), engine.asked + 1
        try:
            with engine.busy(tokens, engine.patience):
                async with engine.ask("POST", COMPLETIONS, self._json, body) as response:
                    told = await engine.read(response)
            if response.status != 200:
                raise EngineLost(engine, f"status {response.status}: {told[:200].decode(errors='replace')}")
        except EngineLost as lost:
            self._counts.stages.inc()
            raise _StageLost(str(lost)) from lost
        if self._refiner is not None and first and idle and engine.asked == turn:
            self._refiner.note(Compute(tokens, end - tokens, time.monotonic() - began))
        engine.prefixes.add(self._keys[: end // self._size])

    def _bodies(self, route: Route, engines: Sequence[Engine]) -> list[bytes]:
        """What each engine is asked; the last one what the client asks."""
        if len(engines) == 1:
            return [self._raw]
        asked = self._ask.body
        assert self._tokens is not None and asked is not None
        chain, starts = os.urandom(16).hex(), (0, *route.ends)
        bodies = []
        for i, (start, end) in enumerate(zip(starts, route.ends, strict=False)):
            part = {"chain": chain, "start": start, "end": end, "prompt": digest(self._tokens[:end])}
            if i < len(engines) - 1:
                part["next"] = engines[i + 1].endpoint.address
                shared = {name: asked[name] for name in ("model", "cache_salt", "priority") if name in asked}
                body = {**shared, "prompt": self._tokens[:end], "max_tokens": 1, "temperature": 0}
            else:
                body = dict(asked)
            bodies.append(json.dumps({**body, "kv_transfer_params": {"runahead": part}}).encode())
        return bodies


async def _first(answer: asyncio.Task[Begun], stages: Sequence[asyncio.Task[None]]) -> None:
    """Waits until the answer begins or fails.

    Raises:
        _StageLost: A stage fails before.
    """
    while not answer.done():
        left = [stage for stage in stages if not stage.done()]
        await asyncio.wait([answer, *left], return_when=asyncio.FIRST_COMPLETED)
        for stage in stages:
            if stage.done() and not answer.done():
                stage.result()


async def _end(answer: asyncio.Task[Begun], stages: Sequence[asyncio.Task[None]]) -> None:
    """Ends every request of a route, whatever it has come to."""
    for task in (answer, *stages):
        task.cancel()
    begun, *_ = await asyncio.gather(answer, *stages, return_exceptions=True)
    if isinstance(begun, Begun):
        await begun.stack.aclose()
