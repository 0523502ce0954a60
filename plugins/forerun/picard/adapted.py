"""A base model with a change in training on all rows of its calls: a LoRA, or all its parameters."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forerun.picard.change import base_name
from forerun.picard.lora import Lora
from forerun.picard.trajectories import first_tensor
from forerun.picard.weights import Weights

__all__ = ["Adapted", "AdaptedLora", "AdaptedWeights"]


class Adapted(nn.Module, ABC):
    """What is optimised: its parameters are the change's, the base model's are not among them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # in a list: not a part, so that it is neither saved nor averaged

    def forward(self, **arguments: Any) -> Tensor:
        return first_tensor(self._module[0](**arguments))

    @abstractmethod
    def on_all(self, rows: int) -> contextlib.AbstractContextManager[None]:
        """Within, also in a backward pass that computes activations again, all rows have the change."""

    @abstractmethod
    def change(self, values: Mapping[str, Tensor]) -> Lora | Weights:
        """The change with other values (an average, say) in the place of its parameters, by their names."""


class AdaptedLora(Adapted):
    """A LoRA that begins with no change."""

    def __init__(self, module: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__(module)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self._names: dict[str, str] = {}
        for index, (name, layer) in enumerate(_layers(module)):
            shape, key = layer.weight.shape, str(index)
            down = torch.randn(rank, *shape[1:], generator=generator) / layer.weight[0].numel() ** 0.5
            up = torch.zeros(shape[0], rank, *(1,) * (len(shape) - 2))
            self.down[key], self.up[key] = (nn.Parameter(tensor.to(layer.weight.device)) for tensor in (down, up))
            self._names[name] = key
        self._rows = self.change(dict(self.named_parameters())).on(module)

    def on_all(self, rows: int) -> contextlib.AbstractContextManager[None]:
        return self._rows.weighted(torch.ones(rows), next(self.parameters()).device)

    def change(self, values: Mapping[str, Tensor]) -> Lora:
        names = self._names.items()
        return Lora({name: (values[f"down.{key}"], values[f"up.{key}"]) for name, key in names}, 1.0)


class AdaptedWeights(Adapted):
    """A copy of all parameters, in float32.

    Args:
        module: The base model.
        config: Its config as JSON, for `Weights`.
    """

    def __init__(self, module: nn.Module, config: str) -> None:
        super().__init__(module)
        named = {base_name(name): value for name, value in module.named_parameters() if "lora_" not in name}
        self._names = {name: str(index) for index, name in enumerate(named)}
        self._config = config
        self.values = nn.ParameterDict(
            {key: nn.Parameter(named[name].detach().float().clone()) for name, key in self._names.items()}
        )
        self._rows = self.change(dict(self.named_parameters())).on(module)

    def on_all(self, rows: int) -> contextlib.AbstractContextManager[None]:
        return self._rows.replaced()

    def change(self, values: Mapping[str, Tensor]) -> Weights:
        return Weights({name: values[f"values.{key}"] for name, key in self._names.items()}, self._config)


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the LoRA changes: linear layers and convolutions (of one group), but for those of the user's own LoRAs."""
    for name, layer in module.named_modules():
        plain = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(layer, "groups", 1) == 1
        if plain and "lora_" not in name:
            yield base_name(name), layer
