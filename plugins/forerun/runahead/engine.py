"""One engine as the front sees it: whether it is up, what it has to do, what its cache holds, how it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import aiohttp

from forerun.runahead.engines import Endpoint
from forerun.runahead.prefixes import Prefixes
from forerun.runahead.routing import Standing

__all__ = ["LOOK", "MISSES", "Engine", "EngineLost"]

LOOK = 10.0  # seconds in which an engine has to say that it is well
MISSES = 2  # times in a row that it fails to before it is taken out


class EngineLost(Exception):
    """An engine did not answer a request.

    Args:
        engine: Which; None: none is up.
        reason: What happened.
        status: For the client, if no other engine answers either.
        body: Of the engine's own error.
    """

    def __init__(self, engine: Engine | None, reason: str, status: int = 502, body: bytes = b"") -> None:
        super().__init__(reason if engine is None else f"engine {engine.number}: {reason}")
        self.engine, self.status, self.body = engine, status, body


@dataclass(eq=False)
class Engine:
    """One engine."""

    number: int
    endpoint: Endpoint
    patience: float  # seconds that it may be silent in the middle of a request
    prefixes: Prefixes = field(default_factory=lambda: Prefixes(1))
    is_up: bool = False
    prefill: int = 0  # tokens asked for and not computed yet
    decoding: int = 0
    asked: int = 0  # prefills, since the beginning
    block: int = 0
    misses: int = 0
    session: aiohttp.ClientSession | None = None
    _waits: set[asyncio.Timeout] = field(default_factory=set)  # of requests for what the engine sends

    def standing(self, cached: int) -> Standing:
        return Standing(self.number, self.prefill, self.decoding, cached)

    @contextmanager
    def busy(self, tokens: int, seconds: float) -> Iterator[Callable[[], None]]:
        """A request with so many tokens to prefill; they are once what is given is called, or after the seconds."""
        left = tokens

        def done() -> None:
            nonlocal left
            self.prefill, left = self.prefill - left, 0

        self.prefill += tokens
        self.decoding += 1
        self.asked += 1
        timer = asyncio.get_running_loop().call_later(seconds, done)
        try:
            yield done
        finally:
            timer.cancel()
            done()
            self.decoding -= 1

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        data: bytes | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The engine's response, its body not read yet; the request ends with the block, whatever ends that.

        Raises:
            EngineLost: It does not answer.
        """
        if self.session is None or self.session.closed:
            raise EngineLost(self, "it is down", 503)
        waits = aiohttp.ClientTimeout(total=timeout, sock_connect=LOOK, sock_read=self.patience)
        async with self._watched():
            response = await self.session.request(
                method, self.endpoint.url + path, headers=headers, data=data, timeout=waits, allow_redirects=False
            )
        try:
            yield response
        finally:
            response.close()

    async def read(self, response: aiohttp.ClientResponse) -> bytes:
        """All that is left of a body.

        Raises:
            EngineLost: It breaks off.
        """
        async with self._watched():
            return await response.content.read()

    async def read_some(self, response: aiohttp.ClientResponse) -> bytes:
        """What has come of a body, at least a byte unless it has ended.

        Raises:
            EngineLost: It breaks off.
        """
        async with self._watched():
            return await response.content.readany()

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """Turns the errors of a connection, and its end by `close`, into `EngineLost`."""
        wait = asyncio.timeout(None)
        try:
            async with wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError as error:
            if wait.expired():
                raise EngineLost(self, "it was taken out") from error
            raise EngineLost(self, "no answer in time", 504) from error
        except aiohttp.ClientConnectorError as error:
            self.is_up = False  # nothing listens; the next look may find it back
            raise EngineLost(self, str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            self.misses = MISSES  # one more, and it is out until it says that it is well
            raise EngineLost(self, f"{type(error).__name__}: {error}") from error

    async def open(self) -> None:
        # A connection of its own for each request: engines close idle ones when it suits them.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self.session = aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False)

    async def close(self) -> None:
        """Ends all of its requests with an error."""
        # A session that is closed leaves whoever reads a body waiting: aiohttp forgets the body and its time-out.
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())
        if self.session is not None:
            await self.session.close()
