"""Time to the first token of a long prompt in one SGLang server: one rank, its own parallelism, and KV-Runahead.

    python examples/benchmarks/sglang_runahead.py                     # as root, on two idle cores: half an hour
    python examples/benchmarks/sglang_runahead.py --links loopback --lengths 1024 --repeats 1

Servers run in the environment `.venv-sglang` that `make setup` makes.

Each way is a server of its own, one after the other: one rank; tensor parallelism; SGLang's prefill context
parallelism (zigzag); KV-Runahead with a prompt split in half, and as searched by the model that is measured at the
server's start. A rank has a core, and where a link is named, a network namespace whose port has that rate; else all is
over loopback.
What SGLang lacks on a CPU comes from `tests/hosts/sglang_shims`: among it, that `torch_native` calls context-parallel
strategies. Prompts are random tokens, weights are random; ways' first tokens are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from links import limit, namespaces
from matplotlib.figure import Figure
from measurement import comparison, provenance
from sglang_ranks import Ranks, versions

sys.path.insert(0, str(Path(__file__).parents[1]))
from runahead_model import make

RESULTS = Path(__file__).with_name("results") / "sglang_runahead.json"
LINKS = ("loopback", "1gbit", "100mbit")
_CHAIN = ("--attn-cp-size", "2", "--enable-prefill-cp", "--cp-strategy", "zigzag")
WAYS: dict[str, dict[str, Any]] = {
    "one rank": {"ranks": 1},
    "TP=2": {"ranks": 2},
    "zigzag": {"ranks": 2, "flags": _CHAIN},
    "even": {"ranks": 2, "flags": _CHAIN, "config": {"runahead": {"split": [0.5, 0.5]}}},
    "searched": {"ranks": 2, "flags": _CHAIN, "config": {"runahead": {}}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--linked", type=int, nargs="+", default=[4096], help="lengths over links")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended
    result = json.loads(given.out.read_text()) if given.out.exists() else {"parts": {}}
    with tempfile.TemporaryDirectory(prefix="forerun-") as folder:
        model = make(Path(folder) / "model", "qwen3", layers=given.layers, hidden=given.hidden)
        for link in given.links:
            lengths = given.lengths if link == "loopback" else given.linked
            for way, rows in _measured(model, Path(folder), link, given.ways, lengths, given.repeats):
                part = result["parts"].setdefault(link, {"rows": []})
                part["rows"] = [row for row in part["rows"] if row["way"] != way] + rows
                part |= _made(given)
                result["rows"] = _comparisons(result["parts"])
                given.out.parent.mkdir(exist_ok=True)
                given.out.write_text(json.dumps(result, indent=1) + "\n")
    _draw(result["parts"], given.out.with_suffix(".png"))
    _same(result["parts"])
    for row in result["rows"]:
        print(f"{row['name']}: {row['ours']:.3f} against {row['peer']:.3f} ({row['peer_name']}): {row['ratio']:.2f}x")


def _measured(
    model: Path, folder: Path, link: str, ways: Sequence[str], lengths: Sequence[int], repeats: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Way by way, each with its own server."""
    with contextlib.ExitStack() as ends:
        spaces: list[str] = []
        if link != "loopback":
            spaces = ends.enter_context(namespaces(2))
            for rank in range(2):
                limit(rank, link)
        for number, way in enumerate(ways):
            print(f"{link}, {way}", flush=True)
            name = f"{link}-{number}"
            server = Ranks(model, folder, name, max(lengths), spaces=spaces[: WAYS[way]["ranks"]], **WAYS[way])
            try:
                rows = server.ask(lengths, repeats)
            except RuntimeError:
                print(server.told(), file=sys.stderr)
                raise
            finally:
                server.close()
            yield way, [{"way": way, **row, "seconds": statistics.median(row["measured"])} for row in rows]


def _made(given: argparse.Namespace) -> dict[str, Any]:
    command = shlex.join(["python", "examples/benchmarks/sglang_runahead.py", *sys.argv[1:]])
    shape = {"kind": "qwen3", "layers": given.layers, "hidden": given.hidden, "dtype": "float32"}
    run = provenance(torch.device("cpu"), (), command)
    run["versions"] = versions("torch", "sglang", "transformers")
    return {"run": run, "model": shape}


def _comparisons(parts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for link, part in parts.items():
        times = {(row["way"], row["tokens"]): row["seconds"] for row in part["rows"]}
        for tokens in sorted({tokens for _, tokens in times}):
            ours = times.get(("searched", tokens))
            alone = times.get(("one rank", tokens))
            for way in ("one rank", "TP=2", "zigzag", "even"):
                if ours and (way, tokens) in times:
                    least = None if alone is None else alone / 2  # of two ranks that wait for nothing
                    rows.append(comparison(f"{link}, {tokens} tokens", "s", ours, times[way, tokens], way, least))
    return rows


def _same(parts: dict[str, Any]) -> None:
    """Says where ways' answers differ: sums in another order may choose another of two tokens that are as likely."""
    for link, part in parts.items():
        wanted = {row["tokens"]: row["answers"] for row in part["rows"] if row["way"] == "one rank"}
        for row in part["rows"]:
            if row["answers"] != wanted.get(row["tokens"], row["answers"]):
                print(f"{link}, {row['way']}, {row['tokens']} tokens: other answers than by one rank", flush=True)


def _draw(parts: dict[str, Any], path: Path) -> None:
    """A panel of seconds for each link."""
    figure = Figure(figsize=(4.6 * len(parts), 4), layout="constrained")
    for number, (link, part) in enumerate(parts.items(), 1):
        axes = figure.add_subplot(1, len(parts), number, title=link, ylabel="seconds to the first token")
        lengths = sorted({row["tokens"] for row in part["rows"]})
        ways = [way for way in WAYS if any(row["way"] == way for row in part["rows"])]
        width = 0.8 / len(ways)
        for place, way in enumerate(ways):
            found = {row["tokens"]: row["seconds"] for row in part["rows"] if row["way"] == way}
            bars = axes.bar(
                [i + (place + 0.5) * width - 0.4 for i in range(len(lengths))],
                [found.get(length, 0) for length in lengths],
                width,
                label=way,
            )
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{length} tokens" for length in lengths])
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
