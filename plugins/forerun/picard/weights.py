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

from forerun.picard.change import base_name

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
        named = {
            base_name(name): parameter
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if "lora_" not in name  # the user's own
        }
        kind = type(getattr(module, "_orig_mod", module)).__name__
        wrong = sorted(self.values.keys() - named.keys())
        if wrong:
            raise ValueError(f"{kind} has no parameter {', '.join(wrong[:3])} that the fine-tuned model changes")
        for name, value in self.values.items():
            shape = named[name].shape
            if shape != value.shape:
                raise ValueError(f"the fine-tuned {name} is {list(value.shape)}, that of {kind} is {list(shape)}")
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # several of a parameter that layers share
        for owner in module.modules():
            for leaf, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(parameter, []).append((owner, leaf))
        return RowWeights([_Exchange(name, value, places[named[name]]) for name, value in self.values.items()])


class RowWeights:
    """Fine-tuned parameters that can take those of a module's place; outside of calls they do nothing."""

    mixes = False

    def __init__(self, exchanges: list[_Exchange]) -> None:
        self._exchanges = exchanges

    def answer(self, ask: Callable[[], Any], weights: Tensor, device: torch.device) -> Any:
        """What `ask` returns, its rows blended: `weights` `[rows]` of the fine-tuned model's answer, on the CPU."""
        with self.replaced():
            theirs = ask()
        if bool((weights == 1).all()):
            return theirs
        ours, moved = ask(), weights.to(device, non_blocking=True)
        return pytree.tree_map(lambda one, other: _blended(one, other, moved), ours, theirs)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Within, the module has the fine-tuned parameters.

        Raises:
            ValueError: A parameter is on no device (offloading layer by layer keeps them elsewhere between calls).
        """
        made = [(exchange.places, exchange.own, exchange.value()) for exchange in self._exchanges]
        try:
            for places, _, value in made:
                _put(places, value)
            yield
        finally:
            for places, own, _ in made:
                _put(places, own)


class _Exchange:
    """A parameter of the module, everywhere it stands, and the value that takes its place.

    Args:
        name: Of the parameter.
        tuned: The value. One that is trained keeps its own precision; gradients come to it.
        places: A part of the module, and the parameter's name there.
    """

    def __init__(self, name: str, tuned: Tensor, places: list[tuple[nn.Module, str]]) -> None:
        self._name, self._tuned, self.places = name, tuned, places
        self._placed: nn.Parameter | None = None

    @property
    def own(self) -> nn.Parameter:
        """The module's."""
        owner, leaf = self.places[0]
        found: nn.Parameter | None = owner._parameters[leaf]
        assert found is not None
        return found

    def value(self) -> Tensor:
        """The fine-tuned one, where the module's own is and in its precision."""
        own = self.own
        if own.is_meta:
            raise ValueError(
                f"{self._name} is on no device between the model's calls, as under sequential offloading: a Picard "
                "Consistency Model that is a whole model cannot take its place. Use enable_model_cpu_offload(), or one "
                "that is a LoRA"
            )
        if self._tuned.requires_grad:
            return self._tuned.to(own.device, own.dtype)
        placed = self._placed
        if placed is None or (placed.device, placed.dtype) != (own.device, own.dtype):  # moved once, or with the module
            self._placed = placed = nn.Parameter(self._tuned.to(own.device, own.dtype), requires_grad=False)
        return placed


def _put(places: list[tuple[Any, str]], value: Tensor) -> None:
    """Past `setattr`, which takes nothing but an `nn.Parameter`: in training it may be a cast of one."""
    for owner, leaf in places:
        owner._parameters[leaf] = value


def _blended(one: Any, other: Any, weights: Tensor) -> Any:
    if not isinstance(one, Tensor) or one.ndim == 0 or not one.is_floating_point() or len(one) % len(weights):
        return one
    rows = weights.repeat_interleave(len(one) // len(weights)).to(one.dtype).reshape(-1, *(1,) * (one.ndim - 1))
    return torch.where(rows == 0, one, torch.lerp(one, other, rows))
