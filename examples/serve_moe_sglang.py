"""Serve a mixture of experts by SGLang on two expert-parallel ranks: stock, and with forerun.

A small Qwen3-MoE with random weights, as SGLang's expert parallelism cannot serve the examples' OLMoE. Its routing is
profiled on Python's standard library, its experts are planned onto the ranks, and requests from other files are
continued by SGLang's own server: as it is, with each token sent to a rank once, and with experts and tokens where the
plan puts them. SGLang runs in an environment of its own (`--python`); what a CPU lacks for it lies in `tests/hosts`.
Writes `sglang.json`, `plan.safetensors`, `plan.png` (`--out`).
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

import numpy as np
import torch
from serve_tiny_moe import LENGTH, NEW, planned
from train_tiny_moe import ASSETS
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from sglang_servers import Server  # noqa: E402

RANKS, LAYERS, HIDDEN = 2, 4, 256


def made(folder: Path) -> Path:
    """Writes the model, with the tokenizer of the examples' OLMoE."""
    words = AutoTokenizer.from_pretrained(ASSETS)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        intermediate_size=512,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def served(model: Path, out: Path, python: Path, config: dict[str, Any] | None) -> tuple[list[list[int]], float, int]:
    """All requests' greedy tokens, seconds, and the bytes that forerun says a rank has sent for them."""
    requests = np.load(out / "requests.npy").tolist()
    server = Server(model, out / "server.log", config=config, python=python, tp=RANKS, ep=RANKS)
    try:
        server.ready()
        server.generate(requests, NEW)  # once to be warm, and so that what is tried by turns is decided
        server.call("/flush_cache?timeout=60", {})
        before = sent(server)
        began = time.perf_counter()
        said = server.generate(requests, NEW)
        seconds = time.perf_counter() - began
        return said, seconds, sent(server) - before
    finally:
        server.close()


def sent(server: Server) -> int:
    """Bytes that rank 0 sent so far, as forerun counts them; 0 without it."""
    (state,) = server.info()
    layers = [] if state is None else state["speculative_moe"]["layers"]
    return sum(layer["bytes"] + layer["stock_bytes"] for layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang" / "bin" / "python", help="that has SGLang")
    parser.add_argument("--tokens", type=int, default=20_000, help="that the routing is profiled on")
    parser.add_argument("--out", type=Path, help="folder for what is written")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # with its servers
    if not options.python.exists():
        raise SystemExit(f"there is no {options.python}: make setup")
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)).absolute()
        out.mkdir(parents=True, exist_ok=True)
        model = made(Path(folder) / "moe")
        planned(RANKS, options.tokens, out, model)
        plan = str(out / "plan.safetensors")
        ways: list[tuple[str, dict[str, Any] | None]] = [
            ("stock SGLang", None),
            ("each token to a rank once", {"shuffle": False, "choose": False}),
            ("experts and tokens by the plan", {"plan": plan, "choose": False}),
            ("the same, where expected to be sooner", {"plan": plan}),
        ]
        rows: list[dict[str, Any]] = []
        expected: list[list[int]] = []
        for way, section in ways:
            print(f"starting {way}", flush=True)
            config = None if section is None else {"speculative_moe": section}
            said, seconds, counted = served(model, out, options.python, config)
            expected = expected or said
            rows.append(
                {
                    "way": way,
                    "kilobytes": (counted or stock_bytes(len(said))) / 1e3,
                    "milliseconds": 1e3 * seconds / NEW,
                    "same": sum(a == b for a, b in zip(said, expected, strict=True)),
                    "requests": len(said),
                }
            )
        (out / "server.log").unlink()
        (out / "sglang.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{'way':<38} {'kB a rank':>10} {'ms a token':>11} {'same answers':>13}")
    for row in rows:
        same = f"{row['same']} of {row['requests']}"
        print(f"{row['way']:<38} {row['kilobytes']:>10.0f} {row['milliseconds']:>11.1f} {same:>13}")
    if any(row["same"] < row["requests"] for row in rows):
        raise SystemExit("other answers")


def stock_bytes(requests: int) -> int:
    """What a rank sends for two sums over both ranks: each the hidden states of all tokens, in float32."""
    return 2 * requests * (LENGTH + NEW - 1) * HIDDEN * 4 * LAYERS


if __name__ == "__main__":
    main()
