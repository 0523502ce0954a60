"""The sweeps against closed forms and against the plain sequential loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import Euler, Remembering, constant_start, picard_iterate, solve
from torch import Tensor

from forerun.picard.levels import NoiseLevels
from forerun.picard.stopping import Stopping
from forerun.picard.window import Window

_EXACT = Stopping(0.0)


def _sweeps_until(z: float, steps: int, tolerance: float) -> int:
    """Sweeps after which no point changes by more than `tolerance`, by the closed form alone."""
    for sweeps in range(1, steps + 1):
        new, old = picard_iterate(z, steps, sweeps), picard_iterate(z, steps, sweeps - 1)
        if float(((new - old).abs() / new.abs())[1:].max()) <= tolerance:
            return sweeps
    return steps


@pytest.mark.parametrize("sweeps", [1, 2, 5, 9])
def test_plain_picard_iterates_are_the_closed_form(sweeps: int) -> None:
    window = constant_start(-0.04, 50, 0.0)
    for _ in range(sweeps):
        window.update(-0.04 * window.inputs)
    expected = picard_iterate(-0.04, 50, sweeps)[window.lo :]
    assert torch.allclose(window.samples.flatten(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("z", "steps", "result"), [(-0.04, 50, 0.1298857935), (-0.005, 1000, 0.006653968579)])
def test_the_limit_is_the_sequential_result(z: float, steps: int, result: float) -> None:
    window = constant_start(z, steps, 1e-12)
    assert float(solve(window, lambda inputs, points: z * inputs)) == pytest.approx(result, rel=1e-9)


@pytest.mark.parametrize(
    ("z", "steps", "sweeps"),
    [(-0.04, 50, {1e-3: 8, 1e-6: 12, 1e-10: 16}), (-0.005, 1000, {1e-3: 17, 1e-6: 22, 1e-10: 27})],
)
def test_absolute_error_after_known_sweeps(z: float, steps: int, sweeps: dict[float, int]) -> None:
    exact = picard_iterate(z, steps, steps)
    for tolerance, known in sweeps.items():
        errors = [float((picard_iterate(z, steps, k) - exact).abs().max()) for k in (known - 1, known)]
        assert errors[1] <= tolerance < errors[0]
        window = constant_start(z, steps, 0.0)
        for _ in range(known):
            window.update(z * window.inputs)
        assert float((window.samples.flatten() - exact[window.lo :]).abs().max()) <= tolerance


def test_stopping_takes_the_sweeps_that_the_closed_form_says() -> None:
    window = constant_start(-0.04, 50, 1e-6)
    solve(window, lambda inputs, points: -0.04 * inputs)
    # The window's start moves on as points converge, which can only save a sweep.
    assert _sweeps_until(-0.04, 50, 1e-6) - 1 <= window.rounds <= _sweeps_until(-0.04, 50, 1e-6)


def test_a_linear_model_is_solved_by_secants_in_few_rounds() -> None:
    start = torch.ones(1, 1, dtype=torch.float64)
    window = Window(Euler(), start, 200, Stopping(1e-9), acceleration="secant")
    result = solve(window, lambda inputs, points: -0.02 * inputs)
    assert float(result) == pytest.approx(0.98**200, rel=1e-7)
    assert window.rounds <= 5  # the slope of a linear model is known after two sweeps; plain iteration needs about 30


def _model(inputs: Tensor, points: tuple[int, ...]) -> Tensor:
    time = torch.tensor(points, dtype=inputs.dtype)[:, None, None]
    return torch.sin(3 * inputs * (1 + time) + 0.1 * time)


def _sequential(start: Tensor, steps: int) -> Tensor:
    solver, sample = Remembering(), start
    for point in range(steps):
        sample = solver.step(_model(solver.scale(sample, point)[None], (point,))[0], sample)
    return sample


@settings(max_examples=60)
@given(
    steps=st.integers(1, 30),
    size=st.none() | st.integers(1, 40),
    batch=st.integers(1, 3),
    coarse=st.integers(1, 6),
    acceleration=st.sampled_from(["none", "anderson", "secant"]),
    cut=st.none() | st.integers(1, 29),
    seed=st.integers(0, 100),
)
def test_exact_in_at_most_as_many_rounds_as_steps(
    steps: int, size: int | None, batch: int, coarse: int, acceleration: str, cut: int | None, seed: int
) -> None:
    start = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cuts = () if cut is None or cut >= steps else (cut,)
    window = Window(
        Remembering(), start, steps, _EXACT, size=size, coarse=coarse, acceleration=acceleration, cuts=cuts, keep=True
    )
    asked: list[tuple[int, ...]] = []

    def model(inputs: Tensor, points: tuple[int, ...]) -> Tensor:
        asked.append(points)
        return _model(inputs, points)

    result = solve(window, model)
    assert torch.allclose(result, _sequential(start, steps), rtol=1e-12, atol=1e-12)
    assert window.rounds <= steps
    assert window.evaluations == sum(map(len, asked))
    assert all(len(points) <= (size or steps) for points in asked if len(points) > 2)
    assert all(points[-1] < cut or points[0] >= cut for points in asked if cuts)
    assert torch.allclose(window.trajectory[0], start)
    assert len(window.trajectory) == steps + 1


@pytest.mark.parametrize("acceleration", ["none", "anderson", "secant"])
def test_a_warm_start_from_the_result_needs_two_rounds(acceleration: str) -> None:
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = Window(Remembering(), start, 20, Stopping(1e-9), acceleration=acceleration, keep=True)
    solve(first, _model)
    again = Window(Remembering(), start, 20, Stopping(1e-6), acceleration=acceleration, guess=first.trajectory)
    assert torch.allclose(solve(again, _model), first.frontier, rtol=1e-6)
    assert again.rounds == 2


def test_an_acceleration_that_diverges_is_given_up() -> None:
    """Noise levels that are wildly wrong: the prior slopes blow the first rebuild up; plain iteration takes over."""
    steps = 12
    one = torch.ones(steps, dtype=torch.float64)
    wrong = NoiseLevels(alpha=1e-6 * one, sigma=1e-6 * one, keep=1e6 * one, gain=-1e-6 * one)
    start = torch.ones(1, 1, dtype=torch.float64)
    guess = torch.ones(steps + 1, 1, 1, dtype=torch.float64)
    window = Window(Euler(), start, steps, _EXACT, acceleration="secant", levels=wrong, guess=guess)
    result = solve(window, lambda inputs, points: -0.1 * inputs)
    assert window.fell_back
    assert float(result) == pytest.approx(0.9**steps, rel=1e-12)


def test_a_model_that_answers_not_a_number_is_not_taken_for_converged() -> None:
    window = Window(Euler(), torch.ones(1, 1), 6, Stopping(1e-3))

    def model(inputs: Tensor, points: tuple[int, ...]) -> Tensor:
        later = torch.tensor(points)[:, None, None] > points[0]
        return torch.where(later & (window.rounds < 3), torch.nan, -0.1 * inputs)  # it recovers in the fourth round

    assert float(solve(window, model)) == pytest.approx(0.9**6, rel=1e-3)


def test_the_slowest_sample_decides() -> None:
    rates = torch.tensor([[-0.001], [-0.5]], dtype=torch.float64)

    def rounds(rows: Tensor) -> int:
        window = Window(Euler(), torch.ones(len(rows), 1, dtype=torch.float64), 40, Stopping(1e-6), acceleration="none")
        result = solve(window, lambda inputs, points: rows * inputs)
        assert torch.allclose(result, (1 + rows) ** 40, rtol=1e-4)
        return window.rounds

    easy, hard = rounds(rates[:1]), rounds(rates[1:])
    assert easy < hard == rounds(rates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "window is 0"),
        ({"coarse": 0}, "coarse is 0"),
        ({"acceleration": "magic"}, "'magic'.*secant, anderson, none"),
        ({"guess": torch.zeros(3, 1, 1)}, "earlier trajectory"),
    ],
)
def test_bad_choices_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window(Euler(), torch.ones(1, 1), 5, _EXACT, **arguments)


def test_a_wrong_number_of_answers_is_refused() -> None:
    window = Window(Euler(), torch.ones(1, 1), 5, _EXACT)
    with pytest.raises(ValueError, match="2 answers came for 1 points"):
        window.update(torch.ones(2, 1, 1))
