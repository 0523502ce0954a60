"""How good a sample is after so many sweeps and no more; none has to be accepted.

That is `exact=False, sweeps=k`, for every k at once: a run of k sweeps is the beginning of one of k + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from frechet import DigitFeatures
from measurement import comparison, mean, relative_error
from pcm_cases import FIRST_SEED, WAYS, Case, Given, Way, answer, sample
from torch import Tensor, nn

from forerun.picard.base_solver import SchedulerSolver, noise_levels
from forerun.picard.change import RowChange
from forerun.picard.draws import Draws
from forerun.picard.stopping import Stopping
from forerun.picard.switch import Guide
from forerun.picard.window import Window

__all__ = ["Row", "check", "compared", "measure"]

_BATCH = 8  # samples of a run
_WITHOUT_SWITCH = {name: way for name, way in WAYS.items() if name != "slope only + acceleration" and not way.fitted}
_SWEEPS_COMPARED = 2
# Of plain Picard's distance to the PCM's; arXiv 2503.19731 has an FID of 257.8 against 67.7 after two sweeps.
_TARGET = 3.0


class Row(NamedTuple):
    """One case, one way to sample, after so many sweeps; over all samples."""

    case: str
    steps: int  # N
    way: str
    sweeps: int  # k; N for the sequential run
    samples: int
    distance: float | None  # Fréchet, to the real digits; None for the arm
    error: float  # relative L2 distance to the sequential sample, mean


def measure(case: Case, samples: int, sweeps: int, features: DigitFeatures | None) -> list[Row]:
    """Every way after 1 to `sweeps` sweeps, and the sequential run, from the same noise."""
    batches = [
        range(FIRST_SEED + first, FIRST_SEED + min(first + _BATCH, samples)) for first in range(0, samples, _BATCH)
    ]
    sequential = torch.cat([sample(case.model, case.scheduler, case.given(seeds), case.steps) for seeds in batches])
    rows = [_row(case, "sequential", case.steps, sequential, sequential, features)]
    for name, way in _WITHOUT_SWITCH.items():
        made = torch.cat([after_each_sweep(case, way, case.given(seeds), sweeps) for seeds in batches], 1)
        rows += [_row(case, name, k, ours, sequential, features) for k, ours in enumerate(made, 1)]
    return rows


def _row(case: Case, way: str, sweeps: int, made: Tensor, sequential: Tensor, features: DigitFeatures | None) -> Row:
    error = mean(relative_error(ours, theirs) for ours, theirs in zip(made, sequential, strict=True))
    distance = None if features is None else features.distance(made)
    return Row(case.name, case.steps, way, sweeps, len(made), distance, error)


@torch.no_grad()
def after_each_sweep(case: Case, way: Way, given: Given, sweeps: int) -> Tensor:
    """`[sweeps, B, ...]` the trajectory's end after each of a run's sweeps."""
    window, guided = _begun(case, way, given.start), case.pcm(way)
    model = case.fresh()
    change = None if guided is None else guided.change.on(model)
    ends: list[Tensor] = []
    while len(ends) < sweeps:
        if not window.done:
            window.update(_answers(model, change, window, case.scheduler.timesteps, given.condition))
        ends.append(window.samples[-1])
    return torch.stack(ends)


def _begun(case: Case, way: Way, start: Tensor) -> Window[SchedulerSolver]:
    """As `parallel` begins a run with `exact=False` from noise."""
    case.scheduler.set_timesteps(case.steps)
    levels = noise_levels(case.scheduler, case.scheduler.timesteps)
    assert levels is not None
    assert levels.from_noise
    pcm = case.pcm(way)
    return Window(
        SchedulerSolver(case.scheduler, case.scheduler.timesteps, {}, Draws(None, start.device)),
        start,
        case.steps,
        Stopping(1e-3),
        acceleration=way.acceleration,
        levels=levels,
        alone=False,
        guide=None if pcm is None else Guide(pcm.card.switch, levels),
    )


def _answers(
    model: nn.Module,
    change: RowChange | None,
    window: Window[SchedulerSolver],
    timesteps: Tensor,
    condition: tuple[Tensor, ...],
) -> Tensor:
    """`[W, B, ...]` for the points that the window asks about."""
    inputs = window.inputs
    points, batch = inputs.shape[:2]
    times = timesteps[list(window.asked)].repeat_interleave(batch).to(inputs.device)
    told = tuple(tensor.repeat(points, *(1,) * (tensor.ndim - 1)) for tensor in condition)
    weights = torch.tensor(window.weights).repeat_interleave(batch)
    ask = partial(answer, model, inputs.flatten(0, 1), times, told)
    plain = change is None or not weights.any()
    return (ask() if plain else change.answer(ask, weights, inputs.device)).unflatten(0, (points, batch))


def check(case: Case, sweeps: int = 3, seeds: Sequence[int] = range(FIRST_SEED, FIRST_SEED + 4)) -> float:
    """The largest relative difference of `after_each_sweep` to what users call, over all ways.

    Raises:
        RuntimeError: It is more than rounding.
    """
    given, largest = case.given(seeds), 0.0
    for name, way in _WITHOUT_SWITCH.items():
        model, scheduler = case.sampler(way, exact=False, sweeps=sweeps)
        called = sample(model, scheduler, given, case.steps)
        difference = relative_error(after_each_sweep(case, way, given, sweeps)[-1], called)
        largest = max(largest, difference)
        if not difference < 1e-3:
            raise RuntimeError(f"{case}, {name}: {difference:.1e} off exact=False, sweeps={sweeps}")
    return largest


def compared(rows: list[Row]) -> list[dict[str, Any]]:
    """The PCM against plain Picard iteration after two sweeps."""
    found = {(row.case, row.steps, row.way): row for row in rows if row.sweeps == _SWEEPS_COMPARED}
    entries = []
    for case, steps in dict.fromkeys(key[:2] for key in found):
        for ours, peer in (("PCM", "plain"), ("PCM", "slope only"), ("PCM + acceleration", "accelerated")):
            row, other = found[case, steps, ours], found[case, steps, peer]
            for unit, target in (("distance", _TARGET), ("error", None)):
                if getattr(row, unit) is not None:
                    name = f"{case} N={steps}, {_SWEEPS_COMPARED} sweeps, {ours}"
                    bound = target if (ours, peer) == ("PCM", "plain") else None
                    entries.append(comparison(name, unit, getattr(row, unit), getattr(other, unit), peer, bound))
    return entries
