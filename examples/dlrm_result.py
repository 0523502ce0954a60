"""What a training of `train_dlrm.py` came to: step times, bytes and losses, as JSON, as text and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from click_logs import ClickLog
from dlrm_comparison import OURS, Measured, Outcome, Planned
from dlrm_run import Run
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = ["as_result", "auc", "draw", "log_loss", "told"]


def as_result(run: Run, log: ClickLog, outcome: Outcome) -> dict[str, Any]:
    """The content of the JSON file."""
    rate = float(np.concatenate(outcome.seen).mean())
    held_out = np.concatenate(outcome.held_out)
    constant = np.full(len(held_out), np.log(rate / (1 - rate)))
    plans = [
        _plan(planned, [measured[place] for measured in outcome.measured], held_out)
        for place, planned in enumerate(outcome.planned)
    ]
    first, second = (np.array(plan["losses"]) for plan in plans)
    return {
        "data": run.data,
        "ranks": len(outcome.measured),
        "batch": run.batch,
        "steps": run.steps,
        "tables": [table._asdict() for table in log.tables],
        "dim": run.dim,
        "constant": {"click_rate": rate, **_quality(held_out, constant)},
        "held_out": len(held_out),
        "largest_difference_of_losses": float(np.abs(first - second).max()),
        "speed_up": _speed_up(outcome.measured),
        "plans": plans,
    }


def _speed_up(measured: Sequence[Sequence[Measured]]) -> list[float]:
    """Step for step, the second plan's over the first's: quartiles; above 1, the second is faster.

    A step takes as long as on its slowest rank.
    """
    first, second = (np.max([by_rank[place].seconds for by_rank in measured], 0) for place in range(2))
    quartiles: list[float] = np.quantile(first / second, (0.25, 0.5, 0.75)).tolist()
    return quartiles


def _plan(planned: Planned, measured: Sequence[Measured], labels: NDArray[np.float32]) -> dict[str, Any]:
    scores = np.concatenate([np.empty(0, np.float32), *(each for it in measured for each in it.scores)])
    (tables,) = planned.plan.plan.values()
    return {
        "planner": planned.planner,
        "plan_seconds": planned.seconds,
        "rating_ms": planned.rating,
        "sharding": {name: [how.sharding_type, how.ranks] for name, how in tables.items()},
        "step_seconds": max(median(it.seconds) for it in measured),
        "busy_seconds": max(median(it.busy) for it in measured),
        "sent_bytes": sum(it.sent for it in measured),
        "ranks": [
            {
                "step_seconds": median(it.seconds),
                "busy_seconds": median(it.busy),
                "share_in_collectives": it.in_collectives,
                "sent_bytes": it.sent,
            }
            for it in measured
        ],
        **_quality(labels, scores),
        "losses": np.mean([it.losses for it in measured], 0).tolist(),
    }


def _quality(labels: NDArray[np.float32], scores: NDArray[Any]) -> dict[str, float | None]:
    """Of scores for what is held out; None where nothing is."""
    some = len(labels) > 0
    return {
        "held_out_loss": log_loss(labels, scores) if some else None,
        "held_out_auc": auc(labels, scores) if some else None,
    }


def log_loss(labels: NDArray[np.float32], scores: NDArray[Any]) -> float:
    """The mean of -log(probability given to what happened)."""
    return float(np.logaddexp(0, np.where(labels > 0, -1, 1) * scores.astype(np.float64)).mean())


def auc(labels: NDArray[np.float32], scores: NDArray[Any]) -> float | None:
    """How often a click scores higher than no click, a tie as half; None where there is but one kind."""
    clicks = int((labels > 0).sum())
    others = len(labels) - clicks
    if not clicks or not others:
        return None
    ranks = rankdata(scores)[labels > 0].sum()
    return float((ranks - clicks * (clicks + 1) / 2) / (clicks * others))


def told(result: dict[str, Any]) -> Iterator[str]:
    """The lines that a user sees."""
    yield f"{result['data']}, {result['ranks']} ranks, {result['batch']} samples a rank"
    yield f"{'planner':<9} {'rating':>9} {'step':>9} {'busy':>9} {'sent':>9}  {'held-out loss, AUC':<18} sharding"
    for plan in result["plans"]:
        kinds = Counter(kind for kind, _ in plan["sharding"].values())
        yield (
            f"{plan['planner']:<9} {plan['rating_ms']:>6.3f} ms {plan['step_seconds'] * 1e3:>6.1f} ms "
            f"{plan['busy_seconds'] * 1e3:>6.1f} ms {plan['sent_bytes'] / 1e6:>6.2f} MB  {_told_quality(plan):<18} "
            + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        )
    rate = result["constant"]["click_rate"]
    yield f"always {rate:.3f}: {_told_quality(result['constant'])}"
    low, middle, high = result["speed_up"]
    yield f"forerun's steps over torchrec's: {middle:.2f} times as fast (quartiles {low:.2f} to {high:.2f})"
    yield f"losses of both differ by {result['largest_difference_of_losses']:.1e} at most"


def _told_quality(row: dict[str, Any]) -> str:
    loss, area = row["held_out_loss"], row["held_out_auc"]
    return "nothing held out" if loss is None else f"{loss:.4f}, {'-' if area is None else f'{area:.4f}'}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Losses by step, and each rank's step time and bytes, of both plans."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, seconds, sent = figure.subplots(1, 3)
    width = 0.4
    for place, plan in enumerate(result["plans"]):
        colour = "C0" if plan["planner"] == OURS else "C7"
        losses.plot(plan["losses"], color=colour, linewidth=2 - place, label=plan["planner"])
        at = np.arange(result["ranks"]) + (place - 0.5) * width
        seconds.bar(at, [it["step_seconds"] * 1e3 for it in plan["ranks"]], width, color=colour, alpha=0.45)
        busy = [it["busy_seconds"] * 1e3 for it in plan["ranks"]]
        seconds.bar(at, busy, width, color=colour, label=f"{plan['planner']} (full: processor)")
        sent.bar(at, [it["sent_bytes"] / 1e6 for it in plan["ranks"]], width, color=colour, label=plan["planner"])
    rate = result["constant"]["click_rate"]
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    losses.axhline(entropy, color="black", linewidth=1, linestyle="--", label=f"always {rate:.3f}")
    for axes, title, below in (
        (losses, "training loss", "step"),
        (seconds, "median step (ms)", "rank"),
        (sent, "sent to other ranks in a step (MB)", "rank"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below)
        axes.legend(fontsize=8, loc="lower right" if below == "rank" else "upper right")
    for axes in (seconds, sent):
        axes.set_xticks(range(result["ranks"]))
    figure.suptitle(f"{result['data']}, {result['ranks']} ranks", fontsize=11)
    figure.savefig(path, dpi=110)
