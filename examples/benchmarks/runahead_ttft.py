"""The measured part of the benchmark: servers on the same cores in turns, those not asked paused."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runahead_servers import Server
from transformers import AutoTokenizer

from forerun.runahead.calibrate import time_chain
from forerun.runahead.engine_client import EngineClient
from forerun.runahead.partition import search
from forerun.runahead.table import Table, make_table
from forerun.runahead.tuning import tune

sys.path.insert(0, str(Path(__file__).parents[1]))
from runahead_model import text

__all__ = ["Prompts", "Settings", "Turns", "measure", "measure_link", "measure_others", "sized"]

_CHUNK = 1024  # tokens of pipeline parallelism's chunked prefill
_PICKED = (0.5, 0.55, 0.6, 0.65, 0.7)  # the first engine's share, as one might pick it by hand
_DECODED = 32


@dataclass(frozen=True)
class Settings:
    """What is measured where.

    Args:
        model: Folder of the model.
        folder: For logs.
        lengths: Tokens of the prompts.
        repeats: Of each measurement up to 8192 tokens; longer ones once.
    """

    model: Path
    folder: Path
    lengths: Sequence[int]
    repeats: int


class Prompts:
    """Prompts of real text, no two of which begin alike."""

    def __init__(self, model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._tokens: list[int] = tokenizer(text(4_000_000))["input_ids"]
        self._next = 0

    def __call__(self, length: int) -> list[int]:
        start = self._next = (self._next + 3001) % (len(self._tokens) - length)
        return self._tokens[start : start + length]


class Turns:
    """Asks ways in turns, with only their own servers awake."""

    def __init__(self, repeats: int) -> None:
        self._repeats, self.rows = repeats, list[dict[str, Any]]()

    def take(self, tokens: int, ways: dict[str, tuple[Sequence[Server], Callable[[], float]]], **more: Any) -> None:
        """Adds a row for each way."""
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(self._repeats if tokens <= 8192 else 1):
            for way, (servers, ask) in ways.items():
                for server in servers:
                    server.resume()
                time.sleep(0.3)
                times[way].append(ask())
                for server in servers:
                    server.pause()
        for way, measured in times.items():
            seconds = statistics.median(measured)
            self.rows.append({"way": way, "tokens": tokens, "seconds": seconds, "measured": measured, **more})
            print(f"{way}, {tokens} tokens: {seconds:.3f} s", flush=True)


def measure(settings: Settings) -> dict[str, Any]:
    """The part `ttft`: rows, and the table that the chains were split by."""
    longest = max(settings.lengths)
    whole = sized(longest, longest)
    prompts = Prompts(settings.model)
    turns = Turns(settings.repeats)
    with ExitStack() as ends:
        round_ = _Round(settings, prompts, ends)
        single = round_.served("single", [0], whole)
        tensor = round_.served("tensor", [0, 1], [*whole, "--tensor-parallel-size", "2"], threads="0|1")
        chain = [round_.served(f"chain-{i}", [i], whole, chained=True) for i in range(2)]
        table = _tuned(settings, [server for server, _ in chain], [engine for _, engine in chain])
        coarse = _without(table, (4096, 8192))
        for tokens in settings.lengths:
            contexts = search(table.chain, tokens, 2, fewest=2, block=table.block).contexts
            half = tokens // 2 // table.block * table.block
            apart = coarse.split(tokens).contexts
            ways = {
                "one engine": round_.alone(single, tokens),
                "TP=2": round_.alone(tensor, tokens),
                "even": round_.by(chain, (half, tokens - half)),
                "searched": round_.by(chain, contexts),
            }
            if len(apart) == 2:
                ways["interpolated"] = round_.by(chain, apart)
            splits = {"searched": list(contexts), "interpolated": list(apart)}
            splits["table"] = list(table.split(tokens).contexts)
            predicted = {"searched": float(table.chain.ttft(contexts)), "one engine": table.chain.single(tokens)}
            turns.take(tokens, ways, splits=splits, predicted=predicted)
            if tokens == 4096:
                for share in _PICKED:
                    first = round(share * tokens / table.block) * table.block
                    turns.take(tokens, {f"picked {share:.0%}": round_.by(chain, (first, tokens - first))})
        pairs = (("one engine", single), ("chain's last", chain[1]))
        decoding = {way: _decoding(pair, prompts(2048)) for way, pair in pairs}
    return {"rows": turns.rows, "table": _plain(table), "decoding": decoding}


def measure_others(settings: Settings, splits: dict[int, list[int]]) -> dict[str, Any]:
    """The part `others`: what does not fit into memory beside the first part's servers; one engine is measured again.

    Args:
        settings: As the first part's.
        splits: Its searched splits, by prompt length.
    """
    longest = max(splits)
    whole, chunked = sized(longest, longest), sized(longest, _CHUNK)
    prompts, turns = Prompts(settings.model), Turns(settings.repeats)
    with ExitStack() as ends:
        round_ = _Round(settings, prompts, ends)
        single = round_.served("single", [0], whole)
        chain = [round_.served(f"wired-{i}", [i], whole, chained=True, transport="tcp") for i in range(2)]
        pipeline, failure = None, None
        try:
            pipeline = round_.served("pipeline", [0, 1], [*chunked, "--pipeline-parallel-size", "2"], threads="0|1")
        except RuntimeError as error:  # as vLLM's CPU build does up to 0.32 at least
            failure = str(error)
        for tokens, contexts in splits.items():
            ways = {"one engine": round_.alone(single, tokens), "searched": round_.by(chain, contexts)}
            if pipeline is not None:
                ways["PP=2"] = round_.alone(pipeline, tokens)
            turns.take(tokens, ways)
    return {"rows": turns.rows, "PP=2 failed": failure}


def sized(longest: int, chunk: int) -> list[str]:
    """vLLM's arguments for prompts of so many tokens, prefilled so many at a time."""
    return ["--enforce-eager", "--max-model-len", str(longest + 64), "--max-num-batched-tokens", str(chunk)]


class _Round:
    """Servers that are measured in turns, and ways to ask them."""

    def __init__(self, settings: Settings, prompts: Prompts, ends: ExitStack) -> None:
        self._settings, self._prompts, self._ends = settings, prompts, ends

    def served(
        self, name: str, cores: Sequence[int], arguments: Sequence[str], **more: Any
    ) -> tuple[Server, EngineClient]:
        """A server that has answered once, paused."""
        server = Server(self._settings.model, self._settings.folder / f"{name}.log", cores, arguments, **more)
        self._ends.callback(server.close)
        engine = server.ready()
        engine.prefill(self._prompts(256))
        server.pause()
        return server, engine

    def alone(self, pair: tuple[Server, EngineClient], tokens: int) -> tuple[list[Server], Callable[[], float]]:
        server, engine = pair
        return [server], lambda: engine.prefill(self._prompts(tokens))

    def by(
        self, pairs: Sequence[tuple[Server, EngineClient]], contexts: Sequence[int]
    ) -> tuple[list[Server], Callable[[], float]]:
        engines = [engine for _, engine in pairs]
        return [server for server, _ in pairs], lambda: time_chain(engines, self._prompts(sum(contexts)), contexts)


def _without(table: Table, lengths: Sequence[int]) -> Table:
    """A table that has no rows from half of the shortest of these lengths to twice the longest, but at both ends."""
    low, high = min(lengths) // 2, 2 * max(lengths)
    rows = [row.tokens for row in table.rows if not low < row.tokens < high]
    return make_table(
        table.chain,
        [*rows, low, high],
        2,
        model=table.model,
        hardware=table.hardware,
        block=table.block,
        slack=table.slack,
    )


def measure_link(
    model: Path, folder: Path, hosts: Sequence[str], space: str, repeats: int, lengths: Sequence[int]
) -> dict[str, Any]:
    """The part `link`, run within the first namespace; the second engine runs within `space`."""
    longest = max(lengths)
    whole = sized(longest, longest)
    prompts = Prompts(model)
    with ExitStack() as ends:
        pairs = []
        for i, (host, within) in enumerate(zip(hosts, (None, space), strict=True)):
            server = Server(model, folder / f"linked-{i}.log", [i], whole, chained=True, host=host, within=within)
            ends.callback(server.close)
            engine = server.ready()
            engine.prefill(prompts(256))
            server.pause()
            pairs.append((server, engine))
        servers, engines = [server for server, _ in pairs], [engine for _, engine in pairs]
        table = _tuned(Settings(model, folder, lengths, repeats), servers, engines)
        turns = Turns(repeats)
        for tokens in lengths:
            contexts = search(table.chain, tokens, 2, fewest=2, block=table.block).contexts
            half = tokens // 2 // table.block * table.block
            ways: dict[str, Any] = {"one engine": (servers[:1], lambda n=tokens: engines[0].prefill(prompts(n)))}
            for way, split in (("even", (half, tokens - half)), ("searched", contexts)):
                ways[way] = (servers, lambda n=tokens, split=split: time_chain(engines, prompts(n), split))
            predicted = {"searched": float(table.chain.ttft(contexts))}
            turns.take(tokens, ways, splits={"searched": list(contexts)}, predicted=predicted)
    return {"rows": turns.rows, "table": _plain(table)}


def _tuned(settings: Settings, servers: Sequence[Server], engines: Sequence[EngineClient]) -> Table:
    for server in servers:
        server.resume()
    config = json.loads((settings.model / "config.json").read_text()) | {"dtype": "float32"}
    lengths = sorted({min(n, 8192) for n in (512, *settings.lengths)})
    table, found = tune("model", config, engines, lengths, repeats=1, told=lambda line: print(line, flush=True))
    print(f"crowding {found.crowding:.3f}, largest error {found.error:.1%}", flush=True)
    for server in servers:
        server.pause()
    return table


def _decoding(pair: tuple[Server, EngineClient], tokens: list[int]) -> float:
    """Tokens a second after the first."""
    server, engine = pair
    server.resume()
    first = engine.prefill(tokens)  # then cached
    first = engine.prefill(tokens)
    body = {"model": engine.model, "prompt": tokens, "max_tokens": 1 + _DECODED, "temperature": 0, "ignore_eos": True}
    began = time.monotonic()
    engine.ask("/v1/completions", body)
    took = time.monotonic() - began - first
    server.pause()
    return _DECODED / took


def _plain(table: Table) -> dict[str, Any]:
    chain = asdict(table.chain)
    if chain["link"]["bandwidth"] == float("inf"):
        chain["link"]["bandwidth"] = None
    rows = [{"tokens": row.tokens, "contexts": list(row.contexts)} for row in table.rows]
    return {"chain": chain, "block": table.block, "slack": table.slack, "rows": rows}


if __name__ == "__main__":
    model, folder, first, second, space, repeats, out, *lengths = sys.argv[1:]
    found = measure_link(Path(model), Path(folder), (first, second), space, int(repeats), list(map(int, lengths)))
    Path(out).write_text(json.dumps(found))
