"""DeepSpeed: a model's expert-parallel layers of both kinds, AutoEP's and classic ones, and what is common to them.

`forerun_adapters.deepspeed_autoep` and `deepspeed_classic` hold what of each kind's computation is kept,
`deepspeed_engine` what of the engines. The contract tests of every symbol are in `tests/adapters/test_deepspeed.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from forerun_adapters import deepspeed_autoep as autoep
from forerun_adapters import deepspeed_classic as classic
from forerun_adapters.deepspeed_autoep import AutoEPLayer
from forerun_adapters.deepspeed_classic import ClassicLayer

__all__ = ["AutoEPLayer", "Found", "experts_of", "layers", "name_of", "obstacle", "slots", "top_k_of", "weights"]


class Found(NamedTuple):
    """An expert-parallel layer of a model."""

    number: int  # of the layer in the model
    name: str
    layer: Any  # an AutoEP or a classic one


def layers(model: nn.Module) -> list[Found]:
    """The layers in order. Classic ones whose names do not tell their numbers apart are counted from 0."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, AutoEPLayer | ClassicLayer):
            number = re.search(r"\.(\d+)\.", f".{name}.")
            found.append(Found(int(number[1]) if number else -1, name, module))
    numbers = [entry.number for entry in found]
    if -1 in numbers or len(set(numbers)) < len(numbers):
        return [entry._replace(number=place) for place, entry in enumerate(found)]
    return sorted(found, key=lambda entry: entry.number)


def name_of(model: nn.Module) -> str:
    """The repository's or folder's name, as a profile has it."""
    from forerun_adapters import transformers

    return transformers.name_of(model)


def experts_of(layer: Any) -> int:
    """E, routed experts on all ranks together."""
    return int(layer.ep_size * layer.num_local_experts)


def top_k_of(layer: Any) -> int:
    """k, experts of a token."""
    return int(layer.top_k if isinstance(layer, AutoEPLayer) else layer.gate.k)


def obstacle(layer: Any) -> str | None:
    """What of the layer's settings only the stock forward pass knows; None: nothing."""
    held = weights(layer)
    reasons = (
        (any(hasattr(parameter, "ds_id") for parameter in layer.parameters()), "ZeRO stage 3"),
        (
            not all(tensor.is_contiguous() for place in held for tensor in place),
            "weights of its experts are not contiguous",
        ),
        (any(len(place) != layer.num_local_experts for place in held), "its experts are not all alike"),
    )
    kind = autoep if isinstance(layer, AutoEPLayer) else classic
    return kind.obstacle(layer) or next((reason for applies, reason in reasons if applies), None)


def weights(layer: Any) -> list[list[Tensor]]:
    """Of each parameter and buffer of an expert, those of the E/R experts here, to be written in place."""
    tensors = {**dict(layer.experts.named_parameters()), **dict(layer.experts.named_buffers())}
    return slots(layer, {name: tensor.data for name, tensor in tensors.items()})


def slots(layer: Any, tensors: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Named tensors of `layer.experts`, those that belong to one weight together, in the experts' order."""
    if isinstance(layer, AutoEPLayer):  # stacked
        return [list(tensor) for _, tensor in sorted(tensors.items())]
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        _, place, rest = name.split(".", 2)
        found.setdefault(rest, {})[int(place)] = tensor
    return [[held[place] for place in sorted(held)] for _, held in sorted(found.items())]
