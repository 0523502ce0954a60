"""Pipelines and bare models as what `forerun.picard.training.train` runs.

train(PipelineSource(pipe, prompt=["a cat", "a dog"]), Path("pcm"), Training(steps=50))
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from forerun.picard import rules
from forerun.picard.base_solver import fresh_solver, input_factors, noise_levels
from forerun.picard.consistency import Base, Consistency
from forerun.picard.denoiser import Asked, time_argument
from forerun.picard.diffusers import PicardScheduler, parallel
from forerun.picard.levels import DATA_VARIANCE, NoiseLevels
from forerun.picard.solver import Solver
from forerun.picard.trajectories import Trajectory, recorded
from forerun_adapters import diffusers as host

__all__ = ["LoopSource", "PipelineSource"]

# What a scheduler's settings say about whether a PCM was trained for it.
_TELLING = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "timestep_spacing")


class _Source(ABC):
    """What both sources share; they say how to sample."""

    module: nn.Module
    component: str
    unbatched: frozenset[str]

    def __init__(self, base: Any) -> None:
        if isinstance(base, PicardScheduler):
            raise ValueError("the scheduler samples in parallel already: train with the one that detach() returns")
        self._base = base
        self._signature = host.forward_signature(self.module)
        names = list(self._signature.parameters)
        self.sample_name, self.time_name = names[0], time_argument(host.family_name(self.module), names)
        self.name, self.config = host.model_name(self.module), host.model_config(self.module)
        self.scheduler = type(self._base).__name__
        self.scheduler_config = {name: self._base.config[name] for name in _TELLING if name in self._base.config}

    @torch.no_grad()
    def levels(self, steps: int, data_variance: float = DATA_VARIANCE) -> tuple[NoiseLevels, Tensor]:
        self._sample(self._base, steps, [0])  # some pipelines compute the noise levels themselves
        scheduler = self._base
        if len(scheduler.timesteps) != steps:
            raise ValueError(
                f"{self.scheduler} makes {len(scheduler.timesteps)} model calls of {steps} steps; train with one that "
                "makes one call a step (the PCM can be used with others)"
            )
        levels = noise_levels(scheduler, scheduler.timesteps, data_variance)
        if levels is None:
            raise ValueError(f"{self.scheduler} shows no noise levels, which the training needs")
        return levels, levels.output_slope / input_factors(scheduler, scheduler.timesteps)

    @torch.no_grad()
    def solver(self, steps: int) -> Solver:
        self._sample(self._base, steps, [0])
        return fresh_solver(self._base, self._base.timesteps)

    @torch.no_grad()
    def finished(self, steps: int, seeds: Sequence[int]) -> list[Trajectory]:
        with recorded(self.module, self._signature, steps) as trajectories:
            self._sample(self._base, steps, seeds)
        return trajectories

    @torch.no_grad()
    def asked(self, steps: int, seeds: Sequence[int], pcm: Consistency, sweeps: int) -> list[Asked]:
        scheduler = self._parallel(pcm=pcm, exact=False, sweeps=sweeps)
        asked: list[Asked] = []
        scheduler.tell(asked.append)
        try:
            self._sample(scheduler, steps, seeds)
        finally:
            scheduler.detach()
        return asked

    @torch.no_grad()
    def rounds(
        self, steps: int, seeds: Sequence[int], pcm: Consistency | None, data_variance: float = DATA_VARIANCE
    ) -> int:
        scheduler = self._parallel(pcm=pcm, data_variance=data_variance)
        try:
            self._sample(scheduler, steps, seeds)
        finally:
            scheduler.detach()
        assert scheduler.report is not None
        return scheduler.report.rounds

    def fingerprint(self) -> str:
        config = {name: value for name, value in sorted(self._base.config.items()) if not name.startswith("_")}
        settings = json.dumps([self.scheduler, config, asdict(Base.of(self.module, ""))], default=str)
        digest = sha256(settings.encode())
        loras = {name: value for name, value in self.module.named_parameters() if "lora_" in name}  # not the base's
        for keys, leaf in pytree.tree_flatten_with_path([self._given(), loras])[0]:
            digest.update(f"{pytree.keystr(keys)} {getattr(leaf, 'shape', leaf)}".encode())
            if isinstance(leaf, Tensor):
                digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def checkpoint_gradients(self, on: bool) -> None:
        host.checkpoint_gradients(self.module, on)

    @abstractmethod
    def _given(self) -> Mapping[str, Any]:
        """What is given besides noise: prompts, conditioning."""

    @abstractmethod
    def _parallel(self, **options: Any) -> PicardScheduler:
        """The base scheduler in parallel, on the denoiser."""

    @abstractmethod
    def _sample(self, scheduler: Any, steps: int, seeds: Sequence[int]) -> None:
        """One run of a scheduler, from the seeds' noise."""


class PipelineSource(_Source):
    """A diffusers pipeline.

    Args:
        pipe: As it is to be used later: guidance and prompts belong to what is trained.
        **arguments: Of its call. A list (of prompts, say) is gone through, one item per seed.

    Raises:
        ValueError: A pipeline with more than one denoiser, or one that parallel sampling does not serve.
    """

    def __init__(self, pipe: Any, **arguments: Any) -> None:
        modules = host.pipeline_denoisers(pipe)
        rules.refuse_pipeline(pipe)
        if len(modules) != 1:
            raise ValueError(
                f"{type(pipe).__name__} has {len(modules)} denoisers; a Picard Consistency Model can be trained for one"
            )
        self._pipe, self._arguments = pipe, arguments
        self.module = modules[0]
        self.component = host.component_name(pipe, self.module)
        self.unbatched = rules.family(host.family_name(self.module), None).unbatched
        super().__init__(pipe.scheduler)

    def _given(self) -> Mapping[str, Any]:
        return self._arguments

    def _parallel(self, **options: Any) -> PicardScheduler:
        return PicardScheduler.from_pipe(self._pipe, check_cost=False, **options)

    def _sample(self, scheduler: Any, steps: int, seeds: Sequence[int]) -> None:
        before, self._pipe.scheduler = self._pipe.scheduler, scheduler
        arguments = {
            name: [value[seed % len(value)] for seed in seeds] if isinstance(value, list) else value
            for name, value in self._arguments.items()
        }
        arguments.setdefault("output_type", "latent")
        if not any(isinstance(value, list) for value in self._arguments.values()):
            arguments = {**_many(self._pipe, len(seeds)), **arguments}
        try:
            self._pipe.set_progress_bar_config(disable=True)
            self._pipe(**arguments, num_inference_steps=steps, generator=_generators(seeds))
        finally:
            self._pipe.scheduler = before


class LoopSource(_Source):
    """A bare model in the loop that diffusion policies write: no pipeline, no guidance.

    Args:
        model: Its first argument is the sample, one is named `timestep`, `timesteps` or `t`.
        scheduler: A diffusers scheduler.
        shape: Of one sample.
        conditioning: The model's other arguments for some seeds, each with a row per seed.
        unbatched: Those of them without a batch axis.
    """

    component = "unet"

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        shape: Sequence[int],
        conditioning: Callable[[Sequence[int]], Mapping[str, Any]] = lambda seeds: {},
        unbatched: Sequence[str] = (),
    ) -> None:
        self.module, self._shape, self._conditioning = model, tuple(shape), conditioning
        self.unbatched = frozenset(unbatched)
        super().__init__(scheduler)

    def _given(self) -> Mapping[str, Any]:
        return self._conditioning([0])

    def _parallel(self, **options: Any) -> PicardScheduler:
        return parallel(self.module, self._base, unbatched=tuple(self.unbatched), check_cost=False, **options)

    def _sample(self, scheduler: Any, steps: int, seeds: Sequence[int]) -> None:
        own = next(self.module.parameters())
        device = own.device
        scheduler.set_timesteps(steps, device=device)
        start = torch.cat([torch.randn(1, *self._shape, generator=generator) for generator in _generators(seeds)])
        sample = start.to(device, own.dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        conditioning = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._conditioning(seeds).items()
        }
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            output = self.module(scaled, t, **conditioning)
            output = output if isinstance(output, Tensor) else output[0]
            sample = scheduler.step(output, t, sample).prev_sample


def _generators(seeds: Sequence[int]) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def _many(pipe: Any, samples: int) -> dict[str, int]:
    """The argument by which a pipeline makes several samples of one prompt, or of none."""
    taken = host.call_arguments(pipe)
    names = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
    return next(({name: samples} for name in names if name in taken), {})
