"""Widens a denoiser's call from the one point that the pipeline asks about to all points of a sweep.

The pipeline calls its denoiser with the last accepted sample, stacked for guidance, and one timestep. The call is
replaced by one on `[R, W]` rows: each of the pipeline's R rows at every point's own sample and timestep, its
conditioning repeated. The pipeline's own guidance arithmetic takes the first axis apart into equal parts: however many
they are, each keeps its rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from forerun.picard.change import RowChange
from forerun.picard.cost import seconds
from forerun.picard.ranks import PointRanks

__all__ = ["Asked", "Denoiser", "Family", "Sweep", "time_argument"]


@dataclass(frozen=True)
class Family:
    """How a denoiser class takes its arguments.

    Args:
        unbatched: Arguments whose tensors have no batch axis; they are passed on as they are.
        made_by_denoisers: Arguments that another denoiser of the same step computes (ControlNet's residuals): they come
            widened already and differ from sweep to sweep.
        grouped: Arguments whose tensors have several rows, one after the other, for each of the samples' (frames).
    """

    unbatched: frozenset[str] = frozenset()
    made_by_denoisers: frozenset[str] = frozenset()
    grouped: frozenset[str] = frozenset()


class Sweep(Protocol):
    """What a denoiser needs to know of the sweep that is being asked; the scheduler implements it."""

    @property
    def points(self) -> tuple[int, ...]:
        """W of them, asked."""

    @property
    def timesteps(self) -> Tensor:
        """`[W]` of the points."""

    @property
    def shape(self) -> torch.Size | None:
        """Of a sample, without its batch; None where that is not known yet."""

    @property
    def frontier(self) -> Tensor | None:
        """`[B, ...]` what the pipeline gives the model: the last accepted sample, scaled; None: not known yet."""

    @property
    def frontier_timestep(self) -> Tensor:
        """`[]` the timestep that the pipeline believes it is at."""

    @property
    def weights(self) -> Sequence[float]:
        """Of the Picard Consistency Model in each point's answer; none: the model's own everywhere."""

    @property
    def measure(self) -> Callable[[float, float], None] | None:
        """To be told the seconds of one point and of the whole call."""

    def spread(self, sample: Tensor, points: list[int]) -> Tensor:
        """`[R, len(points), ...]` what the model is to be given, for the pipeline's `[R, ...]`."""


@dataclass(frozen=True)
class Asked:
    """What a sweep asks a model, for those who train it."""

    call: int  # which of the pipeline's calls for one step
    points: tuple[int, ...]
    inputs: Tensor  # [R, W, ...] samples as the model is given them


@dataclass
class Denoiser:
    """Stands before a module's `forward`; does nothing while `sweep()` is None."""

    name: str
    signature: inspect.Signature
    family: Family
    sweep: Callable[[], Sweep | None]
    max_points: int | None = None
    ranks: PointRanks | None = None
    change: RowChange | None = None  # the Picard Consistency Model's
    tap: Callable[[Asked], None] | None = None  # is told of every part of a widened call
    _run: _RunMemory = field(default_factory=lambda: _RunMemory())

    def begin_run(self) -> None:
        """Forgets what the last run's calls looked like; the next call is a run's first, for one point."""
        self._run = _RunMemory(first=True)

    def end_run(self) -> None:
        """Lets go of a run's conditioning and samples."""
        self._run = _RunMemory()

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        sweep = self.sweep()
        if sweep is None and not self._run.first:
            return forward(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        call = None if sweep is None else _Call(self, bound, sweep)
        if call is not None and not call.check():
            return forward(*args, **kwargs)
        _check_conditioning(self, bound, sweep)
        if sweep is None or call is None:
            return forward(*args, **kwargs)
        points = list(range(len(sweep.points)))
        mine = points if self.ranks is None else self.ranks.share(points)
        parts = (partial(self._answer, forward, *part) for part in call.parts(mine, self.max_points))
        if self.tap is not None:
            self.tap(call.asked(mine, self._run.call))
        if sweep.measure is None:
            outputs = [part() for part in parts]
        else:
            single = partial(self._answer, forward, *next(call.parts(mine[:1], None)))
            outputs = _measured(single, parts, sweep.measure, call.device)
        leaves, structure = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
        whole = [call.join(list(leaf), len(mine)) for leaf in zip(*leaves, strict=True)]
        return pytree.tree_unflatten(whole, structure[0])

    def _answer(self, forward: Callable[..., Any], bound: inspect.BoundArguments, weights: Tensor | None) -> Any:
        """A widened call's output; `weights` are its rows' of the Picard Consistency Model."""
        ask = partial(forward, *bound.args, **bound.kwargs)
        if weights is None or self.change is None:
            return ask()
        sample: Tensor = next(iter(bound.arguments.values()))
        return self.change.answer(ask, weights, sample.device)


def _measured(
    single: Callable[[], Any],
    parts: Iterator[Callable[[], Any]],
    measure: Callable[[float, float], None],
    device: torch.device,
) -> list[Any]:
    """The parts' outputs; tells what they and a call for a single point cost."""
    single()  # not timed: a shape's first call may compile
    one = seconds(single, device)[1]
    outputs, whole = seconds(lambda: [part() for part in parts], device)
    measure(one, whole)
    return list(outputs)


@dataclass
class _RunMemory:
    """What the first call of a run showed; later calls have to agree."""

    first: bool = False  # a run has begun and has not swept yet: its calls are the pipeline's own
    clock: Callable[[Tensor], Tensor] | None = None
    checked: bool = False
    sweep: Sweep | None = None
    call: int = -1
    conditioning: dict[tuple[int, str, int], tuple[Tensor, int | None]] = field(default_factory=dict)


class _Call:
    """One call of the pipeline, taken apart."""

    def __init__(self, denoiser: Denoiser, bound: inspect.BoundArguments, sweep: Sweep) -> None:
        self._denoiser = denoiser
        self._bound = bound
        self._sweep = sweep
        names = list(denoiser.signature.parameters)
        self._sample_name = names[0]
        self._time_name = time_argument(denoiser.name, names)
        self._sample: Tensor = bound.arguments[self._sample_name]
        self._time = bound.arguments[self._time_name]
        self._rows = self._sample.shape[0]
        self._shape = self._sample.shape[1:] if sweep.shape is None else sweep.shape
        self._axis = self._concatenated_axis()

    @property
    def device(self) -> torch.device:
        return self._sample.device

    def check(self) -> bool:
        """Refuses a pipeline that feeds something else than the last accepted sample.

        False for a call at the run's start that is not the run's own: it is not to be widened.
        """
        memory, sweep = self._denoiser._run, self._sweep
        if memory.clock is None:
            clock = _clock(self._time, sweep.frontier_timestep)
            if clock is None and sweep.frontier is None:
                return False
            if clock is None:
                raise ValueError(
                    f"{self._denoiser.name} was called with timestep "
                    f"{torch.as_tensor(self._time).flatten()[:4].tolist()} where the scheduler's is "
                    f"{float(sweep.frontier_timestep)}: the pipeline computes it in a way that parallel sampling does "
                    "not know; run it with scheduler.detach()"
                )
            memory.clock = clock
        if sweep.frontier is not None:
            self._check_rows(len(sweep.frontier))
            if not memory.checked:
                memory.checked = True
                self._check_sample(sweep.frontier)
        return True

    def parts(self, points: list[int], most: int | None) -> Iterator[tuple[inspect.BoundArguments, Tensor | None]]:
        """The widened call, in parts of at most `most` points, each with its rows' weights (None: all are 0)."""
        for run in self._alike(points):
            for start in range(0, len(run), most or len(run)):
                part = run[start : start + (most or len(run))]
                yield self._widened(part), self._weights(part)

    def asked(self, points: list[int], call: int) -> Asked:
        """What the widened call asks at some of the sweep's points."""
        inputs = self._samples(points).unflatten(0, (self._rows, len(points)))
        return Asked(call, tuple(self._sweep.points[point] for point in points), inputs)

    def join(self, outputs: list[Any], points: int) -> Any:
        """One output for all points from the parts' outputs, for `points` points in all (and the other ranks')."""
        if not isinstance(outputs[0], Tensor):
            return outputs[0]
        joined = torch.cat([output.unflatten(0, (self._rows, -1)) for output in outputs], 1)
        joined = joined.unflatten(1, (points, -1))  # [R, W, rows of each, ...]
        if self._denoiser.ranks is not None:
            joined = self._denoiser.ranks.gather(joined.transpose(0, 1), len(self._sweep.points)).transpose(0, 1)
        return joined.flatten(0, 2)

    def _check_rows(self, batch: int) -> None:
        if self._rows % batch:
            raise ValueError(
                f"{self._denoiser.name} was called with {self._rows} rows for a batch of {batch}: "
                "the pipeline changes the batch between steps; run it with scheduler.detach()"
            )

    def _check_sample(self, frontier: Tensor) -> None:
        given = self._sample if self._axis is None else self._sample.narrow(self._axis, 0, self._channels())
        expected = frontier.to(given.dtype)
        expected = expected.repeat(self._rows // len(expected), *(1,) * (expected.ndim - 1))
        rounding = 4 * torch.finfo(given.dtype).eps  # of a cast between the step and the model
        if not torch.allclose(given.float(), expected.float(), rtol=max(1e-3, rounding), atol=1e-5):
            raise ValueError(
                f"{self._denoiser.name} was not called with the scheduler's last sample: the pipeline edits "
                "latents between steps, which parallel sampling cannot serve; run it with scheduler.detach()"
            )

    def _widened(self, points: list[int]) -> inspect.BoundArguments:
        bound = inspect.BoundArguments(self._bound.signature, dict(self._bound.arguments))
        for name, value in self._bound.arguments.items():
            if name not in self._denoiser.family.unbatched:
                widen = self._select if name in self._denoiser.family.made_by_denoisers else self._repeat
                bound.arguments[name] = pytree.tree_map_only(Tensor, partial(widen, name, points), value)
        bound.arguments[self._sample_name] = self._samples(points)
        bound.arguments[self._time_name] = self._times(points)
        return bound

    def _samples(self, points: list[int]) -> Tensor:
        latents = self._sample if self._axis is None else self._sample.narrow(self._axis, 0, self._channels())
        rows = self._sweep.spread(latents, points).to(self._sample.dtype).flatten(0, 1)
        if self._axis is None:
            return rows
        others = self._sample.narrow(self._axis, self._channels(), self._sample.shape[self._axis] - self._channels())
        return torch.cat([rows, self._repeat(self._sample_name, points, others)], self._axis)

    def _alike(self, points: list[int]) -> list[list[int]]:
        """Neighbouring points for one call: all, or those that the changed model answers apart from the others."""
        change, weights = self._denoiser.change, self._sweep.weights
        if change is None or change.mixes or not weights:
            return [points]
        return [list(run) for _, run in groupby(points, lambda point: weights[point] > 0)]

    def _weights(self, points: list[int]) -> Tensor | None:
        weights = [self._sweep.weights[point] for point in points] if self._sweep.weights else []
        return torch.tensor(weights).repeat(self._rows) if any(weights) else None

    def _times(self, points: list[int]) -> Tensor:
        clock = self._denoiser._run.clock
        assert clock is not None
        dtype = self._time.dtype if isinstance(self._time, Tensor) else self._sweep.timesteps.dtype
        times = clock(self._sweep.timesteps[points].to(dtype)).to(self._sample.device)
        return times.repeat(self._rows)

    def _repeat(self, name: str, points: list[int], tensor: Tensor) -> Tensor:
        """Conditioning `[rows, ...]` for every point; what has no batch axis stays."""
        if tensor.ndim == 0 or tensor.shape[0] == 1 != self._rows:
            return tensor
        grouped = name in self._denoiser.family.grouped and tensor.shape[0] % self._rows == 0
        if tensor.shape[0] != self._rows and not grouped:
            raise ValueError(
                f"{self._denoiser.name}'s argument {name!r} has {tensor.shape[0]} rows where the samples have "
                f"{self._rows}; if it has no batch axis, name it: from_pipe(pipe, unbatched=({name!r},))"
            )
        by_row: Tensor = tensor.unflatten(0, (self._rows, 1, -1))
        return by_row.expand(self._rows, len(points), *by_row.shape[2:]).flatten(0, 2)

    def _select(self, name: str, points: list[int], tensor: Tensor) -> Tensor:
        """The points' part of what another denoiser computed for the whole window."""
        if tensor.shape[0] == self._rows:
            return self._repeat(name, points, tensor)
        by_row: Tensor = tensor.unflatten(0, (self._rows, -1))
        return by_row[:, points].flatten(0, 1)

    def _channels(self) -> int:
        assert self._axis is not None
        return self._shape[self._axis - 1]

    def _concatenated_axis(self) -> int | None:
        """The axis along which the pipeline appends conditioning to the sample; None if it does not."""
        given, expected = self._sample.shape, torch.Size([self._rows, *self._shape])
        longer = [axis for axis in range(1, len(given)) if axis < len(expected) and given[axis] != expected[axis]]
        if len(given) != len(expected) or len(longer) > 1 or any(given[axis] < expected[axis] for axis in longer):
            raise ValueError(
                f"{self._denoiser.name} was called with a sample {list(given)} where the scheduler's is "
                f"{list(expected)}: the pipeline reshapes latents, which parallel sampling cannot follow; run it with "
                "scheduler.detach()"
            )
        return longer[0] if longer else None


def _check_conditioning(denoiser: Denoiser, bound: inspect.BoundArguments, sweep: Sweep | None) -> None:
    """Refuses conditioning that is not that of the run's first call."""
    memory = denoiser._run
    if memory.sweep is not sweep:
        memory.sweep, memory.call, memory.first = sweep, 0, False
    else:
        memory.call += 1  # guidance by two calls (Wan, FLUX's true guidance): each has a conditioning of its own
    for name, index, tensor in _conditioning(denoiser, bound):
        version = None if tensor.is_inference() else tensor._version
        known, known_version = memory.conditioning.setdefault((memory.call, name, index), (tensor, version))
        if known is tensor:
            same = known_version == version
        else:
            same = known.shape == tensor.shape and torch.equal(known, tensor)
        if not same:
            raise ValueError(
                f"{denoiser.name}'s argument {name!r} changed between sweeps (by a callback?): a sweep evaluates all "
                "points with one conditioning; run it with scheduler.detach()"
            )


def _conditioning(denoiser: Denoiser, bound: inspect.BoundArguments) -> Iterator[tuple[str, int, Tensor]]:
    names = list(denoiser.signature.parameters)
    skipped = {names[0], time_argument(denoiser.name, names), *denoiser.family.made_by_denoisers}
    for name, value in bound.arguments.items():
        if name not in skipped:
            for index, leaf in enumerate(pytree.tree_leaves(value)):
                if isinstance(leaf, Tensor):
                    yield name, index, leaf


def time_argument(denoiser: str, names: list[str]) -> str:
    """The name of a denoiser's timestep among those of its arguments."""
    for name in ("timestep", "timesteps", "t"):
        if name in names:
            return name
    raise TypeError(f"{denoiser}.forward has no argument named timestep, timesteps or t; it has {', '.join(names)}")


def _clock(given: Any, timestep: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How the pipeline turns a scheduler's timestep into the model's, told from one of them; None where it is not."""
    given = torch.as_tensor(given).cpu()
    clocks: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t,
        lambda t: t / 1000,
        lambda t: 1000 - t,
        lambda t: 1 - t / 1000,
    )
    for clock in clocks:
        if torch.equal(clock(timestep.to(given.dtype)).expand_as(given), given):
            return clock
    return None
