"""A Picard Consistency Model on a compiled denoiser is heard, whenever it comes, however that is compiled."""

from __future__ import annotations

import diffusers
import pipelines as made
import pytest
import torch
from comparison import assert_same_image, sample
from consistency_models import as_found, consistency, random_lora, tuned

from forerun.picard.diffusers import PicardScheduler


def _in_place(pipe):
    pipe.unet.compile(backend="eager")


def _wrapped(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def _forward(pipe):
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")


def _inside(pipe):
    for block in pipe.unet.up_blocks:
        block.compile(backend="eager")
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _early(pipe, arguments, **options):
    """What two sweeps make, with a PCM's answers in it: it differs as soon as the PCM is not heard."""
    base = pipe.scheduler
    pipe.scheduler = PicardScheduler.from_pipe(
        pipe, exact=False, sweeps=2, switch="hard", check_cost=False, acceleration="none", **options
    )
    made = sample(pipe, arguments)
    pipe.scheduler.detach()
    pipe.scheduler = base
    return made


@pytest.mark.parametrize(
    ("compiled", "kind"),
    [(_in_place, "LoRA"), (_wrapped, "LoRA"), (_forward, "LoRA"), (_inside, "LoRA"), (_wrapped, "whole")],
)
def test_a_pcm_after_the_first_compiled_call(compiled, kind):
    pipe, arguments = made.unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler(clip_sample=False))
    change = random_lora(pipe.unet, 0.1) if kind == "LoRA" else tuned(pipe.unet, 0.05)
    pcm = consistency(pipe.unet, change, rank=4 if kind == "LoRA" else None)
    sequential, without = sample(pipe, arguments), _early(pipe, arguments)
    expected = _early(pipe, arguments, pcm=pcm)
    compiled(pipe)
    assert_same_image(sample(pipe, arguments), sequential)
    before = as_found(pipe.unet)
    graphs = []
    for _ in range(2):
        assert_same_image(_early(pipe, arguments, pcm=pcm), expected, 1e-4)
        assert_same_image(_early(pipe, arguments), without, 1e-4)
        assert_same_image(sample(pipe, arguments), sequential)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0  # compiled once each
    assert float((expected - without).abs().max() / without.abs().max()) > 1e-2
    assert as_found(pipe.unet) == before
