"""An engine's response on its way to the client: held back until its first bytes have come, then event by event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from forerun.runahead.engine import Engine, EngineLost

__all__ = ["Begun", "begin", "error_body", "error_response", "finish", "onward"]

# Of one connection, not of what it carries; `date` and `server` are the front's own.
_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
_DROPPED = {*_HOP, "upgrade", "host", "content-length", "expect", "date", "server"}
_EVENTS = "text/event-stream"
_END = b"\n\n"  # of an event
_LARGEST = 1 << 20  # bytes without an event's end that are held back


@dataclass
class Begun:
    """A response whose first bytes are here.

    Args:
        engine: That gives it.
        response: Its head.
        first: What has come of its body; all of it unless it streams.
        streams: Whether it is a stream of events.
        stack: Ends the request to the engine when it is closed.
    """

    engine: Engine
    response: aiohttp.ClientResponse
    first: bytes
    streams: bool
    stack: AsyncExitStack


def onward(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Headers that go to the other side too."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _DROPPED)


def error_body(message: str, status: int) -> dict[str, object]:
    """An error as OpenAI's API and vLLM give it."""
    kind = HTTPStatus(status).phrase.replace(" ", "")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(message: str, status: int) -> web.Response:
    return web.json_response(error_body(message, status), status=status)


async def begin(engine: Engine, method: str, path: str, headers: Mapping[str, str], data: bytes | None) -> Begun:
    """Asks an engine; returns with the first bytes of its answer, or with all of it where it does not stream.

    Raises:
        EngineLost: It does not answer, or answers that it has failed.
    """
    async with AsyncExitStack() as stack:
        response = await stack.enter_async_context(engine.ask(method, path, headers, data))
        streams = response.content_type == _EVENTS and response.status == 200
        first = await (engine.read_some(response) if streams else engine.read(response))
        if response.status >= 500 and response.status != HTTPStatus.NOT_IMPLEMENTED:
            raise EngineLost(engine, f"status {response.status}", response.status, first)
        if streams and (failure := _failure(first)):
            raise EngineLost(engine, failure)
        held = stack.pop_all()
    return Begun(engine, response, first, streams, held)


async def finish(begun: Begun, request: web.Request, broken: Callable[[EngineLost], None]) -> web.StreamResponse:
    """Gives the client a response that has begun; where the engine is lost in the middle of it, an event says so.

    Args:
        begun: The response.
        request: The client's.
        broken: Is told of an engine that was lost.
    """
    headers = onward(begun.response.headers)
    if not begun.streams:
        await begun.stack.aclose()
        return web.Response(status=begun.response.status, headers=headers, body=begun.first)
    answer = web.StreamResponse(status=begun.response.status, headers=headers)
    try:
        async with begun.stack:
            await answer.prepare(request)
            await _pour(begun, answer)
    except EngineLost as lost:
        broken(lost)
        event = json.dumps(error_body(f"the answer ends here: {lost}", lost.status))
        await answer.write(f"data: {event}".encode() + _END)
    await answer.write_eof()
    return answer


async def _pour(begun: Begun, answer: web.StreamResponse) -> None:
    """Whole events as they come: half of one is nothing that an error could follow."""
    held = begun.first
    while True:
        cut = held.rfind(_END) + len(_END)
        if cut < len(_END) and len(held) > _LARGEST:
            cut = len(held)
        if cut >= len(_END):
            await _write(begun, answer, held[:cut])
            held = held[cut:]
        chunk = await begun.engine.read_some(begun.response)
        if not chunk:
            break
        held += chunk
    if held:
        await _write(begun, answer, held)


async def _write(begun: Begun, answer: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(begun.engine.patience):
            await answer.write(data)
    except TimeoutError:
        raise ConnectionResetError("the client has stopped to read") from None


def _failure(first: bytes) -> str | None:
    """What an engine that failed before its first token says in place of it."""
    text = first.removeprefix(b"data: ")
    if not text.startswith(b'{"error"'):
        return None
    try:
        error = json.loads(text.split(_END)[0])["error"]
        return str(error["message"]) if int(error["code"]) >= 500 else None
    except (KeyError, TypeError, ValueError):
        return None
