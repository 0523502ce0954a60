"""The first sweep: asked in the pipeline's first call, before the scheduler has seen a sample."""

from __future__ import annotations

import diffusers
import dit_pipelines as dits
import pipelines as made
import pytest
import torch
from comparison import assert_same_image, counted_calls, sample
from linear import Euler
from sequences import Net
from torch import nn

from forerun.picard.base_solver import SchedulerSolver, input_factors, noise_levels
from forerun.picard.diffusers import SERVED, PicardScheduler, parallel
from forerun.picard.draws import Draws
from forerun.picard.levels import DATA_VARIANCE
from forerun.picard.stopping import Stopping
from forerun.picard.window import Window


def test_the_start_is_the_trajectory_of_gaussian_data():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1000)
    levels = noise_levels(scheduler, scheduler.timesteps)
    current = torch.ones(1, dtype=torch.float64)
    for point, t in enumerate(scheduler.timesteps):
        assert float(current) == pytest.approx(float(levels.size[point] / levels.size[0]), rel=2e-2)
        alpha, sigma = levels.alpha[point], levels.sigma[point]
        noise = current * sigma / (alpha**2 * DATA_VARIANCE + sigma**2)
        current = scheduler.step(noise, t, current).prev_sample
    assert float(current) == pytest.approx(float(levels.size[-1] / levels.size[0]), rel=2e-2)


@pytest.mark.parametrize("name", SERVED)
def test_input_factors_are_what_the_scheduler_scales_by(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    factors = input_factors(scheduler, scheduler.timesteps)
    solver = SchedulerSolver(scheduler, scheduler.timesteps, {}, Draws(None, torch.device("cpu")))
    given = torch.randn(2, 3, dtype=torch.float64)
    for point, factor in enumerate(factors):
        assert torch.allclose(solver.scale(given, point), factor * given, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "rows", "opened"),
    [
        (made.stable_diffusion, 4, True),
        (dits.stable_diffusion_3, 4, True),  # its scheduler has no scale_model_input to show a sample
        (made.instruct_pix2pix, 3, True),  # concatenates an image to the sample
        (dits.dit, 4, False),  # its short schedule starts from little noise
        (made.image_to_image, 2, False),  # starts from an image
    ],
)
def test_pipelines_that_start_from_noise_are_asked_for_the_whole_window(build, rows, opened):
    pipe, arguments = build()
    sequential = sample(pipe, arguments)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False)
    with counted_calls(getattr(pipe, "unet", None) or pipe.transformer) as calls:
        assert_same_image(sample(pipe, arguments), sequential)
    assert calls[0] == rows * (pipe.scheduler.report.points if opened else 1)
    assert pipe.scheduler.report.evaluations * rows == sum(calls)
    pipe.scheduler.detach()


@pytest.mark.parametrize("option", [{"coarse": 3}, {"window": 1}])
def test_options_that_begin_with_one_point(option):
    pipe, arguments = made.stable_diffusion()
    sequential = sample(pipe, arguments)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False, **option)
    with counted_calls(pipe.unet) as calls:
        assert_same_image(sample(pipe, arguments), sequential)
    assert calls[0] == 4
    pipe.scheduler.detach()


class Conditioned(nn.Module):
    """Takes the sample and an image in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.net(sample[:, :3] + sample[:, 3:].cos(), timestep)


def _loop(model, scheduler, before=lambda given: None):
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(1)
    current, image = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = torch.cat([current, image], 1)
            before(given)
            current = scheduler.step(model(given, t), t, current).prev_sample
    return current


def test_a_loop_that_concatenates_and_scales_nothing_begins_with_one_point():
    """The widened call would have scaled the image too: its answers but the first point's are dropped."""
    model, base = Conditioned(), diffusers.DDIMScheduler(clip_sample=False)
    ours = parallel(model, base, tolerance=0, check_cost=False)
    assert_same_image(_loop(model, ours), _loop(model, base))
    ours.detach()


def test_a_call_at_another_timestep_is_left_alone():
    model, base = Conditioned(), diffusers.DDIMScheduler(clip_sample=False)
    answers = []
    expected = model(torch.zeros(2, 6, 4, 4), torch.tensor(5))
    ours = parallel(model, base, tolerance=0, check_cost=False)

    def other_call(given):
        if not answers:
            answers.append(model(torch.zeros_like(given), torch.tensor(5)))

    assert_same_image(_loop(model, ours, other_call), _loop(model, base))
    assert torch.equal(answers[0], expected)
    ours.detach()


def test_a_window_needs_something_to_start_from():
    start = torch.ones(1, 1)
    with pytest.raises(ValueError, match="needs a guess or noise levels"):
        Window(Euler(), start, 3, Stopping(0.0), alone=False)
