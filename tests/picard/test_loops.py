"""The reader of loops, on diffusers' own pipelines: what computes from the step is told from what does not."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from forerun.picard.loops import computed_from_the_step


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "PixArtAlphaPipeline",
        "WanPipeline",
        "CogVideoXPipeline",
        "StableAudioPipeline",
        "StableVideoDiffusionPipeline",
        "AnimateDiffPipeline",
        "DiTPipeline",
        "LDMTextToImagePipeline",
        "DDIMPipeline",
        "DDPMPipeline",
        "AuraFlowPipeline",
        "MochiPipeline",
    ],
)
def test_nothing_is_found_where_only_whole_timesteps_are_handed_on(name: str) -> None:
    assert computed_from_the_step(getattr(diffusers, name)) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("SemanticStableDiffusionPipeline", "i >= edit_warmup_steps_c"),
        ("StableDiffusionAttendAndExcitePipeline", "i < max_iter_to_alter"),
        ("StableDiffusionLatentUpscalePipeline", "sigma = self.scheduler.sigmas[i]"),
        ("StableDiffusionDiffEditPipeline", "image_latents[i]"),
        ("UnCLIPPipeline", "prev_timestep = prior_timesteps_tensor[i + 1]"),
    ],
)
def test_what_is_computed_from_the_step_is_found(name: str, line: str) -> None:
    assert any(line in found for found in computed_from_the_step(getattr(diffusers, name)))


class _OfAUser:
    def __call__(self, steps: int) -> Any:
        for i, t in enumerate(self.timesteps):
            scale = 7.5 if i < steps // 2 else 1.0
            weight = float(t) / 1000
            self.step(scale, weight, t)


def test_a_users_own_loop_is_read_too() -> None:
    assert computed_from_the_step(_OfAUser) == ["scale = 7.5 if i < steps // 2 else 1.0", "weight = float(t) / 1000"]


def test_a_class_without_source_is_let_through() -> None:
    assert computed_from_the_step(dict) == []
