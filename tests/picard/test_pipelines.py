"""Real diffusers pipelines: the base scheduler against `PicardScheduler`, one seed."""

from __future__ import annotations

import inspect

import diffusers
import dit_pipelines as dits
import pipelines as made
import pytest
import torch
from comparison import assert_exact_and_faster, counted_calls, sample
from pipelines import LATENT

pytestmark = [  # both Stable Audio's: its vae, and the noise of its cosine scheduler
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
]


@pytest.fixture(scope="module")
def stable_diffusion():
    return made.stable_diffusion()


CLASSIC = {
    "DDIM": lambda: made.ddim(),
    "DDPM": lambda: diffusers.DDPMScheduler(**LATENT, clip_sample=False, steps_offset=1),
    "PNDM": lambda: diffusers.PNDMScheduler(**LATENT, skip_prk_steps=True, steps_offset=1),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**LATENT, steps_offset=1),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**LATENT, steps_offset=1),
    "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**LATENT, use_karras_sigmas=True, steps_offset=1),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**LATENT, steps_offset=1),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**LATENT, steps_offset=1),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(**LATENT, steps_offset=1),
}


@pytest.mark.parametrize("scheduler", CLASSIC)
def test_stable_diffusion(stable_diffusion, scheduler):
    assert_exact_and_faster(stable_diffusion, CLASSIC[scheduler]())


def test_stable_diffusion_with_everything_that_guidance_takes(stable_diffusion):
    assert_exact_and_faster(
        stable_diffusion, negative_prompt=["bad", "ugly"], num_images_per_prompt=2, guidance_rescale=0.7
    )


def test_stable_diffusion_without_guidance(stable_diffusion):
    assert_exact_and_faster(stable_diffusion, guidance_scale=1.0)


def test_stable_diffusion_decoded(stable_diffusion):
    assert_exact_and_faster(stable_diffusion, output_type="pt", within=1e-4)  # the random decoder amplifies


PIPELINES = {
    "SDXL": (made.stable_diffusion_xl, None),
    "SDXL, DPM++ 2M": (made.stable_diffusion_xl, CLASSIC["DPM++ 2M"]),
    "SD3": (dits.stable_diffusion_3, None),
    "SD3, Heun": (dits.stable_diffusion_3, lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "FLUX": (dits.flux, None),
    "FLUX, guidance by a second call": (lambda: dits.flux(true_cfg_scale=3.0), None),
    "PixArt": (dits.pixart, None),
    "PixArt, Euler": (dits.pixart, CLASSIC["Euler"]),
    "Wan": (dits.wan, None),
    "Wan, flow-match Euler": (dits.wan, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "CogVideoX": (dits.cogvideox, None),
    "CogVideoX, DPM": (dits.cogvideox, lambda: diffusers.CogVideoXDPMScheduler()),
    "Stable Audio": (dits.stable_audio, None),
    "Stable Audio, cosine": (dits.stable_audio, lambda: diffusers.CosineDPMSolverMultistepScheduler()),
    "ControlNet": (made.controlnet, None),
    "ControlNet, UniPC": (made.controlnet, CLASSIC["UniPC"]),
    "two ControlNets": (lambda: made.controlnet(2), None),
    "InstructPix2Pix": (made.instruct_pix2pix, None),
    "InstructPix2Pix, DDIM": (made.instruct_pix2pix, CLASSIC["DDIM"]),
    "inpainting, 9 channels": (made.inpaint, None),
    "inpainting, 9 channels, PNDM": (made.inpaint, CLASSIC["PNDM"]),
    "image to image": (made.image_to_image, None),
    "image to image, DPM++ 2M": (made.image_to_image, CLASSIC["DPM++ 2M"]),
    "image to image, Euler": (made.image_to_image, CLASSIC["Euler"]),
    "DiT": (dits.dit, None),
    "DiT, DPM++ 2M": (dits.dit, lambda: diffusers.DPMSolverMultistepScheduler(num_train_timesteps=100)),
    "latent diffusion": (made.latent_diffusion, None),
    "latent diffusion, PNDM": (made.latent_diffusion, CLASSIC["PNDM"]),
    "AnimateDiff": (made.animate_diff, None),
    "Stable Video": (made.stable_video, None),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name):
    build, scheduler = PIPELINES[name]
    assert_exact_and_faster(build(), None if scheduler is None else scheduler(), num_inference_steps=_steps(name))


def _steps(name):
    return 16 if "image to image" in name else 10  # of which it runs 0.6


def test_two_experts():
    """Wan 2.2: a sweep ends where the second transformer takes over."""
    if "transformer_2" not in inspect.signature(diffusers.WanPipeline.__init__).parameters:
        pytest.skip("this diffusers has no second transformer in WanPipeline")
    pipe, arguments = dits.wan(2, boundary_ratio=0.6)
    with counted_calls(pipe.transformer_2) as second:
        sample(pipe, arguments)
        assert 0 < len(second) < 20  # both are used
    assert_exact_and_faster((pipe, arguments), guidance_scale_2=2.0)


def test_controlnet_in_guess_mode():
    assert_exact_and_faster(made.controlnet(), guess_mode=True)


def test_denoising_end():
    """The base model of a base and refiner pair runs only the first part of the timesteps."""
    assert_exact_and_faster(made.stable_diffusion_xl(), denoising_end=0.7)


def test_dit_without_guidance():
    assert_exact_and_faster(dits.dit(), guidance_scale=1.0)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_pipeline(eta):
    assert_exact_and_faster(made.unconditional(diffusers.DDIMPipeline, made.brief(diffusers.DDIMScheduler)), eta=eta)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_ddpm_pipeline(kind):
    scheduler = made.brief(getattr(diffusers, kind))
    assert_exact_and_faster(made.unconditional(diffusers.DDPMPipeline, scheduler))


def test_prompts_and_timesteps_matter():
    """The random models listen to what a wrong widening would mix up, far beyond what the tests above allow."""
    pipe, arguments = made.stable_diffusion()
    one = sample(pipe, arguments)
    other = sample(pipe, {**arguments, "prompt": ["a car", "dig"]})
    assert (one - other).abs().max() > 1e-3 * one.abs().max()
    noise, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with torch.no_grad():
        early, late = (pipe.unet(noise, torch.tensor(t), embeds).sample for t in (901, 801))
    assert (early - late).abs().max() > 1e-3 * early.abs().max()
