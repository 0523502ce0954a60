"""The ranks of one SGLang server share a long prompt: `python examples/share_prompt_sglang.py --out build/chain`.

Makes a model with random weights and starts SGLang's own server three times: on one rank, tensor-parallel over two, and
over two with KV-Runahead in place of SGLang's context-parallel strategy. SGLang runs in an environment of its own
(`--python`); what a CPU lacks for it lies in `tests/hosts`. With `--out`, writes `sglang.json`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runahead_model import make, text
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from sglang_servers import Server  # noqa: E402

ANSWER = 32  # tokens
REPEATS = 3
CHAIN = {"tp": 2, "attn_cp_size": 2, "enable_prefill_cp": True, "cp_strategy": "zigzag"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "one rank": ({}, None),
    "tensor-parallel over two": ({"tp": 2}, None),
    "KV-Runahead over two": (CHAIN, {"runahead": {}}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang" / "bin" / "python", help="that has SGLang")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # with its servers
    if not given.python.exists():
        raise SystemExit(f"there is no {given.python}: make setup")
    with tempfile.TemporaryDirectory(prefix="forerun-") as folder:
        model = make(Path(folder) / "model", layers=given.layers, hidden=given.hidden)
        tokens = AutoTokenizer.from_pretrained(model)(text(20 * given.tokens))["input_ids"]
        asked = [tokens[i * 1000 : i * 1000 + given.tokens] for i in range(REPEATS)]
        room = {"context_length": given.tokens + 1000, "max_total_tokens": 4 * given.tokens + 4000}
        room["chunked_prefill_size"] = given.tokens
        rows: list[dict[str, Any]] = []
        expected: list[list[int]] = []
        for way, (flags, config) in WAYS.items():
            print(f"starting {way}", flush=True)
            server = Server(model, Path(folder) / "log", config=config, python=given.python, **room, **flags)
            try:
                server.ready()
                server.generate(asked[0][::-1], 1)  # once to be warm
                seconds = [timed(server, prompt) for prompt in asked]
                said = [server.generate(prompt, ANSWER) for prompt in asked]
            finally:
                server.close()
            expected = expected or said
            same = sum(a == b for one, two in zip(said, expected, strict=True) for a, b in zip(one, two, strict=True))
            rows.append({"way": way, "seconds": sorted(seconds)[REPEATS // 2], "same": same})
    for row in rows:
        told = f"first token after {row['seconds']:.2f} s, {row['same']} of {ANSWER * REPEATS} tokens the same"
        print(f"{row['way']}: {told}")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        result = {"tokens": given.tokens, "answer": ANSWER * REPEATS, "rows": rows}
        (given.out / "sglang.json").write_text(json.dumps(result, indent=1))
    if any(row["same"] < ANSWER * REPEATS for row in rows):
        raise SystemExit("other tokens")


def timed(server: Server, prompt: list[int]) -> float:
    """Seconds to the first token of a prompt that no cache knows."""
    server.call("/flush_cache?timeout=60", {})
    began = time.perf_counter()
    server.generate(prompt, 1)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
