"""The step time of torchrec's DLRM, trained by torchrec's plan and by DLRMPlanner's, on 2 and 4 ranks of one machine.

Tables with the rows of Criteo's Kaggle challenge (dimension 16, one lookup each) and a hundredth of the rows of
MLPerf's DLRMv2 (dimension 128, its lookups, also with column-wise cuts of 64), with ids by a power law; MovieLens-100k.
Both plans' models are trained in one run, step by step in turns, from the same weights on the same batches. Writes
`results/dlrm-training.json` and a picture beside it. Cases that are not named keep what an earlier run wrote. Kaggle's
tables take 9 GB with Adagrad's state, both models' together; `--scale` makes tables smaller.

    python examples/benchmarks/dlrm_training.py [--cases movielens,kaggle-2] [--steps 200] [--scale 0.1]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measurement import comparison, provenance

sys.path.append(str(Path(__file__).parents[1]))  # the examples

from dlrm_comparison import OURS, STOCK
from dlrm_run import Run
from plan_dlrm import HOTNESS, ROWS
from train_dlrm import train

_HERE = Path(__file__).parent
_PACKAGES = ("torch", "torchrec", "fbgemm_gpu-cpu", "scipy", "numpy")
_RANKS = (2, 4)
_MLPERF: dict[str, Any] = {
    "data": "synthetic:power-law",
    "rows": tuple(each // 100 for each in ROWS),
    "lookups": tuple(HOTNESS),
    "dim": 128,
}
_DATA: dict[str, dict[str, Any]] = {
    "kaggle": {"data": "synthetic:power-law"},
    "mlperf": _MLPERF,
    "mlperf columns of 64": {**_MLPERF, "min_partition": 64},
    "movielens": {"data": "movielens"},
}
CASES = {f"{name}-{ranks}": (given, ranks) for name, given in _DATA.items() for ranks in _RANKS}


def measured(case: str, steps: int, batch: int, scale: float) -> dict[str, Any]:
    """Trains one case; what came out, without each step's loss."""
    given, ranks = CASES[case]
    result = train(Run(steps=steps, batch=batch, scale=scale, **given), ranks)
    for plan in result["plans"]:
        plan["last_loss"] = plan.pop("losses")[-1]
    return {"case": case, "scale": scale, **result}


def as_result(rows: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """The file's content: comparisons `ours` against `peer` (a ratio above 1: ours is better), and every row."""
    comparisons = []
    for row in rows:
        stock, ours = (_by_planner(row)[name] for name in (STOCK, OURS))
        for what, unit, key, factor in (
            ("step", "ms", "step_seconds", 1e3),
            ("busy", "ms", "busy_seconds", 1e3),
            ("sent", "MB", "sent_bytes", 1e-6),
            ("rating", "ms", "rating_ms", 1.0),
        ):
            name = f"{row['case']} {what}"
            comparisons.append(comparison(name, unit, ours[key] * factor, stock[key] * factor, STOCK, None))
    return {**provenance(torch.device("cpu"), _PACKAGES, command), "rows": comparisons, "measured": list(rows)}


def _by_planner(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {plan["planner"]: plan for plan in row["plans"]}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Every rank's median step by both plans, and how much faster a step is by ours."""
    figure = Figure(figsize=(12, 0.9 * len(rows) + 1.4), layout="constrained")
    steps, gains = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        for offset, (name, colour) in zip((-0.2, 0.2), ((STOCK, "C7"), (OURS, "C0")), strict=True):
            plan = _by_planner(row)[name]
            at = [place + offset + 0.36 * ((rank + 0.5) / row["ranks"] - 0.5) for rank in range(row["ranks"])]
            height = 0.32 / row["ranks"]
            told = name if place == 0 else None
            steps.barh(at, [it["step_seconds"] * 1e3 for it in plan["ranks"]], height, color=colour, alpha=0.45)
            steps.barh(at, [it["busy_seconds"] * 1e3 for it in plan["ranks"]], height, color=colour, label=told)
        low, middle, high = row["speed_up"]
        gains.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color="C0", capsize=3)
    gains.axvline(1.0, color="black", linestyle="--", linewidth=1, label="as fast")
    gains.set(xlabel="torchrec's step / forerun's, step for step: median and quartiles")
    gains.legend(fontsize=8)
    steps.set(xlabel="median step of each rank (ms); full: its processor was busy")
    steps.set_yticks(range(len(rows)), [row["case"] for row in rows])
    steps.invert_yaxis()
    steps.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="parts of names, parted by commas (default: all)")
    parser.add_argument("--steps", type=int, default=200, help="of each model, timed")
    parser.add_argument("--batch", type=int, default=512, help="samples of a rank")
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows of Criteo's tables")
    parser.add_argument("--out", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    wanted = None if options.cases is None else options.cases.split(",")
    cases = [case for case in CASES if wanted is None or any(part in case for part in wanted)]
    if not cases:
        parser.error(f"no case is named so; there are {', '.join(CASES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "dlrm-training.json"
    found = {row["case"]: row for row in json.loads(file.read_text())["measured"]} if file.is_file() else {}
    command = " ".join(["python examples/benchmarks/dlrm_training.py", *sys.argv[1:]])
    for case in cases:
        found[case] = row = measured(case, options.steps, options.batch, options.scale)
        stock, ours = (_by_planner(row)[name]["step_seconds"] * 1e3 for name in (STOCK, OURS))
        low, middle, high = row["speed_up"]
        print(f"{case}: {ours:.1f} ms; torchrec {stock:.1f} ms; {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
        rows = [found[each] for each in CASES if each in found]
        file.write_text(json.dumps(as_result(rows, command), indent=1) + "\n")
    draw(rows, options.out / "dlrm-training.png")


if __name__ == "__main__":
    main()
