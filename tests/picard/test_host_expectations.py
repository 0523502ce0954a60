"""What diffusers' own scheduler tests expect of every scheduler, asked of ours."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from forerun.picard import diffusers as drop_in
from forerun.picard.diffusers import SERVED, PicardScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
    # A single step, not scaled before: LMS warns, and steps.
    pytest.mark.filterwarnings("ignore:The `scale_model_input` function should be called:UserWarning"),
]


def _ours(name: str, **kwargs: Any) -> Any:
    return PicardScheduler.from_config(getattr(diffusers, name)().config, base=name, **kwargs)


def _chosen(config: Any) -> dict[str, Any]:
    """What a user chose: diffusers notes in the config which values were defaults and who wrote the file."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _pair(name: str) -> tuple[Any, Any]:
    base, ours = getattr(diffusers, name)(), _ours(name)
    for scheduler in (base, ours):
        scheduler.set_timesteps(10)
    return base, ours


@pytest.mark.parametrize("name", SERVED)
def test_is_the_base_class_under_its_own_name(name: str) -> None:
    ours = _ours(name)
    assert isinstance(ours, getattr(diffusers, name))
    assert isinstance(ours, PicardScheduler)
    assert type(ours) is getattr(drop_in, f"Picard{name}")
    assert set(ours.compatibles) == set(getattr(diffusers, name)().compatibles)
    assert ours.order == getattr(diffusers, name)().order
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(ours, method)) == inspect.signature(
            getattr(getattr(diffusers, name)(), method)
        )
    assert hasattr(ours, "scale_model_input") == hasattr(getattr(diffusers, name), "scale_model_input")


@pytest.mark.parametrize("name", SERVED)
def test_config_round_trip(name: str, tmp_path: Any) -> None:
    ours = _ours(name, window=5, tolerance=1e-2)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == f"Picard{name}"
    for again in (PicardScheduler.from_pretrained(tmp_path), type(ours).from_pretrained(tmp_path)):
        assert type(again) is type(ours)
        assert again.options == ours.options
        assert _chosen(again.config) == _chosen(ours.config)
        assert again.config["_picard"] == ours.config["_picard"]
    plain = getattr(diffusers, name).from_pretrained(tmp_path)  # a base class reads it as its own
    assert type(plain) is getattr(diffusers, name)
    assert type(ours.detach()) is getattr(diffusers, name)
    assert _chosen(ours.detach().config) == _chosen(getattr(diffusers, name)().config)


@pytest.mark.parametrize("name", SERVED)
def test_a_single_step_outside_a_loop_is_the_base_schedulers(name: str) -> None:
    base, ours = _pair(name)
    sample, output = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    t = base.timesteps[0]
    extra = (
        {"generator": torch.Generator().manual_seed(0)}
        if "generator" in inspect.signature(base.step).parameters
        else {}
    )
    again = {"generator": torch.Generator().manual_seed(0)} if extra else {}
    arguments = (output, None, t, None, sample) if name == "CogVideoXDPMScheduler" else (output, t, sample)
    expected = base.step(*arguments, **extra, return_dict=False)[0]
    result = ours.step(*arguments, **again, return_dict=False)[0]
    assert torch.equal(result, expected)
    assert result.shape == sample.shape
    assert result.dtype == sample.dtype


@pytest.mark.parametrize("name", SERVED)
def test_noise_and_timesteps_are_the_base_schedulers(name: str) -> None:
    base, ours = _pair(name)
    assert torch.equal(ours.timesteps, base.timesteps)
    assert len(ours.timesteps) == len(base.timesteps)
    assert np.array_equal(ours.timesteps.cpu().numpy(), base.timesteps.cpu().numpy())
    sample, noise = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    add = "add_noise" if hasattr(base, "add_noise") else "scale_noise"
    arguments = (sample, noise, base.timesteps[:1]) if add == "add_noise" else (sample, base.timesteps[:1], noise)
    assert torch.equal(getattr(ours, add)(*arguments), getattr(base, add)(*arguments))


def test_another_base_can_be_chosen_for_a_config() -> None:
    ours = PicardScheduler.from_config(diffusers.DDIMScheduler().config, base="DPMSolverMultistepScheduler", window=4)
    assert isinstance(ours, diffusers.DPMSolverMultistepScheduler)
    assert ours.options.window == 4
    back = diffusers.EulerDiscreteScheduler.from_config(ours.config)  # and one of diffusers' own from ours
    assert type(back) is diffusers.EulerDiscreteScheduler


def test_what_is_not_served_is_named_with_what_is() -> None:
    with pytest.raises(
        ValueError, match=r"KDPM2DiscreteScheduler is not a scheduler that forerun serves; .*DDIMScheduler"
    ):
        PicardScheduler.from_config(diffusers.DDIMScheduler().config, base="KDPM2DiscreteScheduler")
    with pytest.raises(ValueError, match="names no scheduler class"):
        PicardScheduler.from_config({})
    with pytest.raises(AttributeError, match="PicardNothing"):
        _ = drop_in.PicardNothing
