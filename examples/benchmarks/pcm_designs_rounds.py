"""Rounds on the arm, at pairs of noise and moment that no training of its PCMs sees."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measurement import mean
from pcm_cases import Case, Given, Way, sample
from pcm_rounds import RULES
from torch import nn

from forerun.picard.consistency import Consistency
from forerun.picard.window import Acceleration

sys.path.append(str(Path(__file__).parents[1]))  # the examples

from train_arm_pcm import observations

__all__ = ["PAPER", "TRAINED_ON", "Point", "Reference", "cases", "references", "rounds"]

PAPER = "noise 0.1"  # the papers' own rule, by which they count
TRAINED_ON = 600  # demonstrations that trainings take moments from; those after them are measured on


class Point(NamedTuple):
    """A design in the course of its training: mean rounds over pairs of noise and moment, one sample a run."""

    design: str
    steps: int  # N
    switch: str  # that it was run under
    moments: str  # "any" at which the policy looks at the arm, or the "first" of an episode, as `pcm.py` has it
    rule: str
    turn: int  # of the training
    seconds: float  # of one core that the training has taken
    plain: float  # rounds of plain iteration with it
    accelerated: float  # rounds of the default acceleration with it


class Reference(NamedTuple):
    """Mean rounds of a way to sample that needs none of the designs."""

    steps: int  # N
    moments: str
    rule: str
    way: str
    rounds: float


def cases(steps: int, after: int = TRAINED_ON, episodes: int = 100) -> dict[str, Case]:
    """The arm by what its policy sees: "any" moment of so many demonstrations after the first ones, or the "first"."""
    case = Case.of("arm", steps, torch.device("cpu"))
    policy: Any = case.model
    moments = observations(policy, episodes, after)

    def draw(seeds: Sequence[int]) -> Given:
        return case.draw(seeds)._replace(condition=(moments(seeds)["condition"],))

    return {"any": replace(case, draw=draw), "first": case}


def rounds(case: Case, seeds: range, rule: str, acceleration: Acceleration, pcm: Consistency | None) -> float:
    """Mean rounds of a parallel run, one sample each."""
    return _mean(case, seeds, *case.sampler(Way(acceleration), pcm=pcm, **RULES[rule]))


def references(case: Case, moments: str, seeds: range) -> list[Reference]:
    """Every way of `pcm_cases.WAYS`: no training at all, the slope without one, and the PCM that is shipped."""
    found, ways = [], {**case.ways, "plain, fitted": Way("none", fitted=True)}
    for rule in RULES if moments == "any" else (PAPER,):
        found.append(Reference(case.steps, moments, rule, "sequential", float(case.steps)))
        for name, way in ways.items():
            mean_rounds = _mean(case, seeds, *case.sampler(way, **RULES[rule]))
            found.append(Reference(case.steps, moments, rule, name, mean_rounds))
    return found


def _mean(case: Case, seeds: range, model: nn.Module, scheduler: Any) -> float:
    """Rounds of a parallel scheduler that is bound to the model."""

    def of(seed: int) -> int:
        sample(model, scheduler, case.given([seed]), case.steps)
        count: int = scheduler.report.rounds
        return count

    return mean(of(seed) for seed in seeds)
