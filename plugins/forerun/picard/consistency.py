"""A trained Picard Consistency Model on disk: weights that diffusers loads, and a card that says what they belong to.

    folder/picard.json                                      base model, scheduler, steps, switch
    folder/pytorch_lora_weights.safetensors                 a LoRA: `pipe.load_lora_weights(folder)` reads it too
 or folder/diffusion_pytorch_model.safetensors, config.json  a whole model: its class's `from_pretrained(folder)` does

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

from forerun._files import write_whole
from forerun.picard.levels import DATA_VARIANCE
from forerun.picard.lora import Lora
from forerun.picard.switch import Switch
from forerun.picard.weights import Weights

__all__ = ["Base", "Card", "Consistency"]

_CARD, _LORA = "picard.json", "pytorch_lora_weights.safetensors"
_MODEL, _CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
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
    rank: int | None  # of the LoRA; None: a whole model
    data_variance: float = DATA_VARIANCE  # that it was trained under
    component: str = "unet"  # the pipeline's name of the denoiser: "unet" or "transformer"
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
    """A Picard Consistency Model: what it changes in its base model, and its card.

    Args:
        card: What it belongs to.
        change: A LoRA on the base model's layers, or all its weights.
    """

    card: Card
    change: Lora | Weights

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Consistency:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: A file of the two is missing.
            ValueError: One of them is broken.
        """
        folder = Path(folder)
        held = next((name for name in (_LORA, _MODEL) if (folder / name).is_file()), None)
        if held is None or not (folder / _CARD).is_file():
            missing = _CARD if held else f"{_LORA} or {_MODEL}"
            raise FileNotFoundError(f"{folder} is no Picard Consistency Model: there is no {missing} in it")
        try:
            card = Card.from_json((folder / _CARD).read_text())
            values = load_file(folder / held)
            if held == _LORA:
                component, layers = _layers(values)
                return cls(replace(card, component=component), Lora(layers, scale=1.0))
            return cls(card, Weights(values, (folder / _CONFIG).read_text()))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds a broken Picard Consistency Model: {error}") from error

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
        """Writes its files; each appears whole or not at all.

        Raises:
            OSError: The disk does not take them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.change, Lora):
            files = {_LORA: save(_named(self.change, self.card.component), {"format": "pt"})}
        else:
            values = {name: value.contiguous() for name, value in self.change.values.items()}
            files = {_MODEL: save(values, {"format": "pt"}), _CONFIG: self.change.config.encode()}
        replaced = (folder / _CARD).is_file()
        for name, content in files.items():
            write_whole(folder / name, content)
        write_whole(folder / _CARD, self.card.as_json().encode())
        if replaced:  # a PCM of the other kind; without a card such files are somebody else's
            for name in {_LORA, _MODEL, _CONFIG} - files.keys():
                (folder / name).unlink(missing_ok=True)

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


def _named(lora: Lora, component: str) -> dict[str, Tensor]:
    """The LoRA as diffusers names its tensors."""
    weights = {}
    for name, (down, up) in lora.layers.items():
        weights[f"{component}.{name}.lora_A.weight"] = down.contiguous()
        weights[f"{component}.{name}.lora_B.weight"] = (up * lora.scale).contiguous()
    return weights


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
