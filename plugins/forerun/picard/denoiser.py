"""Widens a denoiser's call from the one point that the pipeline asks about to all points of a sweep.

The pipeline calls its denoiser with the last accepted sample, stacked G times for guidance, and one timestep. The call
is replaced by one on `[G, W, B]` rows: every point's own sample and timestep, the conditioning repeated. What comes
back keeps that order, so that the pipeline's own guidance arithmetic (chunks of the first axis) works on the window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from forerun.picard.cost import seconds
from forerun.picard.ranks import PointRanks

__all__ = ["Denoiser", "Family", "Sweep"]


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

    points: tuple[int, ...]  # asked
    inputs: Tensor  # [W, B, ...] what the model is to be given
    frontier: Tensor  # [B, ...] what the pipeline gives the model: the last accepted sample, scaled
    frontier_timestep: Tensor  # [] the timestep that the pipeline believes it is at
    timesteps: Tensor  # [W] of the points
    mirrored: bool  # each sample stands twice in the batch, in two halves
    measure: Callable[[float, float], None] | None  # to be told the seconds of one point and of the whole call


@dataclass
class Denoiser:
    """Stands before a module's `forward`; does nothing while `sweep()` is None."""

    name: str
    signature: inspect.Signature
    family: Family
    sweep: Callable[[], Sweep | None]
    max_points: int | None = None
    ranks: PointRanks | None = None
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
        _check_conditioning(self, bound, sweep)
        if sweep is None:
            return forward(*args, **kwargs)
        call = _Call(self, bound, sweep)
        call.check()
        points = list(range(len(sweep.points)))
        mine = points if self.ranks is None else self.ranks.share(points)
        parts = call.parts(mine, self.max_points)
        if sweep.measure is None:
            outputs = [forward(*part.args, **part.kwargs) for part in parts]
        else:
            outputs = _measured(forward, next(call.parts(mine[:1], None)), parts, sweep)
        leaves, structure = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
        whole = [call.join(list(leaf)) for leaf in zip(*leaves, strict=True)]
        return pytree.tree_unflatten(whole, structure[0])


def _measured(
    forward: Callable[..., Any], single: inspect.BoundArguments, parts: Iterator[inspect.BoundArguments], sweep: Sweep
) -> list[Any]:
    """The parts' outputs; tells the sweep what they and a call for a single point cost."""
    device = sweep.inputs.device
    forward(*single.args, **single.kwargs)  # not timed: a shape's first call may compile
    one = seconds(lambda: forward(*single.args, **single.kwargs), device)[1]
    outputs, whole = seconds(lambda: [forward(*part.args, **part.kwargs) for part in parts], device)
    assert sweep.measure is not None
    sweep.measure(one, whole)
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
        self._time_name = _time_argument(denoiser.name, names)
        self._sample: Tensor = bound.arguments[self._sample_name]
        self._time = bound.arguments[self._time_name]
        batch = sweep.frontier.shape[0]
        if self._sample.shape[0] % batch:
            raise ValueError(
                f"{denoiser.name} was called with {self._sample.shape[0]} rows for a batch of {batch}: "
                "the pipeline changes the batch between steps; run it with scheduler.detach()"
            )
        self._rows = self._sample.shape[0]
        # Rows of the model's batch are [copies, W, each]; a mirrored batch is one copy more of half as many samples.
        self._copies = self._rows // batch * (2 if sweep.mirrored else 1)
        self._each = batch // (2 if sweep.mirrored else 1)
        self._axis = self._concatenated_axis()

    def check(self) -> None:
        """Refuses a pipeline that feeds something else than the last accepted sample."""
        memory = self._denoiser._run
        if memory.clock is None:
            memory.clock = _clock(self._denoiser.name, self._time, self._sweep.frontier_timestep)
        if not memory.checked:
            memory.checked = True
            given = self._sample if self._axis is None else self._sample.narrow(self._axis, 0, self._channels())
            expected = self._sweep.frontier.to(given.dtype)
            expected = expected.repeat(self._rows // len(expected), *(1,) * (expected.ndim - 1))
            rounding = 4 * torch.finfo(given.dtype).eps  # of a cast between the step and the model
            if not torch.allclose(given.float(), expected.float(), rtol=max(1e-3, rounding), atol=1e-5):
                raise ValueError(
                    f"{self._denoiser.name} was not called with the scheduler's last sample: the pipeline edits "
                    "latents between steps, which parallel sampling cannot serve; run it with scheduler.detach()"
                )

    def parts(self, points: list[int], most: int | None) -> Iterator[inspect.BoundArguments]:
        """The widened call, in parts of at most `most` points."""
        for start in range(0, len(points), most or len(points)):
            yield self._widened(points[start : start + (most or len(points))])

    def join(self, outputs: list[Any]) -> Any:
        """One output for all points from the parts' outputs (and the other ranks')."""
        if not isinstance(outputs[0], Tensor):
            return outputs[0]
        by_point = [output.unflatten(0, (self._copies, -1, self._each)) for output in outputs]
        joined = torch.cat(by_point, 1)  # [copies, W, each, ...]
        if self._denoiser.ranks is not None:
            joined = self._denoiser.ranks.gather(joined.transpose(0, 1), len(self._sweep.points)).transpose(0, 1)
        return joined.flatten(0, 2)

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
        inputs = self._sweep.inputs[points].to(self._sample.dtype)  # [W, B, ...]
        if self._sweep.mirrored:
            inputs = inputs[:, : self._each]
        rows = inputs[None].expand(self._copies, *inputs.shape).flatten(0, 2)
        if self._axis is None:
            return rows
        others = self._sample.narrow(self._axis, self._channels(), self._sample.shape[self._axis] - self._channels())
        return torch.cat([rows, self._repeat(self._sample_name, points, others)], self._axis)

    def _times(self, points: list[int]) -> Tensor:
        clock = self._denoiser._run.clock
        assert clock is not None
        dtype = self._time.dtype if isinstance(self._time, Tensor) else self._sweep.timesteps.dtype
        times = clock(self._sweep.timesteps[points].to(dtype)).to(self._sample.device)
        return times[None, :, None].expand(self._copies, len(points), self._each).flatten()

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
        by_copy: Tensor = tensor.unflatten(0, (self._copies, 1, -1))
        return by_copy.expand(self._copies, len(points), *by_copy.shape[2:]).flatten(0, 2)

    def _select(self, name: str, points: list[int], tensor: Tensor) -> Tensor:
        """The points' part of what another denoiser computed for the whole window."""
        if tensor.shape[0] == self._copies * self._each:
            return self._repeat(name, points, tensor)
        by_copy: Tensor = tensor.unflatten(0, (self._copies, -1, self._each))
        return by_copy[:, points].flatten(0, 2)

    def _channels(self) -> int:
        assert self._axis is not None
        return self._sweep.inputs.shape[self._axis + 1]

    def _concatenated_axis(self) -> int | None:
        """The axis along which the pipeline appends conditioning to the sample; None if it does not."""
        given, expected = self._sample.shape, self._sweep.inputs.shape[1:]
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
    skipped = {names[0], _time_argument(denoiser.name, names), *denoiser.family.made_by_denoisers}
    for name, value in bound.arguments.items():
        if name not in skipped:
            for index, leaf in enumerate(pytree.tree_leaves(value)):
                if isinstance(leaf, Tensor):
                    yield name, index, leaf


def _time_argument(denoiser: str, names: list[str]) -> str:
    for name in ("timestep", "timesteps", "t"):
        if name in names:
            return name
    raise TypeError(f"{denoiser}.forward has no argument named timestep, timesteps or t; it has {', '.join(names)}")


def _clock(denoiser: str, given: Any, timestep: Tensor) -> Callable[[Tensor], Tensor]:
    """How the pipeline turns a scheduler's timestep into the model's, told from one of them."""
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
    raise ValueError(
        f"{denoiser} was called with timestep {given.flatten()[:4].tolist()} where the scheduler's is "
        f"{float(timestep)}: the pipeline computes it in a way that parallel sampling does not know; run it with "
        "scheduler.detach()"
    )
