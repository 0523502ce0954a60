"""An engine as the front sees it: what becomes of requests to one that is taken out."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web

from forerun.runahead.engine import Engine, EngineLost
from forerun.runahead.engines import Endpoint


@asynccontextmanager
async def silent():
    """A server that begins an answer or none, and says no more; an engine that it stands for."""
    over = asyncio.Event()

    async def answer(request):
        response = web.StreamResponse()
        if request.path == "/begun":
            await response.prepare(request)
            await response.write(b"data: 1\n\n")
        await over.wait()
        return response

    app = web.Application()
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    engine = Engine(0, Endpoint(f"http://127.0.0.1:{port}", ""), 60.0)
    await engine.open()
    try:
        yield engine
    finally:
        over.set()
        await engine.close()
        await runner.cleanup()


@pytest.mark.parametrize("path", ["/begun", "/not-begun"])
@pytest.mark.parametrize("whole", [True, False], ids=["read whole", "read in parts"])
def test_requests_to_an_engine_that_is_taken_out_end_at_once(path, whole):
    async def asked(engine):
        async with engine.ask("GET", path, {}) as response:
            read = engine.read if whole else engine.read_some
            while await read(response):
                pass

    async def main():
        async with silent() as engine:
            asking = asyncio.create_task(asked(engine))
            await asyncio.sleep(0.5)
            assert not asking.done()
            await engine.close()
            with pytest.raises(EngineLost) as lost:
                await asyncio.wait_for(asking, 5)
            assert lost.value.status == 502  # another engine may be asked
            assert not engine._waits

    asyncio.run(main())


def test_an_engine_that_says_nothing_is_no_answer_in_time():
    async def main():
        async with silent() as engine:
            engine.patience = 0.3
            async with engine.ask("GET", "/begun", {}) as response:
                assert await engine.read_some(response)
                with pytest.raises(EngineLost, match="no answer in time") as lost:
                    await engine.read_some(response)
            assert lost.value.status == 504

    asyncio.run(main())
