"""A small diffusion policy: a 1-D UNet over action sequences, conditioned on what the robot observes.

The policy denoises the next `HORIZON` actions at once, executes the first `EXECUTED` of them and looks again. Nothing
here knows which robot it drives: `train_arm.py` trains one for a simulated arm, `control_arm.py` runs it.

Source: Diffusion Policy, arXiv 2303.04137, section III (the 1-D convolutional network with FiLM conditioning).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["EXECUTED", "HORIZON", "ActionUNet", "Limits", "act", "ddim", "load", "save"]

HORIZON = 16  # H, actions in a sample; the network halves it twice
EXECUTED = 8  # actions carried out before the robot looks again
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def ddim() -> DDIMScheduler:
    """The noise schedule and the sequential sampler of Diffusion Policy."""
    return DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)


@dataclass(frozen=True)
class Limits:
    """The range of each component in the demonstrations, in the robot's own units."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Of all rows of `[..., components]`."""
        rows = values.flatten(0, -2)
        return cls(tuple(rows.amin(0).tolist()), tuple(rows.amax(0).tolist()))

    def normalise(self, values: Tensor) -> Tensor:
        """`[..., components]` in the robot's units to [-1, 1]."""
        low, high = values.new_tensor(self.low), values.new_tensor(self.high)
        return (values - low) / (high - low) * 2 - 1

    def restore(self, values: Tensor) -> Tensor:
        """`[..., components]` in [-1, 1] to the robot's units."""
        low, high = values.new_tensor(self.low), values.new_tensor(self.high)
        return (values + 1) / 2 * (high - low) + low


class ActionUNet(nn.Module):
    """Predicts the noise in a sequence of actions.

    Args:
        observations: The range of each component of an observation, O of them.
        actions: The range of each component of an action, A of them.
        channels: Of each level; the sequence is half as long from one level to the next.
        width: Of the embedding that conditions every block.
    """

    def __init__(
        self, observations: Limits, actions: Limits, channels: tuple[int, ...] = (32, 64, 128), width: int = 128
    ) -> None:
        super().__init__()
        self.observations, self.actions, self.channels, self.width = observations, actions, tuple(channels), width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Sequential(nn.Linear(len(observations.low), width), nn.SiLU(), nn.Linear(width, width))
        rising = list(zip((len(actions.low), *channels), channels, strict=False))
        falling = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.down = nn.ModuleList(_Block(before, after, width) for before, after in rising)
        self.shrink = nn.ModuleList(nn.Conv1d(each, each, 3, stride=2, padding=1) for each in channels[:-1])
        self.middle = _Block(channels[-1], channels[-1], width)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(deep, flat, 4, stride=2, padding=1) for deep, flat in falling)
        self.up = nn.ModuleList(_Block(2 * flat, flat, width) for _, flat in falling)
        self.last = nn.Conv1d(channels[0], len(actions.low), 1)

    def forward(self, sample: Tensor, timestep: Tensor | int, condition: Tensor) -> Tensor:
        """The noise, `[B, H, A]`.

        Args:
            sample: `[B, H, A]` noisy actions, of the range [-1, 1] before the noise.
            timestep: `[]` or `[B]`, in 0 to 99.
            condition: `[B, O]` observations in [-1, 1].
        """
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time(_sinusoids(times, self.width).to(sample.dtype)) + self.condition(condition)
        hidden, skipped = sample.transpose(1, 2), []
        for level, block in enumerate(self.down):
            hidden = block(hidden, embedding)
            if level < len(self.shrink):
                skipped.append(hidden)
                hidden = self.shrink[level](hidden)
        hidden = self.middle(hidden, embedding)
        for grow, block in zip(self.grow, self.up, strict=True):
            hidden = block(torch.cat([grow(hidden), skipped.pop()], 1), embedding)
        return self.last(hidden).transpose(1, 2)


class _Block(nn.Module):
    """Two convolutions beside a skip; the embedding scales and shifts what is between them (FiLM)."""

    def __init__(self, before: int, after: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(before, after, 5, padding=2), nn.GroupNorm(8, after), nn.SiLU())
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * after))
        self.second = nn.Sequential(nn.Conv1d(after, after, 5, padding=2), nn.GroupNorm(8, after), nn.SiLU())
        self.skip = nn.Identity() if before == after else nn.Conv1d(before, after, 1)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[..., None].chunk(2, 1)
        return self.second(self.first(hidden) * (1 + scale) + shift) + self.skip(hidden)


def _sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """`[B]` to `[B, width]`, sines and cosines of wavelengths from 2 pi to 10,000 times that."""
    rates = torch.exp(torch.arange(width // 2, device=timesteps.device) * (-math.log(10_000) / (width // 2 - 1)))
    angles = timesteps[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


@torch.no_grad()
def act(model: nn.Module, scheduler: Any, observation: Tensor, generator: torch.Generator, steps: int) -> Tensor:
    """The next actions, `[B, H, A]` in the robot's units: the usual sampling loop.

    Args:
        model: An `ActionUNet`, or another module with its `forward`, `observations` and `actions`.
        scheduler: Any diffusers scheduler, or one that `forerun.picard.diffusers.parallel` made of it.
        observation: `[B, O]` in the robot's units.
        generator: Draws the noise that the actions are made from.
        steps: Of the sampler.
    """
    condition = model.observations.normalise(observation)
    sample = torch.randn(len(observation), HORIZON, len(model.actions.low), generator=generator)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t, condition), t, sample).prev_sample
    return model.actions.restore(sample)


def save(model: ActionUNet, folder: Path) -> None:
    """Writes the weights in half precision and a config with the ranges that normalise."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, folder / _WEIGHTS)
    config = {
        "observations": asdict(model.observations),
        "actions": asdict(model.actions),
        "channels": model.channels,
        "width": model.width,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> ActionUNet:
    """Reads what `save` wrote; the model computes in single precision."""
    config = json.loads((folder / _CONFIG).read_text())
    limits = [Limits(tuple(config[name]["low"]), tuple(config[name]["high"])) for name in ("observations", "actions")]
    model = ActionUNet(*limits, channels=tuple(config["channels"]), width=config["width"])
    model.load_state_dict(load_file(folder / _WEIGHTS))  # copies into the model's own, single precision
    return model.eval()
