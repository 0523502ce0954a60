"""Serve the small OLMoE of `train_tiny_moe.py` on expert-parallel ranks: stock DeepSpeed AutoEP beside forerun.

Its routing is profiled on files that it was trained on, its experts are planned onto the ranks, and requests from files
that it has not seen are continued: by stock, by stock with forerun's `speculate`, and with experts and requests where
the plan puts them. Needs no network but the loopback. Writes `serving.json`, `plan.safetensors`, `plan.png` (`--out`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from train_tiny_moe import ASSETS, as_stream, sources
from transformers import AutoModelForCausalLM, AutoTokenizer

from forerun.moe import assign
from forerun.moe.plan import Plan
from forerun.moe.planning import make_plan
from forerun.moe.report import draw
from forerun.moe.transformers import profile_model

REQUESTS, LENGTH, NEW = 16, 32, 8  # a rank's requests, their tokens, the tokens that are generated


def planned(ranks: int, tokens: int, out: Path, folder: Path = ASSETS) -> None:
    """Profiles the model in a folder, writes the plan and its picture, and the requests."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    trained, kept = sources()
    random = np.random.default_rng(0)
    some = [trained[at] for at in random.permutation(len(trained))[:60]]
    pieces = as_stream(some, words)[:tokens].split(256)
    began = time.perf_counter()
    profile = profile_model(model, pieces)
    print(f"profiled {tokens} tokens in {time.perf_counter() - began:.1f} s", flush=True)
    began = time.perf_counter()
    plan = make_plan(profile, ranks, effort=20)
    print(f"planned {len(plan.layers)} layers in {time.perf_counter() - began:.1f} s", flush=True)
    plan.save(out / "plan.safetensors")
    draw(plan, out / "plan.png")
    stream = as_stream(kept, words)
    starts = random.integers(0, len(stream) - LENGTH, ranks * REQUESTS)
    np.save(out / "requests.npy", np.stack([stream[start : start + LENGTH].numpy() for start in starts]))


def served(rank: int, ranks: int, out: Path) -> None:
    """One rank: the same requests, continued in each way."""
    warnings.simplefilter("ignore")
    import deepspeed
    from moe_traffic import Traffic

    from forerun.moe.deepspeed import speculate, unspeculate

    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    patience = datetime.timedelta(seconds=120)
    store = f"file://{out / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "expert_parallel": {
            "enabled": True,
            "autoep_size": ranks,
            "preset_model": "mixtral",
            "use_grouped_mm": False,
        },
    }
    engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
    engine.eval()
    plan = Plan.load(out / "plan.safetensors")
    requests = torch.from_numpy(np.load(out / "requests.npy"))
    in_order = np.arange(len(requests)) % ranks
    near = assign(list(requests), plan, limit=1.0)
    ways: list[tuple[str, dict[str, Any] | None, Any]] = [
        ("stock AutoEP", None, in_order),
        ("each token to a rank once", {}, in_order),
        ("experts grouped", {"plan": plan}, in_order),
        ("experts grouped, requests assigned", {"plan": plan}, near),
        ("the same, one sum a rank comes back", {"plan": plan, "exact": False}, near),
    ]
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] | None = None
    for name, settings, rank_of in ways:
        if settings is not None:
            speculate(engine, **settings)
        mine = torch.from_numpy(np.flatnonzero(rank_of == rank))
        continued(engine.module, requests[mine])  # once to be warm
        with Traffic(model.config.hidden_size * 4) as traffic:
            dist.barrier()
            began = time.perf_counter()
            said = continued(engine.module, requests[mine])
            seconds = time.perf_counter() - began
        if settings is not None:
            unspeculate(engine)
        parts: list[Any] = [None] * ranks
        told = (
            dict(zip(mine.tolist(), said.tolist(), strict=True)),
            traffic.rows.total(),
            traffic.index.total(),
            seconds,
        )
        dist.all_gather_object(parts, told)
        answers = [answer for _, answer in sorted(pair for part in parts for pair in part[0].items())]
        expected = answers if expected is None else expected
        rows.append(
            {
                "way": name,
                "kilobytes": sum(part[1] for part in parts) / 1e3,
                "other_kilobytes": sum(part[2] for part in parts) / 1e3,
                "milliseconds": 1e3 * max(part[3] for part in parts) / NEW,
                "same": sum(a == b for a, b in zip(answers, expected, strict=True)),
                "requests": len(requests),
                "ranks": ranks,
            }
        )
    if rank == 0:
        (out / "serving.json").write_text(json.dumps(rows, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def continued(model: nn.Module, ids: Tensor) -> Tensor:
    """`[n, NEW]` greedy tokens."""
    mask = torch.ones_like(ids)
    said = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
    )
    new: Tensor = said[:, ids.shape[1] :]
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20_000, help="that the routing is profiled on")
    parser.add_argument("--seconds", type=float, default=300, help="after which the ranks are given up")
    parser.add_argument("--out", type=Path, help="folder for what is written")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # of the processes that it starts itself
    options = parser.parse_args()
    if options.rank is not None:
        served(options.rank, options.ranks, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = (options.out or Path(folder)).absolute()
        out.mkdir(parents=True, exist_ok=True)
        planned(options.ranks, options.tokens, out)
        run(options.ranks, out, options.seconds)
        print(f"{'way':<38} {'kB':>8} {'ms a token':>11} {'same answers':>13}")
        for row in json.loads((out / "serving.json").read_text()):
            same = f"{row['same']} of {row['requests']}"
            print(f"{row['way']:<38} {row['kilobytes']:>8.0f} {row['milliseconds']:>11.1f} {same:>13}")


def run(ranks: int, out: Path, seconds: float) -> None:
    """Starts the ranks and waits for them; none is left behind.

    Raises:
        SystemExit: One failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    (out / "store").unlink(missing_ok=True)
    logs = [out / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, __file__, "--rank", str(rank), "--ranks", str(ranks), "--out", str(out)]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for code, log in zip(codes, logs, strict=True):
        if code:
            raise SystemExit(f"a rank failed:\n{log.read_text()[-2000:]}")
        log.unlink()
    (out / "store").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
