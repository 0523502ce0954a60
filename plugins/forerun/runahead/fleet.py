"""The engines before which the front stands: watched, taken out, started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from forerun.runahead.counts import labels_of
from forerun.runahead.engine import LOOK, MISSES, Engine, EngineLost
from forerun.runahead.engines import Endpoint, Engines
from forerun.runahead.prefixes import Prefixes

__all__ = ["Fleet"]

_UP, _DOWN = 2.0, 0.5  # seconds between two looks at an engine that is so
_BLOCKS = 1 << 18  # of an engine's cache that are remembered, at most

_logger = logging.getLogger(__name__)


class Fleet:
    """All engines.

    Args:
        endpoints: Where they are.
        engines: Those that are this process's own children, to be started again when they die.
        patience: Seconds that an engine may be silent in the middle of a request.
    """

    def __init__(self, endpoints: Sequence[Endpoint], engines: Engines | None, patience: float) -> None:
        self.engines = [Engine(i, endpoint, patience) for i, endpoint in enumerate(endpoints)]
        self._own = engines
        self._turn = 0
        self._watchers: list[asyncio.Task[None]] = []

    @property
    def up(self) -> list[Engine]:
        """Those that answer."""
        return [engine for engine in self.engines if engine.is_up]

    def take_turns(self, but: Sequence[Engine] = ()) -> list[Engine]:
        """Those that answer, some left out, another one first each time."""
        up = [engine for engine in self.up if engine not in but]
        self._turn += 1
        turn = self._turn % max(1, len(up))
        return up[turn:] + up[:turn]

    @property
    def restarts(self) -> int:
        return self._own.restarts if self._own is not None else 0

    async def start(self, patience: float) -> None:
        """Watches them from now on; returns once all are up.

        Raises:
            ValueError: One is not up in time, or they do not fit together.
        """
        self._watchers = [asyncio.create_task(self._watch(engine)) for engine in self.engines]
        if self._own is not None:
            self._watchers.append(asyncio.create_task(self._restart(self._own)))
        end = asyncio.get_running_loop().time() + patience
        while down := [engine for engine in self.engines if not engine.is_up]:
            if asyncio.get_running_loop().time() > end:
                raise ValueError(f"no engine answers at {down[0].endpoint.url} after {patience:.0f} s")
            await asyncio.sleep(0.05)
        if len(blocks := {engine.block for engine in self.engines}) > 1:
            raise ValueError(f"engines have caches of blocks of {sorted(blocks)} tokens; expected equal ones")

    async def stop(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines))

    async def _watch(self, engine: Engine) -> None:
        while True:
            try:
                if engine.session is None or engine.session.closed:
                    await engine.open()
                await self._look(engine)
            except (EngineLost, ValueError) as error:
                engine.misses += 1
                if engine.is_up and engine.misses >= MISSES:
                    _logger.warning("an engine is taken out: %s", error)
                    await self._take_out(engine)
            await asyncio.sleep(_UP if engine.is_up and not engine.misses else _DOWN)

    async def _look(self, engine: Engine) -> None:
        async with engine.ask("GET", "/health", {}, timeout=LOOK) as response:
            if response.status != 200:
                engine.misses = MISSES  # it says so itself
                raise EngineLost(engine, f"/health says {response.status}")
        if not engine.is_up:
            async with engine.ask("GET", "/metrics", {}, timeout=LOOK) as response:
                text = (await engine.read(response)).decode()
            config = labels_of(text, "vllm:cache_config_info")
            engine.block = int(config.get("block_size", 0))
            if engine.block < 1:
                raise ValueError(f"{engine.endpoint.url}/metrics does not tell the size of the cache's blocks")
            caches = config.get("enable_prefix_caching") != "False"
            blocks = min(int(config.get("num_gpu_blocks") or _BLOCKS), _BLOCKS)
            engine.prefixes = Prefixes(blocks if caches else 0)
            _logger.info("engine %d is up: %s", engine.number, engine.endpoint.url)
            engine.is_up = True
        engine.misses = 0

    async def _take_out(self, engine: Engine) -> None:
        engine.is_up = False
        engine.prefixes.clear()
        await engine.close()

    async def _restart(self, engines: Engines) -> None:
        while True:
            try:
                again = await asyncio.to_thread(engines.check)
            except OSError as error:  # no memory, or no log, for now
                _logger.error("an engine has ended and cannot be started again: %s", error)
                again = ()
            for endpoint in again:
                engine = next(engine for engine in self.engines if engine.endpoint == endpoint)
                _logger.warning("engine %d has ended and is started again", engine.number)
                await self._take_out(engine)
            await asyncio.sleep(_DOWN)
