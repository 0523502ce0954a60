"""Rounds on the arm at moments of episodes that its PCMs' trainings do not see."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measurement import mean
from pcm_cases import FIRST_SEED, Case, Given, Way, sample
from pcm_rounds import RULES
from torch import nn

from forerun.picard.consistency import Consistency
from forerun.picard.window import Acceleration

sys.path.append(str(Path(__file__).parents[1]))  # the examples

from diffusion_policy import HORIZON
from train_arm_pcm import observations

__all__ = ["PAPER", "TRAINED_ON", "Point", "Reference", "held_out", "references", "rounds"]

PAPER = "noise 0.1"  # the papers' own rule, by which they count
TRAINED_ON = 600  # demonstrations that trainings take moments from; those after them are measured on


class Point(NamedTuple):
    """A design in the course of its training: mean rounds over pairs of noise and moment, one sample a run."""

    design: str
    steps: int  # N
    switch: str  # that it was run under
    rule: str
    turn: int  # of the training
    seconds: float  # of one core that the training has taken
    plain: float  # rounds of plain iteration with it
    accelerated: float  # rounds of the default acceleration with it


class Reference(NamedTuple):
    """Mean rounds of a way to sample that needs none of the designs."""

    steps: int
    rule: str
    way: str
    rounds: float


def held_out(steps: int, after: int = TRAINED_ON, episodes: int = 100) -> Case:
    """The arm at moments at which its policy looks at it, mid-episode ones too, of demonstrations after so many."""
    case = Case.of("arm", steps, torch.device("cpu"))
    policy: Any = case.model
    moments = observations(policy, episodes, after)

    def draw(seeds: Sequence[int]) -> Given:
        generators = [torch.Generator().manual_seed(FIRST_SEED + seed) for seed in seeds]
        shape = 1, HORIZON, len(policy.actions.low)
        start = torch.cat([torch.randn(*shape, generator=generator) for generator in generators])
        return Given(start, (moments([FIRST_SEED + seed for seed in seeds])["condition"],))

    return replace(case, draw=draw)


def rounds(case: Case, seeds: range, rule: str, acceleration: Acceleration, pcm: Consistency | None) -> float:
    """Mean rounds of a parallel run, one sample each."""
    return _mean(case, seeds, *case.sampler(Way(acceleration), pcm=pcm, **RULES[rule]))


def references(case: Case, seeds: range) -> list[Reference]:
    """Every way of `pcm_cases.WAYS`: no training at all, the slope without one, and the PCM that is shipped."""
    found = []
    for rule, options in RULES.items():
        found.append(Reference(case.steps, rule, "sequential", float(case.steps)))
        for name, way in case.ways.items():
            found.append(Reference(case.steps, rule, name, _mean(case, seeds, *case.sampler(way, **options))))
    return found


def _mean(case: Case, seeds: range, model: nn.Module, scheduler: Any) -> float:
    """Rounds of a parallel scheduler that is bound to the model."""

    def of(seed: int) -> int:
        sample(model, scheduler, case.given([seed]), case.steps)
        count: int = scheduler.report.rounds
        return count

    return mean(of(seed) for seed in seeds)
