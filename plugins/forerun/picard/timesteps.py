"""A scheduler's `timesteps` whose iteration is the sweep loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["SweepTimesteps"]

Turns = Callable[[Tensor], Iterator[Tensor]]


class SweepTimesteps(Tensor):
    """The nominal timesteps `[T]`; a loop over them turns once per sweep and ends when the run has converged.

    Everything but iteration is the plain tensor's: length, arithmetic, comparison. A contiguous slice (image to image
    starts later, a refiner's base ends earlier) iterates over its own part.
    """

    _turns: Turns

    @staticmethod
    def of(timesteps: Tensor, turns: Turns) -> SweepTimesteps:
        made = timesteps.as_subclass(SweepTimesteps)
        made._turns = turns
        return made

    @property
    def plain(self) -> Tensor:
        return self.as_subclass(Tensor)

    def __iter__(self) -> Iterator[Tensor]:
        turns = getattr(self, "_turns", None)
        return iter(self.plain) if turns is None else turns(self.plain)

    def __getitem__(self, index: Any) -> Tensor:
        part = self.plain[index]
        if isinstance(index, slice) and index.step in (None, 1) and len(part):
            return SweepTimesteps.of(part, self._turns)
        return part

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(_plain(arg) for arg in args), **{key: _plain(arg) for key, arg in (kwargs or {}).items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain.clone()  # a copied scheduler has turns of its own once its timesteps are set

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, SweepTimesteps):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return value
