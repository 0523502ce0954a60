"""What the benchmark of Picard Consistency Models samples, and the ways to sample it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from forerun.picard.consistency import Consistency
from forerun.picard.diffusers import parallel
from forerun.picard.lora import Lora
from forerun.picard.window import Acceleration

sys.path.append(str(Path(__file__).parents[1]))  # the examples: diffusion_policy, control_arm

import diffusion_policy

__all__ = ["ASSETS", "FIRST_SEED", "PCMS", "WAYS", "Case", "Given", "Way", "answer", "sample"]

ASSETS = Path(__file__).parents[1] / "assets"
PCMS = {
    ("digits", 50): ASSETS / "digits" / "pcm",
    ("digits", 100): ASSETS / "digits" / "pcm",  # trained at N=50, and better than one trained at N=100
    ("arm", 15): ASSETS / "arm" / "pcm",
    ("arm", 100): ASSETS / "arm" / "pcm-100",
}
FIRST_SEED = 500_000_000  # of noise and of the arm's resets; no training takes it, or one near it


class Way(NamedTuple):
    """A way to sample in parallel."""

    acceleration: Acceleration
    pcm: str | None = None  # "trained"; "zero": one whose LoRA changes nothing, under the same switch
    fitted: bool = False  # with the data variance of the case, where the default's does not fit it


# A PCM's sweeps carry answers along the slope of Gaussian data. "Slope only" has that slope and the base's own answers:
# what it gains is not the training's.
WAYS = {
    "plain": Way("none"),
    "accelerated": Way("secant"),
    "PCM": Way("none", "trained"),
    "PCM + acceleration": Way("secant", "trained"),
    "slope only": Way("none", "zero"),
    "slope only + acceleration": Way("secant", "zero"),
    "accelerated, fitted": Way("secant", fitted=True),
}
FITTED = {"arm": 0.01}  # data variance, by the case's name


class Given(NamedTuple):
    """What a run starts from."""

    start: Tensor  # [B, ...] noise
    condition: tuple[Tensor, ...]  # [B, ...] each, what the model is told beside sample and timestep


@dataclass(frozen=True)
class Case:
    """A model in its sampler.

    Args:
        name: "digits" or "arm".
        steps: N.
        model: The base model; never hooked.
        scheduler: The stock scheduler.
        draw: Noise and condition from seeds, one each.
        device: Where it runs.
    """

    name: str
    steps: int
    model: nn.Module
    scheduler: Any
    draw: Callable[[Sequence[int]], Given]
    device: torch.device

    @classmethod
    def of(cls, name: str, steps: int, device: torch.device) -> Case:
        if name == "digits":
            model: nn.Module = UNet2DModel.from_pretrained(ASSETS / "digits" / "unet")
            scheduler = DDIMScheduler.from_pretrained(ASSETS / "digits", subfolder="scheduler")
            return cls(name, steps, model.eval().to(device), scheduler, _noise, device)
        policy = diffusion_policy.load(ASSETS / "arm").to(device)
        return cls(name, steps, policy, diffusion_policy.ddim(), functools.partial(_reaching, policy), device)

    def __str__(self) -> str:
        return f"{self.name} N={self.steps}"

    def given(self, seeds: Sequence[int]) -> Given:
        start, condition = self.draw(seeds)
        return Given(start.to(self.device), tuple(tensor.to(self.device) for tensor in condition))

    def fresh(self) -> nn.Module:
        """A copy of the model for one way alone, since hooks stay on it."""
        return copy.deepcopy(self.model)

    @property
    def ways(self) -> dict[str, Way]:
        """Those that this case has."""
        return {name: way for name, way in WAYS.items() if not way.fitted or self.name in FITTED}

    def pcm(self, way: Way) -> Consistency | None:
        if way.pcm is None:
            return None
        trained = Consistency.load(PCMS[self.name, self.steps])
        return trained if way.pcm == "trained" else _unchanging(trained)

    def sampler(self, way: Way, **options: Any) -> tuple[nn.Module, Any]:
        """A model and the scheduler bound to it; `options` are those of `parallel`."""
        model = self.fresh()
        options = {"acceleration": way.acceleration, "pcm": self.pcm(way), "check_cost": False, **options}
        if way.fitted:
            options["data_variance"] = FITTED[self.name]
        return model, parallel(model, self.scheduler, **options)


def answer(model: nn.Module, sample: Tensor, timestep: Tensor, condition: tuple[Tensor, ...]) -> Tensor:
    """The model's answer as a tensor, whichever of the two it is."""
    output = model(sample, timestep, *condition)
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def sample(model: nn.Module, scheduler: Any, given: Given, steps: int) -> Tensor:
    """The usual loop; `[B, ...]`."""
    scheduler.set_timesteps(steps)
    made = given.start
    for t in scheduler.timesteps:
        made = scheduler.step(answer(model, made, t, given.condition), t, made).prev_sample
    return made


def _unchanging(pcm: Consistency) -> Consistency:
    assert isinstance(pcm.change, Lora)
    return replace(pcm, change=replace(pcm.change, scale=0.0))


def _noise(seeds: Sequence[int]) -> Given:
    return Given(torch.cat([_normal(seed, 1, 1, 8, 8) for seed in seeds]), ())


def _reaching(policy: diffusion_policy.ActionUNet, seeds: Sequence[int]) -> Given:
    """Noise, and what the arm shows at the start of an episode."""
    actions = len(policy.actions.low)
    start = torch.cat([_normal(seed, 1, diffusion_policy.HORIZON, actions) for seed in seeds])
    return Given(start, (policy.observations.normalise(torch.stack([_observation(seed) for seed in seeds])),))


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _observation(seed: int) -> Tensor:
    """`[O]` in the robot's units, after a reset."""
    from control_arm import SHOWN

    observation, _ = _arm().reset(seed=seed)
    return torch.tensor(observation[SHOWN], dtype=torch.float32)


@functools.cache
def _arm() -> Any:
    import gymnasium  # the digits need none

    return gymnasium.make("Reacher-v5")
