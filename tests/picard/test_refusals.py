"""What a sweep would get wrong is refused by name, before the model is asked about more than one point."""

from __future__ import annotations

import inspect

import diffusers
import dit_pipelines as dits
import pipelines as made
import pytest
import torch
from comparison import assert_same_image, counted_calls, denoisers, sample

from forerun.picard.diffusers import SERVED, PicardScheduler


def assert_refused(made_pipe, naming, error=ValueError, **more):
    """The pipeline's call raises, its message names the reason, and the model has run once at most, at one point."""
    pipe, arguments = made_pipe
    try:
        with counted_calls(*denoisers(pipe)) as calls, pytest.raises(error, match=naming):
            if not isinstance(pipe.scheduler, PicardScheduler):
                pipe.scheduler = PicardScheduler.from_pipe(pipe, check_cost=False)
            sample(pipe, arguments, **more)
        assert len(calls) <= 1
    finally:
        if isinstance(pipe.scheduler, PicardScheduler):
            pipe.scheduler = pipe.scheduler.detach()


@pytest.fixture(scope="module")
def stable_diffusion():
    return made.stable_diffusion()


def test_inpainting_by_blending():
    assert_refused(made.inpaint(channels=4), "4-channel")


@pytest.mark.parametrize("argument", [{"control_guidance_end": 0.5}, {"control_guidance_start": 0.2}])
def test_a_controlnet_that_switches(argument):
    assert_refused(made.controlnet(), next(iter(argument)), **argument)


def test_dynamic_guidance():
    assert_refused(dits.cogvideox(), "use_dynamic_cfg", use_dynamic_cfg=True)


def test_skipped_layers():
    assert_refused(dits.stable_diffusion_3(), "skip_guidance_layers", skip_guidance_layers=[0])


def test_timesteps_per_token():
    if "expand_timesteps" not in inspect.signature(diffusers.WanPipeline.__init__).parameters:
        pytest.skip("this diffusers has no expand_timesteps in WanPipeline")
    assert_refused(dits.wan(expand_timesteps=True), "expand_timesteps")


def test_an_argument_through_a_subclass():
    """A pipeline that hands its arguments on does not hide them."""

    class Wrapping(diffusers.StableDiffusionControlNetPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe, arguments = made.controlnet()
    wrapping = Wrapping(**pipe.components, requires_safety_checker=False)
    assert_refused((wrapping, arguments), "control_guidance_end", control_guidance_end=0.5)


CALLBACKS = {
    "latents returned": (lambda pipe, i, t, given: {"latents": given["latents"] * 1.5}, "latents"),
    "latents returned, another shape": (lambda pipe, i, t, given: {"latents": given["latents"][:1]}, "latents"),
    "latents written": (lambda pipe, i, t, given: {"latents": given["latents"].mul_(1.5)}, "latents"),
    "prompts returned": (
        lambda pipe, i, t, given: {"prompt_embeds": given["prompt_embeds"] * 2},
        "encoder_hidden_states",
    ),
    "prompts written": (
        lambda pipe, i, t, given: {"prompt_embeds": given["prompt_embeds"].mul_(2)},
        "encoder_hidden_states",
    ),
    "guidance": (lambda pipe, i, t, given: setattr(pipe, "_guidance_scale", 3.0) or given, "_guidance_scale"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_changes(stable_diffusion, name):
    callback, naming = CALLBACKS[name]
    assert_refused(
        stable_diffusion,
        naming,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )


@pytest.mark.parametrize("name", ["latents returned", "a little", "latents written", "prompts returned", "guidance"])
def test_a_callback_that_changes_later(stable_diffusion, name):
    """Sweeps have run by then; the change is refused all the same."""
    pipe, arguments = stable_diffusion
    a_little = (lambda pipe, i, t, given: {"latents": given["latents"] * 1.00001}, "latents")
    callback, naming = {**CALLBACKS, "a little": a_little}[name]
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False)
    try:
        with pytest.raises(ValueError, match=naming):
            sample(
                pipe,
                arguments,
                callback_on_step_end=lambda pipe, i, t, given: callback(pipe, i, t, given) if i == 3 else {},
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            )
    finally:
        pipe.scheduler = pipe.scheduler.detach()


def test_a_pipeline_that_edits_latents():
    """Its scheduler is handed something else than it returned."""

    class Editing(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, num_inference_steps, generator, **_):
            image = torch.randn(2, 3, 8, 8, generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                image = self.scheduler.step(self.unet(image, t).sample, t, image).prev_sample
                image[..., :4] = 0.0
            return (image,)

    assert_refused(made.unconditional(Editing, made.brief(diffusers.DDPMScheduler)), "latents")


def test_a_scheduler_that_is_not_served(stable_diffusion):
    pipe, arguments = stable_diffusion
    base = pipe.scheduler
    pipe.scheduler = diffusers.KDPM2DiscreteScheduler(**made.LATENT, steps_offset=1)
    try:
        assert_refused((pipe, arguments), f"KDPM2DiscreteScheduler.*{SERVED[0]}.*{SERVED[-1]}")
    finally:
        pipe.scheduler = base


def test_flow_matching_with_its_own_noise():
    pipe, arguments = dits.stable_diffusion_3()
    if "stochastic_sampling" not in pipe.scheduler.config:
        pytest.skip("this diffusers has no stochastic_sampling")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert_refused((pipe, arguments), "stochastic_sampling")


def test_a_denoiser_that_is_not_known(stable_diffusion):
    class HomemadeUNet(diffusers.UNet2DConditionModel):
        pass

    pipe, arguments = stable_diffusion
    known = pipe.unet
    pipe.unet = HomemadeUNet(**known.config)
    try:
        assert_refused((pipe, arguments), "HomemadeUNet.*unbatched")
        sequential = sample(pipe, arguments)
        pipe.scheduler = PicardScheduler.from_pipe(pipe, unbatched=(), tolerance=0, check_cost=False)
        assert_same_image(sample(pipe, arguments), sequential)
    finally:
        pipe.scheduler = pipe.scheduler.detach()
        pipe.unet = known


def test_a_conditional_pipeline_without_from_pipe(stable_diffusion):
    pipe, arguments = stable_diffusion
    pipe.scheduler = PicardScheduler.from_config(pipe.scheduler.config, base="DDIMScheduler")
    assert_refused((pipe, arguments), "from_pipe", error=RuntimeError)


def test_arguments_of_from_pipe(stable_diffusion):
    pipe, _ = stable_diffusion
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        PicardScheduler.from_pipe(pipe.unet)
    with pytest.raises(TypeError, match="windwo"):
        PicardScheduler.from_pipe(pipe, windwo=3)
    for option in ({"window": 0}, {"tolerance": -1.0}, {"max_points_per_call": 0}, {"acceleration": "fast"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            PicardScheduler.from_pipe(pipe, **option)
    assert not hasattr(pipe.unet, "_diffusers_hook")


def test_more_than_one_video_a_batch():
    assert_refused(made.stable_video(), "2 videos at once", num_videos_per_prompt=2)
