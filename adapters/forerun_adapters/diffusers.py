"""diffusers, 0.33.1 to 0.42: the classes and hooks that `forerun.picard` stands on.

Versions differ in nothing that the plugin needs so far; the contract tests of every symbol used here are in
`tests/adapters/test_diffusers.py`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from forerun_adapters._require import require

require("diffusers")

import diffusers  # noqa: E402
from diffusers.hooks import HookRegistry, ModelHook  # noqa: E402

__all__ = [
    "SchedulerMixin",
    "call_arguments",
    "checkpoint_gradients",
    "component_name",
    "forward_signature",
    "hook_forward",
    "is_hooked",
    "is_hooked_last",
    "load_pipeline",
    "load_scheduler_config",
    "model_config",
    "model_name",
    "pipeline_arguments",
    "pipeline_denoisers",
    "running_pipeline",
    "scheduler_class",
    "scheduler_defaults",
    "unhook_forward",
]

SchedulerMixin: Any = diffusers.SchedulerMixin

# Components that a pipeline calls once or more for every step.
_DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "adapter_controlnet")


def scheduler_class(name: str) -> type[Any]:
    """A scheduler class of diffusers by its name.

    Raises:
        ValueError: diffusers has no scheduler of that name.
    """
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no scheduler named {name!r}")
    return found


def scheduler_defaults(scheduler: type[Any]) -> frozenset[str]:
    """Names of the arguments that a scheduler class is made with."""
    return frozenset(inspect.signature(scheduler.__init__).parameters) - {"self"}


def load_scheduler_config(path: Any, **kwargs: Any) -> dict[str, Any]:
    """The config in a scheduler's folder or repository, whichever class wrote it."""
    config: dict[str, Any] = diffusers.DDIMScheduler.load_config(path, **kwargs)  # SchedulerMixin alone has no reader
    return config


def load_pipeline(path: str, device: str) -> Any:
    """A pipeline from a folder or a repository, on a device."""
    return diffusers.DiffusionPipeline.from_pretrained(path).to(device)


def pipeline_denoisers(pipe: Any) -> list[nn.Module]:
    """The modules that a pipeline's loop calls at every step."""
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"from_pipe takes a diffusers pipeline, and got a {type(pipe).__name__}")
    found = (getattr(pipe, name, None) for name in _DENOISERS)
    return [module for module in found if isinstance(module, nn.Module)]


def component_name(pipe: Any, module: nn.Module) -> str:
    """The pipeline's name of one of its models."""
    return next(name for name in _DENOISERS if getattr(pipe, name, None) is module)


def model_name(module: nn.Module) -> str:
    """What a model was loaded from; its class where that is not known."""
    config = getattr(_unwrapped(module), "config", {})
    return str(getattr(config, "_name_or_path", "") or family_name(module))


def model_config(module: nn.Module) -> str:
    """The config as JSON, from which diffusers makes the model again; "" for a module that is not diffusers' own."""
    as_json: Any = getattr(_unwrapped(module), "to_json_string", None)
    return "" if as_json is None else str(as_json())


def checkpoint_gradients(module: nn.Module, on: bool) -> None:
    """Makes a diffusers model compute activations again in a backward pass, or no longer.

    Raises:
        ValueError: The model cannot.
    """
    switch: Any = getattr(module, "enable_gradient_checkpointing" if on else "disable_gradient_checkpointing", None)
    if switch is None or not getattr(module, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{family_name(module)} has no gradient checkpointing: train without it")
    switch()


def forward_signature(module: nn.Module) -> inspect.Signature:
    """What a module's `forward` takes, without `self`; seen through `torch.compile`'s wrapper and other hooks."""
    signature = inspect.signature(type(_unwrapped(module)).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def family_name(module: nn.Module) -> str:
    """The module's class, seen through `torch.compile`'s wrapper."""
    return type(_unwrapped(module)).__name__


def _unwrapped(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


class _AroundForward(ModelHook):  # type: ignore[misc]
    """Hands the call to `around` with the forward that it stands before."""

    def __init__(self, around: Callable[..., Any]) -> None:
        super().__init__()
        self.around: Callable[..., Any] | None = around
        self.left: Callable[..., Any] | None = None  # the module's forward as `hook_forward` left it

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        return forward(*args, **kwargs) if self.around is None else self.around(forward, *args, **kwargs)


class _AroundCompiled:
    """The same for a module that `module.compile()` has compiled, which would take a hook's code into its graph."""

    def __init__(self, name: str, compiled: Callable[..., Any], around: Callable[..., Any]) -> None:
        self.name = name
        self.compiled = compiled
        self.around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.compiled, *args, **kwargs)


def hook_forward(module: nn.Module, name: str, around: Callable[..., Any]) -> None:
    """Puts `around(forward, *args, **kwargs)` before a module's forward, with diffusers' own hooks.

    A module that is compiled in place has its compiled call wrapped instead.

    Raises:
        RuntimeError: A hook of that name is there already.
    """
    compiled = vars(module).get("_compiled_call_impl")
    if (isinstance(compiled, _AroundCompiled) and compiled.name == name) or _hook(module, name) is not None:
        raise RuntimeError(
            f"{type(module).__name__} is hooked by {name!r} already: detach the scheduler that did it first"
        )
    if compiled is not None:
        module._compiled_call_impl = _AroundCompiled(name, compiled, around)
        return
    hook = _AroundForward(around)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    hook.left = vars(module)["forward"]


def is_hooked(module: nn.Module, name: str, around: Callable[..., Any]) -> bool:
    """Whether `hook_forward` has put that `around` there, under that name."""
    compiled = vars(module).get("_compiled_call_impl")
    hook = compiled if isinstance(compiled, _AroundCompiled) and compiled.name == name else _hook(module, name)
    return hook is not None and hook.around is around


def is_hooked_last(module: nn.Module, name: str, around: Callable[..., Any]) -> bool:
    """Whether `is_hooked`, and nothing was put before the hook, or back in its place, since."""
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is not None:
        return isinstance(compiled, _AroundCompiled) and compiled.name == name and compiled.around is around
    hook = _hook(module, name)
    return hook is not None and hook.around is around and vars(module).get("forward") is hook.left


def unhook_forward(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """Takes `hook_forward` back and returns its `around`; the module is as it was.

    What others (accelerate) put before the hook since stays; the hook then stays in their chain and does nothing.
    """
    compiled = vars(module).get("_compiled_call_impl")
    if isinstance(compiled, _AroundCompiled) and compiled.name == name:
        module._compiled_call_impl = compiled.compiled
        return compiled.around
    hook = _hook(module, name)
    if hook is None:
        return None
    around = hook.around
    registry: Any = module._diffusers_hook
    if vars(module).get("forward") is hook.left:
        registry.remove_hook(name, recurse=False)
    else:
        hook.around = None
        index = registry._hook_order.index(name)
        del registry.hooks[name], registry._hook_order[index], registry._fn_refs[index]
    if not registry.hooks:
        del _unwrapped(module)._diffusers_hook  # torch.compile's wrapper keeps it there
        if "forward" in vars(module) and _is_plain(module):
            del module.forward
    return around


def _hook(module: nn.Module, name: str) -> _AroundForward | None:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def _is_plain(module: nn.Module) -> bool:
    """Whether the instance's own `forward` is only the class's, as taking a hook off leaves it."""
    forward = vars(module)["forward"]
    return getattr(forward, "__func__", None) is type(module).forward


def running_pipeline() -> Any | None:
    """The pipeline whose `__call__` is under way further up the stack; None outside of one."""
    for frame in _frames():
        caller = frame.f_locals.get("self")
        if frame.f_code.co_name == "__call__" and isinstance(caller, diffusers.DiffusionPipeline):
            return caller
    return None


def pipeline_arguments(pipe: Any) -> dict[str, Any] | None:
    """What the running `pipe(...)` was called with, as its locals stand; None if it is not running.

    Only read: a pipeline gives its scheduler no other sight of its arguments.
    """
    for frame in _frames():
        if frame.f_locals.get("self") is pipe and frame.f_code.co_name == "__call__":
            code = frame.f_code  # not the class's signature: a subclass may hand (*args, **kwargs) on
            taken = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            return {name: value for name, value in frame.f_locals.items() if name in taken}
    return None


def call_arguments(pipe: Any) -> frozenset[str]:
    """Names of the arguments of `pipe(...)`."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters) - {"self"}


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


@functools.cache
def version() -> str:
    return str(diffusers.__version__)
