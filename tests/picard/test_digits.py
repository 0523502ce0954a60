"""The project's own trained model: rounds counted over seeds, errors measured, clipping exact."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from forerun.picard.diffusers import parallel

_UNET = Path(__file__).parents[2] / "examples" / "assets" / "digits" / "unet"


@pytest.fixture(scope="module")
def unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel.from_pretrained(_UNET).eval()


@torch.no_grad()
def _sample(unet: torch.nn.Module, scheduler: Any, steps: int, start: Tensor, **extra: Any) -> Tensor:
    scheduler.set_timesteps(steps)
    sample = start
    for t in scheduler.timesteps:
        sample = scheduler.step(unet(sample, t).sample, t, sample, **extra).prev_sample
    return sample


def _starts(seeds: int) -> list[Tensor]:
    return [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]


@pytest.fixture(scope="module")
def sequential(unet: torch.nn.Module) -> Tensor:
    """`[32, 1, 8, 8]` DDIM's samples after 100 steps."""
    return _sample(unet, diffusers.DDIMScheduler(clip_sample=False), 100, torch.cat(_starts(32)))


@pytest.mark.parametrize(("acceleration", "most_rounds"), [("none", 23.5), ("secant", 11.0)])
def test_rounds_of_ddim_100_over_32_seeds(
    unet: torch.nn.Module, sequential: Tensor, acceleration: str, most_rounds: float
) -> None:
    scheduler = parallel(
        unet, diffusers.DDIMScheduler(clip_sample=False), tolerance=1e-3, acceleration=acceleration, check_cost=False
    )
    rounds, errors = [], []
    for start, expected in zip(_starts(32), sequential, strict=True):
        sample = _sample(unet, scheduler, 100, start)[0]
        rounds.append(scheduler.report.rounds)
        errors.append(float((sample - expected).norm() / expected.norm()))
    scheduler.detach()
    assert sum(rounds) / len(rounds) <= most_rounds
    assert max(errors) <= 1e-3


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True, "clip_sample": False}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("UniPCMultistepScheduler", {"thresholding": True}),
    ],
)
def test_clipping_is_exact_on_a_trained_model(unet: torch.nn.Module, name: str, config: dict) -> None:
    base = getattr(diffusers, name)(**config)
    ours = parallel(unet, base, tolerance=0, check_cost=False)
    start = torch.cat(_starts(2))
    seeded = "generator" in inspect.signature(base.step).parameters
    extra = [{"generator": torch.Generator().manual_seed(1)} if seeded else {} for _ in range(2)]
    expected = _sample(unet, base, 25, start, **extra[0])
    sample = _sample(unet, ours, 25, start, **extra[1])
    ours.detach()
    assert float((sample - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_samples_of_a_batch_do_not_depend_on_each_other(unet: torch.nn.Module) -> None:
    starts = _starts(3)
    scheduler = parallel(unet, diffusers.DDIMScheduler(clip_sample=False), tolerance=1e-4, check_cost=False)
    together = _sample(unet, scheduler, 40, torch.cat(starts))
    for start, sample in zip(starts, together, strict=True):
        alone = _sample(unet, scheduler, 40, start)[0]
        assert float((sample - alone).norm() / alone.norm()) <= 5e-4
    scheduler.detach()


def test_auto_steps_aside_when_a_sweep_costs_more_than_the_steps(unet: torch.nn.Module) -> None:
    """A model whose batch costs as much as the calls it replaces, made so by evaluating row by row, slowly."""

    class RowByRow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Tensor, timestep: Tensor) -> diffusers.models.unets.unet_2d.UNet2DOutput:
            times = timestep.expand(len(sample))
            rows = [self.unet(row[None], t).sample for row, t in zip(sample, times, strict=True) for _ in range(2)]
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=torch.cat(rows[::2]))

    model, base, start = RowByRow(), diffusers.DDIMScheduler(clip_sample=False), _starts(1)[0]
    expected = _sample(model, base, 12, start)
    warned = parallel(model, base, tolerance=1e-3)
    with pytest.warns(UserWarning, match=r"parallel sampling will be slower here: a sweep of 11 points takes .* s"):
        _sample(model, warned, 12, start)
    warned.detach()
    aside = parallel(model, base, tolerance=1e-3, auto=True)
    sample = _sample(model, aside, 12, start)
    assert aside.report.stopped == "stepped aside"
    assert aside.report.cost["sweep"] > aside.report.cost["single"]
    assert float((sample - expected).norm() / expected.norm()) <= 1e-3
    again = _sample(model, aside, 12, start)  # from the first step on: it is known by now
    assert aside.report.rounds == aside.report.evaluations == 12
    assert torch.equal(again, expected)
    aside.detach()
