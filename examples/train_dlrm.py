"""Train torchrec's DLRM on 2 or 4 ranks of this machine, planned by torchrec and by DLRMPlanner in turns.

    python examples/train_dlrm.py --data movielens --ranks 2 4 --out build/dlrm
    python examples/criteo.py build/criteo.txt.gz           # a synthetic file in Criteo's format, or take a real one
    python examples/train_dlrm.py --data criteo:build/criteo.txt.gz --scale 0.01
    python examples/train_dlrm.py --data synthetic:power-law --scale 0.1
    torchrun --nproc-per-node 2 examples/train_dlrm.py --data movielens

Prints for each planner its plan's rating, the step time of the slowest rank, how long that rank's processor was busy,
and the bytes that the ranks sent each other in a step; loss and AUC on held-out samples, beside those of a constant.
With `--out` writes `training-RANKS.json`, with every rank's figures and the losses, and a picture of them.

Data: `movielens` (real; RecBole's wheel is fetched by pip into `--cache`, or `movielens:WHEEL`), `criteo:PATH` (a file
in Criteo's format, plain or .gz), and `synthetic:uniform`, `synthetic:power-law`, `synthetic:stack-distance:TRACE`
with the tables of Criteo's Kaggle challenge, the trace a file in Criteo's format.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dlrm_comparison import trained
from dlrm_result import as_result, draw, told
from dlrm_run import Run
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

__all__ = ["train"]

_TIMEOUT = timedelta(minutes=5)  # of every collective


def train(run: Run, ranks: int) -> dict[str, Any]:
    """Trains on so many new processes; what came out.

    Raises:
        RuntimeError: A rank failed; the message is its error.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks)  # one host: torchrec's sharded modules read it
        try:
            start_processes(_start, (ranks, run, Path(folder)), nprocs=ranks, start_method="fork")
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise RuntimeError(str(error)) from None
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return result


def _start(rank: int, ranks: int, run: Run, folder: Path) -> None:
    """One of the new processes."""
    store = f"file://{folder}/store"
    result = _join(run, init_method=store, rank=rank, world_size=ranks)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


def _join(run: Run, **group: Any) -> dict[str, Any] | None:
    """Trains as one of a group's ranks; what came out, on rank 0."""
    logging.disable(logging.WARNING)  # torchrec's, one for each table that is copied to every rank
    warnings.filterwarnings("ignore", category=FutureWarning)  # torchrec's, of torch functions with new names
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
    warnings.filterwarnings("ignore", message="no table has pooling factors")  # one lookup each is what was measured
    torch.set_num_threads(1)
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's own messages
    dist.init_process_group("gloo", timeout=_TIMEOUT, **group)
    log, outcome = trained(run)
    dist.barrier()
    gc.collect()  # models hold the group
    dist.destroy_process_group()
    return None if outcome is None else as_result(run, log, outcome)


def _show(result: dict[str, Any], out: Path | None) -> None:
    print(*told(result), sep="\n", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = f"training-{result['ranks']}"
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result, out / f"{name}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="ignored under torchrun")
    parser.add_argument("--steps", type=int, default=Run("").steps)
    parser.add_argument("--warm-up", type=int, default=Run("").warm_up, help="steps before those that are timed")
    parser.add_argument("--batch", type=int, default=Run("").batch, help="samples of a rank")
    parser.add_argument("--dim", type=int, default=Run("").dim, help="of every embedding")
    parser.add_argument("--scale", type=float, default=Run("").scale, help="of the rows of Criteo's tables")
    parser.add_argument("--min-partition", type=int, help="columns of the narrowest shard")
    parser.add_argument("--cache", type=Path, default=Run("").cache, help="folder for MovieLens")
    parser.add_argument("--out", type=Path, help="folder for JSON and pictures")
    options = vars(parser.parse_args(arguments))
    ranks, out = options.pop("ranks"), options.pop("out")
    for name, least in (("steps", 1), ("warm_up", 0), ("batch", 1), ("dim", 1)):
        if options[name] < least:
            parser.error(f"--{name.replace('_', '-')} is {options[name]}; give {least} or more")
    if min(ranks) < 1:
        parser.error(f"--ranks has {min(ranks)}; give 1 or more")
    run = Run(**options)
    if "RANK" in os.environ:  # torchrun has started the processes
        result = _join(run)
        if result is not None:
            _show(result, out)
        return
    for each in ranks:
        try:
            _show(train(run, each), out)
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
