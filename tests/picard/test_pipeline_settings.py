"""Settings of a pipeline's call and of the parallel run; each against the sequential run of one seed."""

from __future__ import annotations

import diffusers
import dit_pipelines as dits
import pipelines as made
import pytest
import torch
from comparison import assert_exact_and_faster, assert_same_image, counted_calls, sample

from forerun.picard.diffusers import PicardScheduler


@pytest.fixture(scope="module")
def stable_diffusion():
    return made.stable_diffusion()


@pytest.fixture
def exact(stable_diffusion):
    """The pipeline under a parallel scheduler at tolerance 0, its arguments, and its sequential result."""
    pipe, arguments = stable_diffusion
    base = pipe.scheduler
    sequential = sample(pipe, arguments)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False)
    yield pipe, arguments, sequential
    if isinstance(pipe.scheduler, PicardScheduler):
        pipe.scheduler.detach()
    pipe.scheduler = base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [made.stable_diffusion, dits.cogvideox], ids=lambda b: b.__name__)
def test_half_precision(build, dtype):
    """Equal up to a few ulp, as batched and single matrix products may round differently (measured: to the bit).

    CogVideoX computes its guidance in float32 and casts the latents back after every step.
    """
    pipe, arguments = build()
    pipe.to(dtype)
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    assert_exact_and_faster((pipe, arguments), within=4 * torch.finfo(dtype).eps, error=0.05, tolerance=1e-2)


def test_a_generator_for_each_sample(stable_diffusion):
    pipe, arguments = stable_diffusion
    base = pipe.scheduler
    pipe.scheduler = diffusers.DDPMScheduler(**made.LATENT, clip_sample=False, steps_offset=1)

    def each():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    try:
        sequential_generators, generators = each(), each()
        sequential = sample(pipe, arguments, generator=sequential_generators)
        pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False)
        assert_same_image(sample(pipe, arguments, generator=generators), sequential)
        for left, right in zip(generators, sequential_generators, strict=True):
            assert torch.equal(left.get_state(), right.get_state())
    finally:
        pipe.scheduler.detach()
        pipe.scheduler = base


@pytest.mark.parametrize("options", [{"max_points_per_call": 3}, {"window": 4}, {"acceleration": "anderson"}])
@pytest.mark.parametrize("build", [made.stable_diffusion, made.controlnet, dits.dit], ids=lambda b: b.__name__)
def test_options(build, options):
    assert_exact_and_faster(build(), options=options, error=None)


def test_a_call_is_cut_into_parts(exact):
    pipe, arguments, sequential = exact
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False, max_points_per_call=3)
    with counted_calls(pipe.unet) as calls:
        assert_same_image(sample(pipe, arguments), sequential)
    assert max(calls) == 3 * 4  # points, rows of two prompts under guidance


def test_inference_mode(exact):
    pipe, arguments, sequential = exact
    with torch.inference_mode():
        assert_same_image(sample(pipe, arguments), sequential)


def test_custom_timesteps(stable_diffusion):
    pipe, _ = stable_diffusion
    base = pipe.scheduler
    scheduler = diffusers.EulerDiscreteScheduler(**made.LATENT, steps_offset=1)
    assert_exact_and_faster(stable_diffusion, scheduler, timesteps=[951, 801, 655, 500, 333, 201, 100, 1])
    assert_exact_and_faster(stable_diffusion, scheduler, sigmas=[14.0, 9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    pipe.scheduler = base


def test_callback_fires_once_a_round(exact):
    pipe, arguments, _ = exact
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=1e-3, check_cost=False)
    seen = []

    def callback(pipe, i, t, given):
        seen.append((i, given["latents"].shape, given["prompt_embeds"].shape))
        return given

    result = sample(
        pipe,
        arguments,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert len(seen) == pipe.scheduler.report.rounds < 10
    assert seen == [(i, result.shape, (4, 16, 32)) for i in range(len(seen))]


def test_an_interrupted_loop(exact):
    """`_interrupt` ends the loop early, as it does for the base scheduler; the next call is a whole one."""
    pipe, arguments, sequential = exact

    def interrupt(pipe, i, t, given):
        pipe._interrupt = i == 2
        return {}

    with counted_calls(pipe.unet) as calls:
        sample(pipe, arguments, callback_on_step_end=interrupt)
    assert len(calls) == 3
    assert pipe.scheduler.report.stopped == "interrupted"
    assert_same_image(sample(pipe, arguments), sequential)


@pytest.mark.parametrize("at", [1, 3])
def test_after_an_exception(exact, at):
    """The pipeline can be used again, and so can the denoiser alone, though the traceback still holds the loop."""
    pipe, arguments, sequential = exact

    def fail(_, given):
        nonlocal at
        at -= 1
        if at == 0:
            raise MemoryError("the model")

    hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError) as kept:
        sample(pipe, arguments)
    hook.remove()
    alone = pipe.unet(torch.randn(3, 4, 8, 8), torch.tensor(5), torch.randn(3, 16, 32)).sample
    assert alone.shape == (3, 4, 8, 8)
    assert_same_image(sample(pipe, arguments), sequential)
    del kept


def test_another_batch_and_step_count(exact):
    """One scheduler serves calls of different shapes, one after the other."""
    pipe, arguments, sequential = exact
    assert sample(pipe, {**arguments, "prompt": "a cat"}, num_inference_steps=5).shape[0] == 1
    assert_same_image(sample(pipe, arguments), sequential)


def test_unbound():
    """A pipeline without conditioning needs no hook: its whole batch is the window."""
    for kind, base in (
        (diffusers.DDIMPipeline, "DDIMScheduler"),
        (diffusers.DDPMPipeline, "DDPMScheduler"),
    ):
        pipe, arguments = made.unconditional(kind, made.brief(getattr(diffusers, base)))
        sequential = sample(pipe, arguments)
        pipe.scheduler = PicardScheduler.from_config(pipe.scheduler.config, base=base, tolerance=0)
        with counted_calls(pipe.unet) as calls:
            assert_same_image(sample(pipe, arguments), sequential)
        assert len(calls) <= 10
        assert max(calls) == 2 * 9
        pipe.scheduler = PicardScheduler.from_config(pipe.scheduler.config, base=base, tolerance=1e-3)
        with counted_calls(pipe.unet) as calls:
            assert_same_image(sample(pipe, arguments), sequential, 0.02)
        assert len(calls) < 10
