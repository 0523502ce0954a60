"""Model switching: weights by age and noise, and that nothing but the base model's answers is ever accepted."""

from __future__ import annotations

import pytest
import torch
from linear import Euler, solve

from forerun.picard.levels import NoiseLevels
from forerun.picard.stopping import Stopping
from forerun.picard.switch import Guide, Switch
from forerun.picard.window import Window


def _levels(points: int) -> NoiseLevels:
    """Constant answers: alpha from 0 to 1, and an output that does not follow the sample."""
    alpha = torch.linspace(0.05, 0.95, points, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    denoiser = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    return NoiseLevels(
        alpha, sigma, denoiser, torch.ones_like(alpha)
    )  # keep = the denoiser's slope: the output has none


@pytest.mark.parametrize(
    ("switch", "weights"),
    [
        (Switch((0.0,)), [1, 0, 0]),
        (Switch((0.0, 0.0)), [1, 1, 0]),
        (Switch((0.0, 0.0), fade=True), [1, 0.5, 0]),
        (Switch((0.5, 2.0)), [1, 0, 0]),
        (Switch((2.0, 0.5)), [0, 1, 0]),
    ],
)
def test_weight_by_age(switch, weights):
    assert [switch.weight(age, signal=1.0) for age in range(3)] == weights
    assert Switch.from_config(switch.as_config()) == switch


@pytest.mark.parametrize("ratios", [(), (-1.0,), (float("nan"),)])
def test_bad_switches(ratios):
    with pytest.raises(ValueError, match="one number >= 0 or more"):
        Switch(ratios)


def test_the_first_point_is_always_the_base_models():
    guide = Guide(Switch((0.0,)), _levels(5))
    assert guide.weights([0, 1, 2]) == (0, 1, 1)
    guide.asked([0, 1, 2])
    assert guide.weights([1, 2, 3, 4]) == (0, 0, 1, 1)  # the last two have just entered the window


def test_a_sweep_that_was_not_helped_ends_it():
    guide = Guide(Switch((0.0, 0.0, 0.0)), _levels(3))
    guide.saw(1.0, guided=True)
    guide.saw(0.5, guided=True)
    assert not guide.dropped
    guide.saw(0.45, guided=True)
    assert guide.dropped
    assert guide.weights([0, 1, 2]) == (0, 0, 0)


Z, STEPS = -0.08, 24


def _window(switch: Switch, tolerance: float, acceleration: str = "none", **options) -> Window:
    start = torch.full((1, 1), 2.0, dtype=torch.float64)
    levels, stopping = _levels(STEPS), Stopping(tolerance)
    guide = Guide(switch, levels)
    guess = start.expand(STEPS + 1, 1, 1)
    return Window(
        Euler(),
        start,
        STEPS,
        stopping,
        acceleration=acceleration,
        levels=levels,
        guess=guess,
        alone=False,
        guide=guide,
        **options,
    )


def test_false_convergence():
    """A PCM whose own iteration converges to another trajectory: its updates vanish, its error stays.

    Stopping by updates alone would take its limit for the result. Here it is never accepted.
    """
    drift, exact = 0.02, 2.0 * (1 + Z) ** STEPS
    samples = torch.full((STEPS + 1,), 2.0, dtype=torch.float64)
    for _ in range(STEPS):  # the PCM's own Picard iteration
        answers = Z * samples[:-1] + drift
        update = samples[0] + torch.cat([torch.zeros(1), answers.cumsum(0)]) - samples
        samples = samples + update
    assert float(update.abs().max()) < 1e-9  # its updates say that it has converged
    assert abs(float(samples[-1]) - exact) > 0.05  # to another trajectory

    never = Switch((0.0,) * 1000, watch=False)
    window = _window(never, 1e-3)
    result = solve(
        window,
        lambda inputs, points: Z * inputs + drift * torch.tensor(window.weights, dtype=torch.float64)[:, None, None],
    )
    assert float(result) == pytest.approx(exact, rel=1e-3)
    assert window.rounds == STEPS  # one point a sweep: the one behind the base model's own answer


@pytest.mark.parametrize("acceleration", ["none", "secant", "anderson"])
@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1e3, float("nan")])
def test_whatever_it_answers_the_result_is_the_base_models(wrong, size, acceleration):
    def answer(inputs, points):
        weights = torch.tensor(window.weights, dtype=torch.float64)[:, None, None]
        return torch.where(weights > 0, Z * inputs + wrong, Z * inputs)

    ages = 2
    window = _window(Switch((0.0,) * ages), 1e-6, acceleration, size=size)
    result = solve(window, answer)
    exact = 2.0 * (1 + Z) ** STEPS
    assert float(result) == pytest.approx(exact, rel=1e-5)
    assert window.guided_rounds >= 1
    if size is None:
        plain = _window(Switch((float("inf"),)), 1e-6, acceleration)
        window = plain
        solve(plain, answer)
        assert plain.guided_rounds == 0


def test_a_number_of_rounds_ends_the_run():
    window = _window(Switch((0.0,)), 1e-6, rounds=2)
    for _ in range(2):
        assert not window.done
        window.update(Z * window.inputs)
    assert window.done
    assert window.ended_early
    assert window.frontier.shape == (1, 1)
    with pytest.raises(ValueError, match="a window of all points"):
        _window(Switch((0.0,)), 1e-6, rounds=2, size=5)
