"""Contracts with diffusers: every symbol that forerun stands on exists and takes what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from forerun.picard.diffusers import SERVED
from forerun_adapters import diffusers as host


def test_hooks_replace_a_forward_and_keep_the_original() -> None:
    assert {"check_if_exists_or_initialize", "register_hook", "remove_hook", "get_hook"} <= set(dir(HookRegistry))
    assert list(inspect.signature(HookRegistry.register_hook).parameters) == ["self", "hook", "name"]
    assert "recurse" in inspect.signature(HookRegistry.remove_hook).parameters
    assert "fn_ref" in vars(ModelHook())


def test_a_hooked_module_is_as_it_was_afterwards() -> None:
    module = torch.nn.Linear(2, 2)
    before = dict(vars(module))
    host.hook_forward(module, "test", lambda forward, x: forward(x) + 1)
    assert torch.allclose(module(torch.zeros(1, 2)), module.bias + 1)
    with pytest.raises(RuntimeError, match="hooked by 'test' already"):
        host.hook_forward(module, "test", lambda forward, x: forward(x))
    host.unhook_forward(module, "test")
    host.unhook_forward(module, "test")  # twice is once
    assert dict(vars(module)) == before


def test_another_hook_stays() -> None:
    class Doubles(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    module = torch.nn.Linear(2, 2)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Doubles(), "doubles")
    host.hook_forward(module, "test", lambda forward, x: forward(x) + 1)
    host.unhook_forward(module, "test")
    assert torch.allclose(module(torch.zeros(1, 2)), 2 * module.bias)


@pytest.mark.parametrize("name", SERVED)
def test_a_served_scheduler_has_the_shape_that_sweeps_need(name: str) -> None:
    scheduler = host.scheduler_class(name)
    step = inspect.signature(scheduler.step).parameters
    assert {"model_output", "timestep", "sample", "return_dict"} <= set(step)
    assert hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")
    assert hasattr(scheduler, "set_timesteps")


def test_a_scheduler_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no scheduler named 'NoScheduler'"):
        host.scheduler_class("NoScheduler")
    with pytest.raises(ValueError, match="no scheduler named 'UNet2DModel'"):
        host.scheduler_class("UNet2DModel")


def test_signatures_are_seen_through_hooks_and_compilation() -> None:
    module = diffusers.UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    compiled = torch.compile(module, backend="eager")
    assert host.family_name(compiled) == "UNet2DModel"
    assert list(host.forward_signature(compiled).parameters)[:2] == ["sample", "timestep"]


def test_a_pipelines_call_is_seen_from_inside_only() -> None:
    class Looking(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, batch_size: int = 1, eta: float = 0.25) -> object:
            return host.pipeline_arguments(self), host.running_pipeline()

    pipe = Looking(unet=torch.nn.Linear(1, 1), scheduler=diffusers.DDPMScheduler())
    assert pipe(batch_size=3) == ({"batch_size": 3, "eta": 0.25}, pipe)
    assert host.pipeline_arguments(pipe) is None
    assert host.running_pipeline() is None


def test_a_stranger_is_not_a_pipeline() -> None:
    with pytest.raises(TypeError, match="takes a diffusers pipeline, and got a Linear"):
        host.pipeline_denoisers(torch.nn.Linear(1, 1))


def test_a_pipeline_from_a_folder_and_its_models_names(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    assert host.model_name(unet) == "UNet2DModel"
    assert host.model_name(torch.nn.Linear(1, 1)) == "Linear"
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    pipe = host.load_pipeline(str(tmp_path), "cpu")
    assert host.model_name(pipe.unet) == str(tmp_path / "unet")
    assert host.component_name(pipe, pipe.unet) == "unet"
    assert {"batch_size", "generator", "num_inference_steps"} <= host.call_arguments(pipe)


def test_taking_a_hook_off_returns_what_it_called() -> None:
    def around(forward: Callable[..., Any], *args: Any) -> Any:
        return forward(*args)

    module = torch.nn.Linear(1, 1)
    assert host.unhook_forward(module, "test") is None
    for compiled in (False, True):
        if compiled:
            module.compile(backend="eager")
        host.hook_forward(module, "test", around)
        assert host.unhook_forward(module, "test") is around
