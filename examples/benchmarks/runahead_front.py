"""What a client waits for behind the front: `forerun runahead serve` over two engines, and over one, in turns.

Three fronts stand before the same two engines: one over both, which spreads short prompts by turns, and one over each,
which are asked by turns too. So the machine does the same beside every request, and the rest is the front's choice.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any
from uuid import uuid4

from runahead_servers import LOOPBACK, Server
from runahead_ttft import Prompts, Settings, Turns, sized

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.engine_client import EngineClient
from forerun.runahead.engines import Engines
from forerun.runahead.table import Row, Table

__all__ = ["measure_front"]

_SHORT = (32, 64, 128, 256, 512)
_LEAST = 1024  # tokens; shorter prompts are asked more often:
_ASKED, _TURNS = 6, 7  # so many in a turn, of which the median counts
_START = 120.0  # seconds


def measure_front(settings: Settings, measured: dict[str, Any]) -> dict[str, Any]:
    """The part `front`: short prompts, which no chain takes, and longer ones, routed by the `measured` table."""
    table = settings.folder / "table.json"
    _as_table(measured, str(settings.model)).save(table)
    prompts, longest = Prompts(settings.model), max(settings.lengths)
    rows: list[dict[str, Any]] = []
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of keys and values, of each engine
    with ExitStack() as ends:
        arguments = ["--served-model-name", "model", "--dtype", "float32", *sized(longest, longest)]
        engines = ends.enter_context(
            Engines(str(settings.model), 2, logs=settings.folder, arguments=arguments, cores="0|1")
        )
        joined = [f"{end.url}={end.address}" for end in engines.endpoints]
        both = ends.enter_context(_front(settings, table, joined))
        single = [ends.enter_context(_front(settings, table, [one])) for one in joined]
        for engine in (both, *single):
            for tokens in (64, 256, min(2048, longest)):
                engine.prefill(prompts(tokens))

        def asked(fronts: Sequence[EngineClient], tokens: int) -> tuple[Sequence[Server], Callable[[], float]]:
            times, by_turns = _ASKED if tokens < _LEAST else 1, cycle(fronts)
            return (), lambda: statistics.median(next(by_turns).prefill(prompts(tokens)) for _ in range(times))

        for tokens in (*_SHORT, *settings.lengths):
            short = Turns(_TURNS if tokens < _LEAST else settings.repeats)
            short.take(tokens, {"one engine": asked(single, tokens), "two engines": asked([both], tokens)})
            rows += short.rows
        told = re.findall(r'^forerun:front_requests_total\{route="chain".*? (\S+)$', both.ask("/metrics").text, re.M)
    return {"rows": rows, "chains": sum(map(float, told))}


@contextmanager
def _front(settings: Settings, table: Path, joined: Sequence[str]) -> Iterator[EngineClient]:
    """A front before engines that run; its API."""
    log = settings.folder / f"front-{uuid4().hex}.log"
    command = [sys.executable, "-m", "forerun", "runahead", "serve", str(settings.model), "--port", "0"]
    command += ["--table", str(table), "--engines", "0", *(word for one in joined for word in ("--join", one))]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        end = time.monotonic() + _START
        while not (found := re.search(r"at (http://\S+?)/v1:", log.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the front does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield EngineClient.connect(found[1], (LOOPBACK, 0))
    finally:
        process.terminate()
        process.wait(60)


def _as_table(told: dict[str, Any], model: str) -> Table:
    """A table as the part `ttft` keeps it."""
    chain = told["chain"]
    link = Link(chain["link"]["bandwidth"] or float("inf"), chain["link"]["latency"])
    rows = tuple(Row(row["tokens"], tuple(row["contexts"])) for row in told["rows"])
    made = Chain(Cost(**chain["cost"]), link, chain["layers"], chain["kv_bytes"], chain["before"], chain["early"])
    return Table(model, "benchmark", 2, made, rows, told["block"], told["slack"])
