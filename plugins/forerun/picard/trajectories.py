"""Sequential trajectories as the model sees them: what it was given at every step, and what it answered.

They are what a Picard Consistency Model is trained on. Each is kept in a file of its own, so that collecting many can
be ended and resumed at any time.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from forerun._files import write_whole
from forerun.picard.denoiser import time_argument

__all__ = ["Trajectory", "cached", "first_tensor", "recorded"]

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Trajectory:
    """One model's part of one sequential run: T steps of R rows.

    Args:
        inputs: `[T, R, ...]` samples that the model was given.
        answers: `[T, R, ...]` what it answered.
        times: `[T]` the model's timesteps.
        others: Its other arguments, the same at every step; dicts of tensors, and plain values.
    """

    inputs: Tensor
    answers: Tensor
    times: Tensor
    others: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        leaves, structure = pytree.tree_flatten(dict(self.others))
        tensors = {
            f"others/{index}": leaf.contiguous() for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        }
        plain = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        tensors |= {name: getattr(self, name).contiguous() for name in ("inputs", "answers", "times")}
        write_whole(path, save(tensors, {"plain": json.dumps(plain), "structure": pytree.treespec_dumps(structure)}))

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is broken.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                told = file.metadata()
            inputs, answers, times = (tensors.pop(name) for name in ("inputs", "answers", "times"))
            leaves = {int(index): leaf for index, leaf in json.loads(told["plain"]).items()}
            leaves |= {int(name.removeprefix("others/")): tensor for name, tensor in tensors.items()}
            structure = pytree.treespec_loads(told["structure"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no trajectory: {error}; delete it, and it will be made again") from error
        others = pytree.tree_unflatten([leaves[index] for index in range(len(leaves))], structure)
        return cls(inputs, answers, times, others)


def cached(path: Path, make: Callable[[], list[Trajectory]]) -> list[Trajectory]:
    """The trajectories in a folder; made, and put there, if they are not."""
    if (path / "complete").is_file():
        return [Trajectory.load(file) for file in sorted(path.glob("*.safetensors"))]
    path.mkdir(parents=True, exist_ok=True)
    made = make()
    for index, trajectory in enumerate(made):
        trajectory.save(path / f"{index:02}.safetensors")
    write_whole(path / "complete", b"")
    return made


@contextlib.contextmanager
def recorded(module: nn.Module, signature: inspect.Signature, steps: int) -> Iterator[list[Trajectory]]:
    """Records the sequential run inside; the list holds, after it, a trajectory per call that a step makes.

    Args:
        module: The denoiser.
        signature: What its `forward` takes.
        steps: How many the run has.

    Raises:
        ValueError: An argument of the model changes from step to step, or is of a kind that cannot be kept.
    """
    calls: list[tuple[inspect.BoundArguments, Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((signature.bind(*args, **kwargs), first_tensor(output)))

    made: list[Trajectory] = []
    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield made
    finally:
        handle.remove()
    each = len(calls) // steps
    if not each or len(calls) != each * steps:
        raise ValueError(f"the run called its model {len(calls)} times for {steps} steps: it cannot be recorded")
    made += [_trajectory(calls[slot::each]) for slot in range(each)]


def first_tensor(output: Any) -> Tensor:
    """A model's answer in what its forward returned."""
    found: Tensor = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return found


def _trajectory(calls: list[tuple[inspect.BoundArguments, Tensor]]) -> Trajectory:
    names = list(calls[0][0].signature.parameters)
    sample, time = names[0], time_argument("the model", names)
    others = [{k: v for k, v in bound.arguments.items() if k not in (sample, time)} for bound, _ in calls]
    for later in others[1:]:
        _check_same(others[0], later)
    return Trajectory(
        inputs=torch.stack([bound.arguments[sample].cpu() for bound, _ in calls]),
        answers=torch.stack([answer.detach().cpu() for _, answer in calls]),
        times=torch.stack([torch.as_tensor(bound.arguments[time]).flatten()[0].cpu() for bound, _ in calls]),
        others=pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), _kept(others[0])),
    )


def _kept(arguments: dict[str, Any]) -> dict[str, Any]:
    for keys, leaf in pytree.tree_flatten_with_path(arguments)[0]:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise ValueError(
                f"the model's argument {pytree.keystr(keys)} is a {type(leaf).__name__}, which cannot be kept"
            )
    return arguments


def _check_same(first: dict[str, Any], later: dict[str, Any]) -> None:
    for (keys, one), other in zip(pytree.tree_flatten_with_path(first)[0], pytree.tree_leaves(later), strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        if not same:
            raise ValueError(
                f"the model's argument {pytree.keystr(keys)} changes from step to step: a Picard Consistency Model can "
                "only be trained for a model whose conditioning stays"
            )
