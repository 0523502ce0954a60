"""The small parts: stopping norms, noise levels, random draws, timesteps that are a loop, options, cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from forerun.picard.base_solver import noise_levels
from forerun.picard.cost import Cost
from forerun.picard.draws import Draws
from forerun.picard.levels import DATA_VARIANCE, NoiseLevels
from forerun.picard.options import Options
from forerun.picard.report import Report, plot
from forerun.picard.stopping import Stopping
from forerun.picard.timesteps import SweepTimesteps


def _levels(scheduler: object, steps: int = 10, data_variance: float = DATA_VARIANCE) -> NoiseLevels:
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler, scheduler.timesteps, data_variance)
    assert levels is not None
    return levels


def test_noise_levels_are_the_schedulers_own() -> None:
    ddim = DDIMScheduler()
    levels = _levels(ddim)
    signal = ddim.alphas_cumprod[ddim.timesteps].double()
    assert torch.allclose(levels.alpha, signal.sqrt(), atol=1e-6)
    assert torch.allclose(levels.sigma, (1 - signal).sqrt(), atol=1e-6)
    euler = EulerDiscreteScheduler()
    assert torch.allclose(_levels(euler).sigma, euler.sigmas[:-1].double())
    flow = FlowMatchEulerDiscreteScheduler()
    assert torch.allclose(_levels(flow).alpha, 1 - flow.sigmas[:-1].double())
    heun = FlowMatchHeunDiscreteScheduler(shift=3.0)
    assert torch.allclose(_levels(heun).sigma, heun.sigmas[:-1].double())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_keep_and_gain_turn_an_output_into_the_clean_image(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    levels = _levels(scheduler)
    sample, output = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    for point, t in enumerate(scheduler.timesteps):
        clean = scheduler.step(output, t, sample).pred_original_sample
        ours = levels.keep[point] * sample + levels.gain[point] * output
        assert torch.allclose(clean, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance", [DATA_VARIANCE, 0.003])
def test_extrapolation_is_exact_for_gaussian_data(variance: float) -> None:
    levels = _levels(DDIMScheduler(), data_variance=variance)
    mean = torch.full((1, 3), 0.4, dtype=torch.float64)

    def answer(point: int, sample: torch.Tensor) -> torch.Tensor:
        alpha, sigma = levels.alpha[point], levels.sigma[point]
        slope = alpha * variance / (alpha**2 * variance + sigma**2)
        clean = mean + slope * (sample - alpha * mean)
        return (clean - levels.keep[point] * sample) / levels.gain[point]

    first, other = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    expected = levels.extrapolate(other, 7, 2, first, answer(2, first))
    assert torch.allclose(expected, answer(7, other), rtol=1e-6)


def test_relative_change_is_measured_per_sample() -> None:
    new = torch.stack([torch.full((1, 4), 2.0), torch.full((1, 4), 1.0)], 1)  # [W=1, B=2, 1, 4] in effect
    old = new.clone()
    old[:, 1] = 0.5
    change = Stopping(0.1).change(slice(1, 2), new, old, None)
    assert change.tolist() == [[0.0, 0.5]]


def test_the_noise_norm_survives_a_point_without_noise() -> None:
    levels = _levels(DDIMScheduler())
    new, old = torch.ones(10, 1, 4), torch.zeros(10, 1, 4)
    change = Stopping(0.1, "noise").change(slice(1, 11), new, old, levels)
    assert change.isfinite().all()
    assert change[-1] == pytest.approx(1 / float(levels.sigma.min()), rel=1e-5)
    assert change[0] == pytest.approx(1 / float(levels.sigma[1]), rel=1e-5)
    with pytest.raises(ValueError, match="noise levels"):
        Stopping(0.1, "noise").change(slice(1, 11), new, old, None)


def test_a_tolerance_below_a_dtypes_rounding_is_raised_to_it() -> None:
    assert Stopping(1e-3).for_dtype(torch.bfloat16).tolerance == 4 * torch.finfo(torch.bfloat16).eps
    assert Stopping(1e-3).for_dtype(torch.float32).tolerance == 1e-3
    assert Stopping(0.0).for_dtype(torch.bfloat16).tolerance == 0.0


@pytest.mark.parametrize("many", [True, False])
def test_draws_repeat_and_are_handed_back(many: bool) -> None:
    def fresh() -> torch.Generator | list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in (1, 2)] if many else torch.Generator().manual_seed(1)

    def draw(generator: torch.Generator | list[torch.Generator]) -> list[float]:
        generators = generator if isinstance(generator, list) else [generator]
        return [float(torch.randn((), generator=one)) for one in generators]

    reference = fresh()
    expected = [draw(reference) for _ in range(3)]
    given = fresh()
    draws = Draws(given, torch.device("cpu"))
    for _ in range(2):
        for point in range(3):
            assert draw(draws.at(point)) == expected[point]
            draws.drawn(point)
    draws.hand_back()
    assert draw(given) == draw(reference)


def test_draws_without_a_generator_come_from_torchs_own() -> None:
    torch.manual_seed(3)
    expected = [float(torch.randn(())) for _ in range(3)]
    torch.manual_seed(3)
    draws = Draws(None, torch.device("cpu"))
    assert [float(torch.randn((), generator=draws.at(0)))] == expected[:1]
    draws.drawn(0)
    draws.hand_back()
    assert [float(torch.randn(()))] == expected[1:2]


def test_timesteps_are_a_tensor_but_for_their_loop() -> None:
    timesteps = SweepTimesteps.of(torch.arange(5, 0, -1), lambda plain: iter([plain[0], plain[-1]]))
    assert [int(t) for t in timesteps] == [5, 1]
    assert [int(t) for t in timesteps[2:]] == [3, 1]
    assert len(timesteps) == 5
    assert type(timesteps + 1) is torch.Tensor
    assert type(timesteps[1]) is torch.Tensor
    assert torch.equal((timesteps == 4).nonzero().flatten(), torch.tensor([1]))
    assert torch.equal(copy.deepcopy(timesteps), torch.arange(5, 0, -1))
    assert torch.equal(pickle.loads(pickle.dumps(timesteps)), torch.arange(5, 0, -1))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"norm": "max"}, "norm is 'max'"),
        ({"max_points_per_call": 1.5}, "max_points_per_call is 1.5"),
        ({"acceleration": "magic"}, "'secant', 'anderson' or 'none'"),
        ({"coarse": 0}, "coarse is 0"),
        ({"data_variance": 0.0}, "data_variance is 0.0"),
    ],
)
def test_options_name_what_is_wrong(choice: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**choice)


def test_options_go_through_a_config() -> None:
    options = Options(window=7, tolerance=1e-2, norm="noise", warm_start=True)
    assert Options.from_config({**options.as_config(), "of_a_later_release": 1}) == options


def test_cost_says_when_parallel_is_slower() -> None:
    assert Cost(single=1.0, sweep=2.0, points=50).speedup(steps=50, sweeps=5) == 5.0
    losing = Cost(single=1.0, sweep=50.0, points=50)
    assert losing.speedup(steps=50, sweeps=5) < 1
    assert "5.0 such sweeps, takes 250 s where 50 steps take 50 s" in losing.warning(50, 5)


def test_a_report_is_saved_loaded_and_drawn(tmp_path: object) -> None:
    report = Report("DDIMScheduler", 20, 20, 1e-3, "secant", 6, 90, 0.5, (1.0, 0.1, 1e-4), "converged", False)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    plot([report], tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a report"):
        Report.load(tmp_path / "other.json")
