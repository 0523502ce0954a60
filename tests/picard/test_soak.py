"""Full counts, for `make soak`: many random samplers, a rank killed at every call."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear import Remembering, solve
from sequences import both, relative_difference
from test_ranks import finish, start
from test_window import _model, _sequential

from forerun.picard.diffusers import SERVED
from forerun.picard.stopping import Stopping
from forerun.picard.window import Window

pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
]


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.integers(1, 60),
    size=st.none() | st.integers(1, 70),
    batch=st.integers(1, 4),
    coarse=st.integers(1, 12),
    acceleration=st.sampled_from(["none", "anderson", "secant"]),
    cuts=st.sets(st.integers(1, 59), max_size=3),
    seed=st.integers(0, 10_000),
)
def test_windows_are_exact(
    steps: int, size: int | None, batch: int, coarse: int, acceleration: str, cuts: set[int], seed: int
) -> None:
    begin = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = tuple(cut for cut in cuts if cut < steps)
    window = Window(
        Remembering(), begin, steps, Stopping(0.0), size=size, coarse=coarse, acceleration=acceleration, cuts=inside
    )
    assert torch.allclose(solve(window, _model), _sequential(begin, steps), rtol=1e-12, atol=1e-12)
    assert window.rounds <= steps


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(SERVED),
    steps=st.integers(5, 40),
    window=st.none() | st.integers(1, 45),
    most=st.none() | st.integers(1, 7),
    acceleration=st.sampled_from(["none", "anderson", "secant"]),
    coarse=st.integers(1, 5),
)
def test_schedulers_are_exact(
    name: str, steps: int, window: int | None, most: int | None, acceleration: str, coarse: int
) -> None:
    sequential, ours, report = both(
        getattr(diffusers, name)(),
        steps=steps,
        tolerance=0,
        window=window,
        max_points_per_call=most,
        acceleration=acceleration,
        coarse=coarse,
    )
    assert relative_difference(ours.sample, sequential.sample) <= 1e-5
    assert report.rounds <= sequential.calls
    assert torch.equal(ours.generator, sequential.generator)


@pytest.mark.parametrize("call", range(1, 8))
def test_a_rank_killed_at_any_call_ends_the_other(tmp_path: Path, call: int) -> None:
    processes = start(tmp_path, "die", "1", str(call))
    errors = finish(processes, 240)
    assert processes[1].returncode == 9
    assert processes[0].returncode == 1
    assert "rank 0 of 2 lost another rank while exchanging" in errors[0]
