"""The random draws of a sequential run, kept so that every sweep repeats them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

__all__ = ["Draws"]


class Draws:
    """Generators that can be set to where the sequential run would have them at any point.

    Args:
        generator: What the caller gave the base scheduler: one generator, one per sample, or None for torch's own.
        device: Where torch's own generator is taken from.
    """

    def __init__(self, generator: Generator | Sequence[Generator] | None, device: torch.device) -> None:
        given = [_default_generator(device)] if generator is None else generator
        self._sources = [given] if isinstance(given, Generator) else list(given)
        self._scratch = [Generator(device=source.device) for source in self._sources]
        self._as_list = isinstance(generator, Sequence)
        self._states: list[list[Tensor]] = [[source.get_state() for source in self._sources]]  # per point reached

    def at(self, point: int) -> Generator | list[Generator]:
        """What to draw from at `point`, in the caller's own form; the draws of the points before are known by then."""
        for scratch, state in zip(self._scratch, self._states[point], strict=True):
            scratch.set_state(state)
        return self._scratch if self._as_list else self._scratch[0]

    def drawn(self, point: int) -> None:
        """Says that `point` has drawn what it needs: where it left off is where the next point begins."""
        if len(self._states) == point + 1:
            self._states.append([scratch.get_state() for scratch in self._scratch])

    def hand_back(self) -> None:
        """Leaves the caller's generators where the sequential run would have left them."""
        for source, state in zip(self._sources, self._states[-1], strict=True):
            source.set_state(state)


def _default_generator(device: torch.device) -> Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
