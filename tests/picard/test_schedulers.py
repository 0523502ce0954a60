"""Every base scheduler served: at tolerance 0 the parallel loop gives the sequential result, draws included."""

from __future__ import annotations

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import Net, both, loop, relative_difference

from forerun.picard.diffusers import SERVED, parallel

pytestmark = [
    # torchsde (CosineDPMSolver's noise) warns of rounding at the ends of its interval.
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*dpmsolver.*is deprecated:FutureWarning"),
]

# Base schedulers whose arithmetic stays in float64 when the sample is.
_FLOAT64 = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")

_CONFIGS: list[tuple[str, dict]] = [
    *((name, {}) for name in SERVED),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    *(
        (name, {"prediction_type": kind})
        for kind in ("v_prediction", "sample")
        for name in (
            "DDIMScheduler",
            "DDPMScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
            "DEISMultistepScheduler",
        )
    ),
    *(
        (name, {"timestep_spacing": spacing})
        for spacing in ("linspace", "leading", "trailing")
        for name in ("DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
    ),
    *(
        ("DDIMScheduler", {"timestep_spacing": spacing, "set_alpha_to_one": to_one, "clip_sample": clip})
        for spacing in ("linspace", "leading", "trailing")
        for to_one in (True, False)
        for clip in (True, False)
    ),
    (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    ("DDIMScheduler", {"thresholding": True}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": [0]}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def _name(config: object) -> str:
    return str(config).replace(" ", "") if isinstance(config, dict) else str(config).removesuffix("Scheduler")


@pytest.mark.parametrize(("name", "config"), _CONFIGS, ids=_name)
def test_tolerance_zero_is_the_sequential_result(name: str, config: dict) -> None:
    sequential, ours, report = both(getattr(diffusers, name)(**config), tolerance=0)
    assert relative_difference(ours.sample, sequential.sample) <= 1e-5
    assert ours.calls <= sequential.calls
    assert report.stopped == "exact"
    assert report.rounds == ours.calls
    assert torch.equal(ours.generator, sequential.generator)  # the caller's next draw is the same too


@pytest.mark.parametrize("name", SERVED)
def test_float64_is_exact_to_rounding(name: str) -> None:
    sequential, ours, _ = both(getattr(diffusers, name)(), dtype=torch.float64, tolerance=0)
    bound = 1e-12 if name in (*_FLOAT64, "HeunDiscreteScheduler") else 1e-6
    assert relative_difference(ours.sample, sequential.sample) <= bound


@pytest.mark.parametrize("acceleration", ["none", "anderson", "secant"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_tolerance_saves_calls_and_is_kept(name: str, acceleration: str) -> None:
    config = {"clip_sample": False} if name == "DDIMScheduler" else {}
    sequential, ours, report = both(
        getattr(diffusers, name)(**config), steps=30, tolerance=1e-3, acceleration=acceleration
    )
    assert ours.calls < 0.7 * sequential.calls
    assert relative_difference(ours.sample, sequential.sample) <= 5e-3  # largest element; the tolerance is of the mean
    assert report.stopped == "converged"


@pytest.mark.parametrize("acceleration", ["none", "anderson", "secant"])
@pytest.mark.parametrize("coarse", [1, 4])
@pytest.mark.parametrize("window", [1, 4, None])
def test_every_way_to_go_has_the_same_limit(window: int | None, coarse: int, acceleration: str) -> None:
    sequential, ours, _ = both(
        diffusers.DDIMScheduler(clip_sample=False),
        tolerance=0,
        window=window,
        coarse=coarse,
        acceleration=acceleration,
    )
    assert relative_difference(ours.sample, sequential.sample) <= 1e-5
    assert ours.calls <= sequential.calls


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("DDPMScheduler", {"timesteps": [900, 700, 500, 400, 300, 200, 100, 50, 0]}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 700, 500, 400, 300, 200, 100, 50, 0]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 7.0, 3.0, 1.0, 0.5, 0.1, 0.0]}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]}),
    ],
)
def test_custom_timesteps_and_sigmas(name: str, timesteps: dict) -> None:
    sequential, ours, _ = both(getattr(diffusers, name)(), timesteps=timesteps, tolerance=0)
    assert relative_difference(ours.sample, sequential.sample) <= 1e-5


@settings(max_examples=25)
@given(
    steps=st.integers(1, 20),
    window=st.none() | st.integers(1, 24),
    tolerance=st.sampled_from([0.0, 1e-6, 1e-3, 1e-1]),
    most=st.none() | st.integers(1, 5),
    name=st.sampled_from(["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"]),
)
def test_rounds_and_error_are_bounded(
    steps: int, window: int | None, tolerance: float, most: int | None, name: str
) -> None:
    sequential, ours, report = both(
        getattr(diffusers, name)(), steps=steps, window=window, tolerance=tolerance, max_points_per_call=most
    )
    assert report.rounds <= sequential.calls
    assert relative_difference(ours.sample, sequential.sample) <= max(1e-5, 20 * tolerance)


def test_a_slice_of_the_timesteps_is_a_run_of_its_own() -> None:
    def tail(scheduler: object, model: Net) -> torch.Tensor:
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(5)
        sample = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for t in scheduler.timesteps[5:]:
                sample = scheduler.step(model(scheduler.scale_model_input(sample, t), t), t, sample).prev_sample
        return sample

    model, base = Net(), diffusers.EulerDiscreteScheduler()
    sequential = tail(base, model)
    ours = parallel(model, base, tolerance=0, check_cost=False)
    assert relative_difference(tail(ours, model), sequential) <= 1e-5
    assert ours.report.points == 7


def test_a_loop_over_a_list_of_timesteps_runs_sequentially_and_says_so() -> None:
    model, base = Net(), diffusers.DDIMScheduler()
    ours = parallel(model, base, check_cost=False)
    sample = start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    ours.set_timesteps(6)
    with torch.no_grad(), pytest.warns(UserWarning, match="steps aside"):
        for t in list(ours.timesteps):
            sample = ours.step(model(sample, t), t, sample).prev_sample
    base.set_timesteps(6)
    expected = start
    with torch.no_grad():
        for t in base.timesteps:
            expected = base.step(model(expected, t), t, expected).prev_sample
    assert torch.equal(sample, expected)


def test_a_warm_start_repeats_a_run_in_two_rounds() -> None:
    model, base = Net(), diffusers.DPMSolverMultistepScheduler()
    ours = parallel(model, base, tolerance=1e-4, warm_start=True, check_cost=False)
    first = loop(ours, model, 20, torch.float32)
    again = loop(ours, model, 20, torch.float32)
    assert again.calls == 2 < first.calls
    assert relative_difference(again.sample, first.sample) <= 1e-3
    assert loop(ours, model, 12, torch.float32).calls > 2  # another number of steps: the trajectory does not fit
    ours.detach()


def test_the_noise_norm_stops_as_paradigms_does() -> None:
    base = diffusers.DDIMScheduler(clip_sample=False)
    loose = both(base, steps=30, tolerance=0.1, norm="noise")
    tight = both(base, steps=30, tolerance=1e-3, norm="noise")
    assert loose[1].calls < tight[1].calls < 30
    assert relative_difference(tight[1].sample, tight[0].sample) < relative_difference(loose[1].sample, loose[0].sample)


def test_a_finished_run_lets_go_of_its_trajectory() -> None:
    model = Net()
    ours = parallel(model, diffusers.DDIMScheduler(), check_cost=False)
    loop(ours, model, 10, torch.float32)
    assert ours._picard_run._window is None
    ours.detach()
