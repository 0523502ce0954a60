"""DeepSpeed's engines: their checkpoints, and the functions that make them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from forerun_adapters._require import require

require("deepspeed")

import deepspeed as _deepspeed  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine  # noqa: E402

__all__ = ["CHECKPOINTS", "arguments_of", "around_checkpoints", "configuration", "replace_start"]

CHECKPOINTS = ("save_checkpoint", "load_checkpoint", "save_16bit_model")

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def around_checkpoints(wrapper: Wrapper) -> Callable[[], None]:
    """Wraps the engine's methods that write or read weights; returns what takes the wrapper out again."""
    stock = {name: getattr(_Engine, name) for name in CHECKPOINTS}
    for name, method in stock.items():
        setattr(_Engine, name, wrapper(method))

    def undo() -> None:
        for name, method in stock.items():
            setattr(_Engine, name, method)

    return undo


def replace_start(name: str, wrapper: Wrapper) -> Callable[[], None]:
    """Wraps `deepspeed.initialize` or `init_inference`; returns what takes the wrapper out again."""
    stock = getattr(_deepspeed, name)
    setattr(_deepspeed, name, wrapper(stock))
    return lambda: setattr(_deepspeed, name, stock)


def arguments_of(function: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives, by name.

    Raises:
        TypeError: It does not fit the function.
    """
    return inspect.signature(function).bind(*arguments, **named).arguments


def configuration(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration that a call of `initialize` or `init_inference` gives; None: the host will complain itself."""
    namespace = given.get("args")
    config = given.get("config") or given.get("config_params") or getattr(namespace, "deepspeed_config", None)
    if isinstance(config, dict) or config is None:
        return config
    try:
        with open(config) as file:
            read = json.load(file)
    except (OSError, TypeError, ValueError):
        return None
    return read if isinstance(read, dict) else None
