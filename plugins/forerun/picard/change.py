"""What a Picard Consistency Model changes in its base model: a LoRA (`lora.py`) or all its weights (`weights.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Change", "RowChange", "base_name"]


class RowChange(Protocol):
    """A change at hand on a module: the module's rows answer with it, each as much as its weight says."""

    @property
    def mixes(self) -> bool:
        """Whether rows with it and rows without share a call at no cost; False: they should be asked apart."""

    def answer(self, ask: Callable[[], Any], weights: Tensor, device: torch.device) -> Any:
        """What `ask`, a call of the module, returns with `weights` (`[rows]`, on the CPU; not all 0) of the change."""


class Change(Protocol):
    """A change, as a file holds it."""

    def on(self, module: nn.Module) -> RowChange:
        """The change at hand; the module itself changes within `answer` only.

        Raises:
            ValueError: It is not the module that the change is for.
        """


def base_name(name: str) -> str:
    """A layer's or parameter's name in the base model, without what torch.compile and peft put around layers."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer"))
