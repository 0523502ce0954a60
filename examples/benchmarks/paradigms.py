"""The peer: ParaDiGMS' sliding-window loop over diffusers' own parallel schedulers, for one unconditional denoiser.

diffusers ships the schedulers (`DDIMParallelScheduler`, `DDPMParallelScheduler`) and one pipeline for Stable Diffusion;
this is that pipeline's loop without text. Source: Parallel Sampling of Diffusion Models, arXiv 2305.16317, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Outcome", "sample"]


class Outcome(NamedTuple):
    sample: Tensor  # [1, C, H, W]
    rounds: int  # sweeps
    evaluations: int  # points the model was asked at


@torch.no_grad()
def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    start: Tensor,
    generator: torch.Generator,
    tolerance: float,
) -> Outcome:
    """Samples from `start` `[1, C, H, W]` with the whole trajectory as window; `tolerance` is of the noise."""
    timesteps = scheduler.timesteps
    steps = len(timesteps)
    variance = torch.tensor([float(scheduler._get_variance(int(t))) for t in timesteps], dtype=torch.float64)
    stochastic = hasattr(scheduler.config, "variance_type")  # DDPM adds noise, DDIM at eta = 0 does not
    noise = torch.zeros(steps, *start.shape[1:])
    for index, t in enumerate(timesteps):
        if stochastic and t > 0:
            noise[index] = torch.randn(start.shape, generator=generator)[0] * variance[index].sqrt()
    inverse = 1 / torch.cat([variance, variance.new_zeros(1)]).clamp(min=1e-20)
    path = start.repeat(steps + 1, 1, 1, 1)
    begin, rounds, evaluations = 0, 0, 0
    while begin < steps:
        window = slice(begin, steps)
        output = model(path[window], timesteps[window])
        after = scheduler.batch_step_no_noise(output, timesteps[window], path[window])
        # Cumulative sums of one-step moves from the window's start, and the noise that was drawn beforehand.
        moves = (after - path[window] + noise[window]).cumsum(0)
        new = path[begin] + moves
        change = (new - path[begin + 1 :]).flatten(1).double().square().mean(1)
        over = change * inverse[begin + 1 :] > tolerance**2
        over[-1] = True
        path[begin + 1 :] = new
        rounds, evaluations = rounds + 1, evaluations + (steps - begin)
        begin += int(over.double().argmax()) + 1
    return Outcome(path[-1:], rounds, evaluations)
