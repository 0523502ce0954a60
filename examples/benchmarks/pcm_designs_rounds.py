"""Rounds on the arm at moments of episodes that its PCMs' trainings do not see."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measurement import mean
from pcm_cases import FIRST_SEED, Case, Given, sample
from pcm_rounds import RULES

from forerun.picard.consistency import Consistency
from forerun.picard.diffusers import parallel

sys.path.append(str(Path(__file__).parents[1]))  # the examples

from diffusion_policy import HORIZON
from train_arm_pcm import observations

__all__ = ["PAPER", "Point", "Reference", "held_out", "measure", "references", "rounds"]

PAPER = "noise 0.1"  # the papers' own rule, by which they count
_TRAINED_ON, _EPISODES = 600, 100  # demonstrations that trainings take moments from; those after them, measured on


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


def held_out(steps: int) -> Case:
    """The arm; noise, and a moment at which its policy looks at the arm: mid-episode ones among them."""
    case = Case.of("arm", steps, torch.device("cpu"))
    policy: Any = case.model
    moments = observations(policy, _EPISODES, after=_TRAINED_ON)

    def draw(seeds: Sequence[int]) -> Given:
        generators = [torch.Generator().manual_seed(FIRST_SEED + seed) for seed in seeds]
        shape = 1, HORIZON, len(policy.actions.low)
        start = torch.cat([torch.randn(*shape, generator=generator) for generator in generators])
        return Given(start, (moments([FIRST_SEED + seed for seed in seeds])["condition"],))

    return Case(case.name, steps, policy, case.scheduler, draw, case.device)


def rounds(case: Case, seeds: range, rule: str, acceleration: str, pcm: Consistency | None) -> float:
    """Mean rounds of a parallel run, one sample each."""
    model = case.fresh()
    options: dict[str, Any] = {"acceleration": acceleration, "pcm": pcm, **RULES[rule]}
    return measure(case, seeds, model, parallel(model, case.scheduler, check_cost=False, **options))


def measure(case: Case, seeds: range, model: torch.nn.Module, scheduler: Any) -> float:
    """Mean rounds of a parallel scheduler, bound to its model."""

    def of(seed: int) -> int:
        sample(model, scheduler, case.given([seed]), case.steps)
        return scheduler.report.rounds

    return mean(of(seed) for seed in seeds)


def references(case: Case, seeds: range) -> list[Reference]:
    """Every way of `pcm_cases.WAYS`: no training at all, the slope without one, and the PCM that is shipped."""
    found = []
    for rule, options in RULES.items():
        found.append(Reference(case.steps, rule, "sequential", float(case.steps)))
        for name, way in case.ways.items():
            found.append(Reference(case.steps, rule, name, measure(case, seeds, *case.sampler(way, **options))))
    return found
