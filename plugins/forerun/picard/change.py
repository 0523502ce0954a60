"""What a Picard Consistency Model changes in its base model: a LoRA (`lora.py`) or all its weights (`weights.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Change", "RowChange"]


class RowChange(Protocol):
    """A change at hand on a module: the module's rows answer with it, each as much as its weight says."""

    @property
    def mixes(self) -> bool:
        """Whether rows with it and rows without share a call at no cost; False: they should be asked apart."""

    def answer(self, ask: Callable[[], Any], weights: Tensor, device: torch.device) -> Any:
        """What `ask`, a call of the module, returns with `weights` (`[rows]`, on the CPU; not all 0) of the change."""

    def remove(self) -> None:
        """Leaves the module as it was before `on`."""


class Change(Protocol):
    """A change, as a file holds it."""

    def on(self, module: nn.Module) -> RowChange:
        """Raises ValueError, and leaves the module alone, if it is not the module that the change is for."""
