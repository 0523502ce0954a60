"""Rounds, evaluations, seconds and error of every way to sample, each run until its rule says that it has converged."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, NamedTuple

from measurement import comparison, mean, relative_error, wait
from pcm_cases import FIRST_SEED, Case, sample
from torch import Tensor, nn

__all__ = ["RULES", "Row", "compared", "measure"]

# The papers' own rule, and the certified one at two tolerances; as `parallel` takes them.
RULES: dict[str, dict[str, Any]] = {
    "noise 0.1": {"norm": "noise", "tolerance": 0.1},
    "relative 1e-2": {"norm": "relative", "tolerance": 1e-2},
    "relative 1e-3": {"norm": "relative", "tolerance": 1e-3},
}
_PAPER = "noise 0.1"

# Ours, the peer, and how much faster the paper is there under its own rule (arXiv 2503.19731).
_PAIRS = (
    ("PCM", "sequential", 2.71),
    ("PCM", "plain", 1.77),
    ("PCM", "slope only", None),
    ("PCM + acceleration", "sequential", None),
    ("PCM + acceleration", "accelerated", None),
    ("PCM + acceleration", "slope only + acceleration", None),
)


class Row(NamedTuple):
    """One case under one stopping rule, one way to sample; means over seeds, one sample a run."""

    case: str
    steps: int  # N
    rule: str
    way: str
    seeds: int
    rounds: float  # model calls one after the other
    guided_rounds: float  # of them, those in which the PCM answered some points
    evaluations: float  # points that the model was asked at
    seconds: float  # a sample
    error: float  # relative L2 distance to the sequential sample
    largest_error: float  # of all seeds


class _Run(NamedTuple):
    sample: Tensor
    seconds: float
    rounds: int
    guided_rounds: int
    evaluations: int


def measure(case: Case, rule: str, seeds: int) -> list[Row]:
    """All ways, turn by turn on each seed, so that what else the machine does falls on all of them."""
    samplers = {"sequential": (case.fresh(), case.scheduler)}
    samplers |= {name: case.sampler(way, **RULES[rule]) for name, way in case.ways.items()}
    runs = defaultdict(list)
    for seed in (FIRST_SEED + seeds, *range(FIRST_SEED, FIRST_SEED + seeds)):
        for way, (model, scheduler) in samplers.items():
            runs[way].append(_timed(case, model, scheduler, seed))
    return [_row(case, rule, way, runs[way][1:], runs["sequential"][1:]) for way in runs]  # the first warmed up


def _timed(case: Case, model: nn.Module, scheduler: Any, seed: int) -> _Run:
    given = case.given([seed])
    wait(case.device)
    began = time.perf_counter()
    made = sample(model, scheduler, given, case.steps)
    wait(case.device)
    seconds = time.perf_counter() - began
    report = getattr(scheduler, "report", None)
    if report is None:
        return _Run(made, seconds, case.steps, 0, case.steps)
    return _Run(made, seconds, report.rounds, report.guided_rounds, report.evaluations)


def _row(case: Case, rule: str, way: str, runs: list[_Run], sequential: list[_Run]) -> Row:
    errors = [relative_error(ours.sample, theirs.sample) for ours, theirs in zip(runs, sequential, strict=True)]
    return Row(
        case=case.name,
        steps=case.steps,
        rule=rule,
        way=way,
        seeds=len(runs),
        rounds=mean(run.rounds for run in runs),
        guided_rounds=mean(run.guided_rounds for run in runs),
        evaluations=mean(run.evaluations for run in runs),
        seconds=mean(run.seconds for run in runs),
        error=mean(errors),
        largest_error=max(errors),
    )


def compared(rows: list[Row]) -> list[dict[str, Any]]:
    """Each way with a PCM against those without, in rounds and in seconds."""
    found = {(row.case, row.steps, row.rule, row.way): row for row in rows}
    entries = []
    for case, steps, rule in dict.fromkeys(key[:3] for key in found):
        for ours, peer, target in _PAIRS:
            row, other = found[case, steps, rule, ours], found[case, steps, rule, peer]
            for unit in ("rounds", "seconds"):
                name = f"{case} N={steps}, {rule}, {ours}"
                bound = target if rule == _PAPER else None
                entries.append(comparison(name, unit, getattr(row, unit), getattr(other, unit), peer, bound))
    return entries
