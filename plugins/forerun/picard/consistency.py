"""A trained Picard Consistency Model on disk: a LoRA that diffusers loads, and a card that says what it belongs to.

    folder/pytorch_lora_weights.safetensors    `pipe.load_lora_weights(folder)` reads it too
    folder/picard.json                         base model, scheduler, steps, switch

To another model its changes mean nothing, so the card names its base: class, parameters, and a few of their values (in
bfloat16's precision: a half-precision copy is the same base). Loading it on another one is refused.

Source: arXiv 2503.19731, section 3.2.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from forerun.picard.files import write_whole
from forerun.picard.lora import Lora
from forerun.picard.switch import Switch

__all__ = ["Base", "Card", "Consistency"]

_CARD, _WEIGHTS = "picard.json", "pytorch_lora_weights.safetensors"
_SAMPLED, _EACH = 16, 4  # parameters whose values tell a base from another, and how many of each
_ROUNDING, _FLUSHED = 2.0**-7, 1e-6  # of bfloat16, and what fp16 takes for zero


@dataclass(frozen=True)
class Base:
    """The model that a PCM was trained from."""

    name: str
    model: str  # class
    parameters: int
    layout: str  # digest of parameter names and shapes
    values: tuple[float, ...]  # of a few parameters

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Base:
        """Describes a model; LoRAs that were loaded into it do not count.

        Args:
            module: The denoiser.
            name: What users call it: a repository or a path.
        """
        module = getattr(module, "_orig_mod", module)
        named = {
            key.replace(".base_layer", ""): value for key, value in module.named_parameters() if "lora_" not in key
        }
        layout = json.dumps([[key, list(named[key].shape)] for key in sorted(named)])
        large = sorted(named, key=lambda key: (-named[key].numel(), key))[:_SAMPLED]
        values = [value for key in large for value in _some(named[key])]
        return cls(
            name=name,
            model=type(module).__name__,
            parameters=sum(value.numel() for value in named.values()),
            layout=sha256(layout.encode()).hexdigest()[:16],
            values=tuple(values),
        )

    def same(self, other: Base) -> bool:
        """Whether both are one model, whatever their names and precisions."""
        if (self.model, self.parameters, self.layout) != (other.model, other.parameters, other.layout):
            return False
        return torch.allclose(torch.tensor(self.values), torch.tensor(other.values), _ROUNDING, _FLUSHED)

    def __str__(self) -> str:
        return f"{self.name} ({self.model}, {self.parameters:,} parameters)"


@dataclass(frozen=True)
class Card:
    """What a PCM belongs to and how it is meant to be used."""

    base: Base
    scheduler: str  # class
    scheduler_config: dict[str, Any]
    steps: int
    switch: Switch
    rank: int
    training: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        fields = {**asdict(self), "switch": self.switch.as_config(), "format": 1}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Card:
        fields = json.loads(text)
        if fields.pop("format") != 1:
            raise ValueError("the card is of a later format: upgrade forerun")
        base = {**fields.pop("base")}
        switch = Switch.from_config(fields.pop("switch"))
        return cls(base=Base(**{**base, "values": tuple(base["values"])}), switch=switch, **fields)


@dataclass(frozen=True)
class Consistency:
    """A Picard Consistency Model: a LoRA and its card.

    Args:
        card: What it belongs to.
        lora: Changes of the base model's layers.
        component: The pipeline's name of the denoiser: "unet" or "transformer".
    """

    card: Card
    lora: Lora
    component: str = "unet"

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Consistency:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: A file of the two is missing.
            ValueError: One of them is broken.
        """
        folder = Path(folder)
        for name in (_CARD, _WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no Picard Consistency Model: there is no {name} in it")
        try:
            card = Card.from_json((folder / _CARD).read_text())
            component, layers = _layers(load_file(folder / _WEIGHTS))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds a broken Picard Consistency Model: {error}") from error
        return cls(card, Lora(layers, scale=1.0), component)

    @classmethod
    def given(cls, pcm: Consistency | str | os.PathLike[str] | None, switch: Switch | str) -> Consistency | None:
        """What a user asked for: a PCM, or the folder of one, under a switch or the name of one.

        Raises:
            ValueError: There is no switch of that name.
        """
        if pcm is None:
            return None
        found = pcm if isinstance(pcm, Consistency) else cls.load(pcm)
        ages = (0.0,) * len(found.card.switch.from_signal)
        named = {
            "auto": found.card.switch,
            "hard": Switch(ages, watch=False),
            "linear": Switch(ages, True, watch=False),
        }
        chosen = named.get(switch, switch) if isinstance(switch, str) else switch
        if not isinstance(chosen, Switch):
            raise ValueError(f"switch is {switch!r}; give one of {', '.join(named)}, or a Switch")
        return replace(found, card=replace(found.card, switch=chosen))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes both files; each appears whole or not at all.

        Raises:
            OSError: The disk does not take them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, (down, up) in self.lora.layers.items():
            weights[f"{self.component}.{name}.lora_A.weight"] = down.contiguous()
            weights[f"{self.component}.{name}.lora_B.weight"] = (up * self.lora.scale).contiguous()
        write_whole(folder / _WEIGHTS, save(weights, metadata={"format": "pt"}))
        write_whole(folder / _CARD, self.card.as_json().encode())

    def check(self, module: nn.Module, name: str) -> None:
        """Raises ValueError unless `module` is the base that it was trained from."""
        found = Base.of(module, name)
        if not self.card.base.same(found):
            alike = ", the same architecture with other weights" if found.layout == self.card.base.layout else ""
            raise ValueError(
                f"this Picard Consistency Model was trained from {self.card.base}, and the pipeline's model is {found}"
                f"{alike}; train one for it: forerun picard train"
            )

    def warn_unless_for(self, scheduler: str, config: Mapping[str, Any]) -> None:
        """Warns of a scheduler, or of settings, that it was not trained for: they cost rounds, not the result."""
        trained = self.card.scheduler_config.items()
        differing = sorted(name for name, value in trained if name in config and config[name] != value)
        if scheduler != self.card.scheduler or differing:
            settings = f" ({', '.join(differing)} differ)" if differing else ""
            warnings.warn(
                f"the Picard Consistency Model was trained for {self.card.scheduler}, and runs under "
                f"{scheduler}{settings}: the result stays the base model's, but it may take more rounds",
                stacklevel=5,
            )


def _some(parameter: Tensor) -> list[float]:
    flat = parameter.detach().flatten()
    index = torch.linspace(0, len(flat) - 1, min(_EACH, len(flat)), device=flat.device).long()
    return [float(value) for value in flat[index].to(torch.bfloat16)]


def _layers(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
    """The component's name and its layers' `down` and `up`."""
    layers = {}
    components = {key.split(".", 1)[0] for key in weights}
    if len(components) != 1:
        raise ValueError(f"its weights are of {len(components)} models: {', '.join(sorted(components)) or 'none'}")
    for key, down in weights.items():
        name, _, kind = key.partition(".lora_")
        if kind == "A.weight":
            layers[name.split(".", 1)[1]] = (down, weights[f"{name}.lora_B.weight"])
    if 2 * len(layers) != len(weights):
        raise ValueError("its weights are not pairs of lora_A and lora_B")
    return components.pop(), layers
