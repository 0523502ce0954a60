"""Real schedulers in bare loops over a small model, with and without forerun: what the scheduler tests compare."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from forerun.picard.diffusers import parallel


class Net(nn.Module):
    """A smooth random denoiser of `[B, 3, 4, 4]` that depends on sample and timestep, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 16, 3, padding=1)
            self.last = nn.Conv2d(16, 3, 3, padding=1)
            self.time = nn.Linear(2, 16)
        self.calls: list[int] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls.append(len(sample))
        phase = torch.as_tensor(timestep).to(sample.dtype).expand(len(sample))
        time = self.time(torch.stack([torch.sin(phase / 100), torch.cos(phase / 300)], -1))
        inner = torch.tanh(self.first(sample) + time[:, :, None, None])
        return 0.5 * self.last(inner) + 0.5 * torch.tanh(sample)


class Outcome(NamedTuple):
    sample: Tensor
    calls: int
    generator: Tensor  # its state after the loop


def loop(scheduler: Any, model: Net, steps: int, dtype: torch.dtype, **timesteps: Any) -> Outcome:
    """The loop that every diffusers tutorial writes."""
    scheduler.set_timesteps(**(timesteps or {"num_inference_steps": steps}))
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 3, 4, 4, generator=generator).to(dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    earlier = None
    model.calls.clear()
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            output = model(scaled, t)
            if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
                before = scheduler.timesteps[i - 1] if i > 0 else None
                sample, earlier = scheduler.step(output, earlier, t, before, sample, **extra, return_dict=False)
            else:
                sample = scheduler.step(output, t, sample, **extra).prev_sample
    return Outcome(sample, len(model.calls), generator.get_state())


def both(
    scheduler: Any, steps: int = 14, dtype: torch.dtype = torch.float32, timesteps: Any = None, **options: Any
) -> tuple[Outcome, Outcome, Any]:
    """The sequential loop, the parallel one, and the latter's report."""
    model = Net().to(dtype)
    sequential = loop(scheduler, model, steps, dtype, **(timesteps or {}))
    ours = parallel(model, scheduler, check_cost=False, **options)
    outcome = loop(ours, model, steps, dtype, **(timesteps or {}))
    ours.detach()
    return sequential, outcome, ours.report


def relative_difference(ours: Tensor, sequential: Tensor) -> float:
    return float((ours - sequential).abs().max() / sequential.abs().max())
