"""What from_pipe puts on a pipeline's denoiser, beside what others put there, and that it comes off again."""

from __future__ import annotations

import diffusers
import dit_pipelines as dits
import pipelines as made
import pytest
import torch
from comparison import assert_same_image, counted_calls, sample

from forerun.picard.diffusers import PicardScheduler


def parallel(pipe):
    return PicardScheduler.from_pipe(pipe, tolerance=0, check_cost=False)


def assert_detached(pipe, arguments, base, sequential):
    """The base scheduler is back, its config too, and the pipeline's result to the bit."""
    pipe.scheduler = pipe.scheduler.detach()
    assert type(pipe.scheduler) is type(base)
    assert pipe.scheduler.config == base.config
    assert torch.equal(sample(pipe, arguments), sequential)


def test_detach():
    pipe, arguments = made.stable_diffusion()
    base, before = pipe.scheduler, dict(vars(pipe.unet))
    sequential = sample(pipe, arguments)
    pipe.scheduler = parallel(pipe)
    assert "forward" in vars(pipe.unet)
    sample(pipe, arguments)
    assert_detached(pipe, arguments, base, sequential)
    assert vars(pipe.unet) == before
    assert "forward" not in vars(pipe.unet)


def test_every_denoiser_is_hooked_and_freed():
    pipe, arguments = made.controlnet()
    base = pipe.scheduler
    sequential = sample(pipe, arguments)
    pipe.scheduler = parallel(pipe)
    assert hasattr(pipe.unet, "_diffusers_hook")
    assert hasattr(pipe.controlnet, "_diffusers_hook")
    sample(pipe, arguments)
    assert_detached(pipe, arguments, base, sequential)
    assert not hasattr(pipe.unet, "_diffusers_hook")
    assert not hasattr(pipe.controlnet, "_diffusers_hook")


def test_from_pipe_twice():
    pipe, arguments = made.stable_diffusion()
    base, before = pipe.scheduler, dict(vars(pipe.unet))
    sequential = sample(pipe, arguments)
    first = parallel(pipe)
    pipe.scheduler = parallel(pipe)
    assert list(pipe.unet._diffusers_hook.hooks) == ["forerun.picard"]
    assert_same_image(sample(pipe, arguments), sequential)
    pipe.scheduler = PicardScheduler.from_pipe(pipe, window=4)  # from a parallel one: its other choices stay
    assert pipe.scheduler.options.tolerance == 0
    assert not pipe.scheduler.options.check_cost
    assert list(pipe.unet._diffusers_hook.hooks) == ["forerun.picard"]
    assert_same_image(sample(pipe, arguments), sequential)
    assert_detached(pipe, arguments, base, sequential)
    assert vars(pipe.unet) == before
    first.detach()


def test_two_pipelines_with_one_denoiser():
    """Each takes its turn; taking one out leaves the other."""
    pipe, arguments = made.stable_diffusion()
    before, sequential = dict(vars(pipe.unet)), sample(pipe, arguments)
    other = diffusers.StableDiffusionPipeline(**{**pipe.components, "scheduler": made.ddim()})
    pipe.scheduler = parallel(pipe)
    assert torch.equal(sample(other, arguments), sequential)
    other.scheduler = PicardScheduler.from_pipe(other, tolerance=0, window=4, check_cost=False)
    for _ in range(2):
        for each, most in ((pipe, 10), (other, 4)):
            with counted_calls(each.unet) as calls:
                assert_same_image(sample(each, arguments), sequential)
            assert max(calls) == 4 * most  # two prompts, with guidance
    pipe.scheduler = pipe.scheduler.detach()
    assert other.scheduler._picard_binding._bound[0][1] is pipe.unet._diffusers_hook.hooks["forerun.picard"].around
    assert torch.equal(sample(pipe, arguments), sequential)
    assert_same_image(sample(other, arguments), sequential)
    other.scheduler.detach()
    assert vars(pipe.unet) == before


def test_a_plain_scheduler_in_its_place():
    """Assigning another scheduler without detaching leaves a hook that does nothing."""
    pipe, arguments = made.stable_diffusion()
    base = pipe.scheduler
    sequential = sample(pipe, arguments)
    pipe.scheduler = parallel(pipe)
    pipe.scheduler = base
    assert torch.equal(sample(pipe, arguments), sequential)


@pytest.fixture
def counting():
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    return Counting()


@pytest.mark.parametrize("first", [True, False])
def test_beside_an_accelerate_hook(counting, first):
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    pipe, arguments = made.stable_diffusion()
    base = pipe.scheduler
    sequential = sample(pipe, arguments)
    if first:
        add_hook_to_module(pipe.unet, counting)
    pipe.scheduler = parallel(pipe)
    if not first:
        add_hook_to_module(pipe.unet, counting)
    assert_same_image(sample(pipe, arguments), sequential)
    assert 0 < counting.calls <= 10
    counting.calls = 0
    assert_detached(pipe, arguments, base, sequential)
    assert counting.calls == 10  # theirs is left in place
    remove_hook_from_module(pipe.unet)
    assert torch.equal(sample(pipe, arguments), sequential)


def test_an_accelerate_hook_that_is_taken_off_and_put_on():
    """As model offloading does after every call of a pipeline."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipe, arguments = made.stable_diffusion()
    sequential = sample(pipe, arguments)
    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())
    pipe.scheduler = parallel(pipe)
    assert_same_image(sample(pipe, arguments), sequential)
    hooks.remove_hook_from_module(pipe.unet)
    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())
    with counted_calls(pipe.unet) as calls:
        assert_same_image(sample(pipe, arguments), sequential)
    assert max(calls) > min(calls)


@pytest.mark.parametrize("first", [True, False])
def test_lora(first):
    peft = pytest.importorskip("peft")
    pipe, arguments = made.stable_diffusion()
    without = sample(pipe, arguments)
    if not first:
        pipe.scheduler = parallel(pipe)
    torch.manual_seed(1)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    if first:
        sequential = sample(pipe, arguments)
        pipe.scheduler = parallel(pipe)
        exact = sample(pipe, arguments)
    else:
        exact = sample(pipe, arguments)
        pipe.scheduler = pipe.scheduler.detach()
        sequential = sample(pipe, arguments)
    assert not torch.equal(sequential, without)
    assert_same_image(exact, sequential)


COMPILED = {
    "in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "wrapped": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
}


# A wrapper made after from_pipe is another module, which from_pipe has not seen.
@pytest.mark.parametrize(("way", "first"), [("in place", True), ("in place", False), ("wrapped", True)])
def test_compiled_denoiser(way, first):
    """The model is compiled alone: the widening stays outside its graph, and costs it no recompilation."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    pipe, arguments = dits.dit()
    base = pipe.scheduler
    sequential = sample(pipe, arguments)
    if first:
        COMPILED[way](pipe)
    pipe.scheduler = parallel(pipe)
    if not first:
        COMPILED[way](pipe)
    assert_same_image(sample(pipe, arguments), sequential)
    assert 0 < counters["stats"]["unique_graphs"] <= 3  # one batch, several, and the last point's again
    assert not counters["graph_break"]
    pipe.scheduler = pipe.scheduler.detach()
    assert type(pipe.scheduler) is type(base)
    assert_same_image(sample(pipe, arguments), sequential)
    torch._dynamo.reset()
