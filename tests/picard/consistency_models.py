"""Picard Consistency Models for tests: LoRAs with random weights, as good or bad as their size says."""

from __future__ import annotations

import torch
from torch import nn

from forerun.picard.consistency import Base, Card, Consistency
from forerun.picard.lora import Lora
from forerun.picard.switch import Switch
from forerun.picard.weights import Weights


def random_lora(module: nn.Module, size: float, rank: int = 4, seed: int = 0) -> Lora:
    """Changes every linear layer and convolution by about `size` times as much as a fresh layer would answer."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            shape = layer.weight.shape
            down = torch.randn(rank, *shape[1:], generator=generator) / layer.weight[0].numel() ** 0.5
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * size / rank**0.5
            layers[name] = (down, up)
    return Lora(layers, 1.0)


def tuned(module: nn.Module, size: float = 0.3) -> Weights:
    """All parameters, each changed at random by `size` times its spread."""
    generator = torch.Generator().manual_seed(5)
    values = {
        name: value.detach() + size * value.detach().std(correction=0) * torch.randn(value.shape, generator=generator)
        for name, value in module.named_parameters()
    }
    return Weights(values, module.to_json_string() if hasattr(module, "to_json_string") else "")


def as_found(module: nn.Module) -> list[object]:
    """What a PCM must leave as it was: classes, attributes, hooks and parameters of all layers."""
    return [
        (type(layer), sorted(vars(layer)), len(layer._forward_hooks), [id(value) for value in layer.parameters()])
        for layer in module.modules()
    ]


def consistency(module: nn.Module, lora: Lora, ages: int = 1, component: str = "unet", **card: object) -> Consistency:
    fields = {
        "base": Base.of(module, "tests/model"),
        "scheduler": "DDIMScheduler",
        "scheduler_config": {},
        "steps": 50,
        "switch": Switch((0.0,) * ages),
        "rank": 4,
        "component": component,
    }
    return Consistency(Card(**{**fields, **card}), lora)
