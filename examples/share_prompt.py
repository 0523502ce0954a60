"""Two vLLM engines share a long prompt, and answer as one does: `python examples/share_prompt.py --out build/chain`.

Makes a model with random weights, starts two engines on this machine, a core each, measures them, splits a prompt by
the table that follows, and asks one engine and the chain in turns. With `--out`, writes `chain.json`, the table of
splits and the timeline as a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runahead_model import make, text
from transformers import AutoTokenizer

from forerun.runahead.engine_client import EngineClient, chain_parts
from forerun.runahead.engines import Engines
from forerun.runahead.partition import search
from forerun.runahead.picture import draw
from forerun.runahead.transport import parse_address
from forerun.runahead.tuning import tune

LENGTHS = (512, 1024, 2048)
ANSWER = 32  # tokens
REPEATS = 3


def answer(engines: Sequence[EngineClient], tokens: Sequence[int], contexts: Sequence[int]) -> tuple[str, float]:
    """A greedy answer by a chain (by one engine, if there is one context), and seconds to its first token."""
    parts = chain_parts(os.urandom(16), contexts, [engine.address for engine in engines])
    times = []

    def ask(engine: EngineClient, part: dict[str, Any], is_last: bool) -> str:
        body = {"model": engine.model, "prompt": list(tokens[: part["end"]]), "temperature": 0, "ignore_eos": True}
        body |= {"max_tokens": ANSWER if is_last else 1, "stream": is_last}
        if len(parts) > 1:
            body["kv_transfer_params"] = {"runahead": part}
        if not is_last:
            engine.ask("/v1/completions", body)
            return ""
        pieces = []
        for piece in engine.stream("/v1/completions", body):
            times.append(time.monotonic())
            pieces.append(piece["choices"][0]["text"])
        return "".join(pieces)

    with ThreadPoolExecutor(len(parts)) as pool:
        began = time.monotonic()
        asked = [
            pool.submit(ask, engine, part, part["next"] is None)
            for engine, part in zip(engines[-len(parts) :], parts, strict=True)
        ]
        texts = [one.result() for one in asked]
    return texts[-1], times[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000, help="of the prompt")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forerun-") as folder:
        model = make(Path(folder) / "model", layers=given.layers, hidden=given.hidden)
        config = json.loads((model / "config.json").read_text())
        tokens = AutoTokenizer.from_pretrained(model)(text(20 * given.tokens))["input_ids"]
        most = ["--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--dtype", "float32", "--enforce-eager"]
        print("starting two engines", flush=True)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of keys and values, of each
        with Engines(str(model), 2, logs=Path(folder), arguments=[*most, "--no-enable-prefix-caching"]) as started:
            engines = [EngineClient.connect(end.url, parse_address(end.address)) for end in started.endpoints]
            table, _ = tune(
                "random weights", config, engines, LENGTHS, repeats=2, told=lambda line: print(line, flush=True)
            )
            split = table.split(given.tokens)
            chain = search(table.chain, given.tokens, 2, fewest=2, block=table.block)
            rows = {"one engine": (given.tokens,), "chain of two": chain.contexts}
            found: dict[str, list[tuple[str, float]]] = {name: [] for name in rows}
            for i in range(REPEATS):
                prompt = tokens[i * 1000 : i * 1000 + given.tokens]
                for name, contexts in rows.items():
                    found[name].append(answer(engines[-len(contexts) :], prompt, contexts))
    same = [text for text, _ in found["one engine"]] == [text for text, _ in found["chain of two"]]
    result = {
        "tokens": given.tokens,
        "same": same,
        "answer": ANSWER * REPEATS,
        "chosen": list(split.contexts),
        "rows": [
            {
                "way": name,
                "contexts": list(contexts),
                "seconds": sorted(seconds for _, seconds in found[name])[REPEATS // 2],
                "predicted": float(table.chain.ttft(contexts)) if len(contexts) > 1 else chain.single,
            }
            for name, contexts in rows.items()
        ],
    }
    for row in result["rows"]:
        told = f"first token after {row['seconds']:.2f} s, expected {row['predicted']:.2f} s"
        print(f"{row['way']} {row['contexts']}: {told}")
    print("the same tokens" if same else "OTHER TOKENS")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "chain.json").write_text(json.dumps(result, indent=1))
        table.save(given.out / "table.json")
        draw(table.chain, chain, given.out / "timeline.png")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
