"""A model fine-tuned in all its parameters, in its base's place for some rows of a call.

Its answers are blended with the base model's, row by row: rows of weight 1 are its own, others cost both models' calls.
The module is never copied: its parameters are exchanged for the fine-tuned ones and back, so hooks, adapters and
compiled code of the user's stay what they are.

Source: arXiv 2503.19731, eq. 11 (model switching between outputs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["RowWeights", "Weights"]


@dataclass(frozen=True)
class Weights:
    """All parameters of a fine-tuned model.

    Args:
        values: By the parameter's name in the module.
        config: The module's config as JSON, by which diffusers makes it; "" where it has none.
    """

    values: Mapping[str, Tensor]
    config: str = ""

    def on(self, module: nn.Module) -> RowWeights:
        """Ready to take the place of the module's parameters, which stay as they are until then.

        Raises:
            ValueError: The module has other parameters.
        """
        places: dict[str, list[tuple[nn.Module, str]]] = {}
        owners = dict(module.named_modules())
        for name, _ in module.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            if "lora_" not in name:  # the user's own
                places[name.replace(".base_layer", "")] = [(owners[owner], leaf)]
        kind, wrong = type(module).__name__, sorted(self.values.keys() - places.keys())
        if wrong:
            raise ValueError(f"{kind} has no parameter {', '.join(wrong[:3])} that the fine-tuned model changes")
        for name, value in self.values.items():
            owner_module, leaf = places[name][0]
            shape = getattr(owner_module, leaf).shape
            if shape != value.shape:
                raise ValueError(f"the fine-tuned {name} is {list(value.shape)}, that of {kind} is {list(shape)}")
        return RowWeights([(*places[name][0], value) for name, value in self.values.items()])


class RowWeights:
    """Fine-tuned parameters that can take those of a module's place; outside of calls they do nothing.

    Args:
        entries: A part of the module, the name of a parameter in it, and the tensor to put there. A tensor that is an
            `nn.Parameter` is put there itself: gradients come to it.
    """

    mixes = False

    def __init__(self, entries: list[tuple[nn.Module, str, Tensor]]) -> None:
        self._entries = entries

    def answer(self, ask: Callable[[], Any], weights: Tensor, device: torch.device) -> Any:
        """What `ask` returns, its rows blended: `weights` `[rows]` of the fine-tuned model's answer, on the CPU."""
        with self.replaced():
            theirs = ask()
        if bool((weights == 1).all()):
            return theirs
        ours, moved = ask(), weights.to(device)
        return pytree.tree_map(lambda one, other: _blended(one, other, moved), ours, theirs)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Within, the module has the fine-tuned parameters."""
        before = [getattr(owner, name) for owner, name, _ in self._entries]
        for index, ((owner, name, value), own) in enumerate(zip(self._entries, before, strict=True)):
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value.to(own.device, own.dtype), requires_grad=False)
                self._entries[index] = (owner, name, value)  # moved once
        try:
            for owner, name, value in self._entries:
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name, _), own in zip(self._entries, before, strict=True):
                setattr(owner, name, own)

    def remove(self) -> None:
        """Lets go of the parameters."""
        self._entries = []


def _blended(one: Any, other: Any, weights: Tensor) -> Any:
    if not isinstance(one, Tensor) or one.ndim == 0 or not one.is_floating_point() or len(one) % len(weights):
        return one
    rows = weights.repeat_interleave(len(one) // len(weights)).to(one.dtype).reshape(-1, *(1,) * (one.ndim - 1))
    return torch.where(rows == 0, one, torch.lerp(one, other, rows))
