"""Speculative MoE by DeepSpeed's own configuration, beside `expert_parallel` or `moe`:

    "speculative_moe": {"enabled": true, "plan": "plan.safetensors"}

`register()` wraps `deepspeed.initialize` and `deepspeed.init_inference`: they make their engine as ever, then
`speculate` it as the section says. Without the section, or where it is not enabled, they are stock's.

    enabled   false      whether anything is done
    plan      null       path of a plan file; null: experts stay where they are
    exact     true       bit for bit stock's result
    count     false      go on with a routing profile
    shuffle   true       tokens go where the plan expects their experts, where attention is tensor-parallel
    trial     8          passes of each size that go each way, by turns, before all ranks keep the sooner one; 0: all go
                         ours. Where attention is tensor-parallel: that are shuffled, and that are not

What the section asks for is checked before the host is asked for anything. A script that took `initialize` out of
`deepspeed` before `register()` keeps stock's; `python -m forerun.moe.deepspeed script.py …` registers first.
"""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from forerun.moe.agreement import agree
from forerun.moe.plan import Plan
from forerun_adapters import deepspeed as host
from forerun_adapters import deepspeed_engine as engine

__all__ = ["SECTION", "Section", "main", "register", "unregister"]

SECTION = "speculative_moe"

_undo: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Section:
    """What the configuration asks for.

    Raises:
        ValueError: A value is of another type, or a number below 0.
    """

    enabled: bool = False
    plan: str | None = None
    exact: bool = True
    count: bool = False
    shuffle: bool = True
    trial: int = 8

    def __post_init__(self) -> None:
        for name in ("enabled", "exact", "count", "shuffle"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{SECTION}: {name} is {getattr(self, name)!r}; expected true or false")
        if self.plan is not None and not isinstance(self.plan, str | Path):
            raise ValueError(f"{SECTION}: plan is {self.plan!r}; expected the path of a plan file, or null")
        if type(self.trial) is not int or self.trial < 0:
            raise ValueError(f"{SECTION}: trial is {self.trial!r}; expected a number of passes, 0 or more")

    @classmethod
    def read(cls, given: Any) -> Section:
        """Reads the section; None: there is none.

        Raises:
            ValueError: It is no section, or has keys that are not known.
        """
        if given is None:
            return cls()
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(f"{SECTION} is {given!r}; expected an object with {', '.join(known)}")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{SECTION} has {', '.join(unknown)}; expected none but {', '.join(known)}")
        return cls(**given)


def register() -> None:
    """Makes `deepspeed.initialize` and `init_inference` read the section; doing it again changes nothing."""
    if not _undo:
        _undo.extend(
            (engine.replace_start("initialize", _initializing), engine.replace_start("init_inference", _inferring))
        )


def unregister() -> None:
    """Puts stock's functions back; engines that were made stay as they are."""
    while _undo:
        _undo.pop()()


def main() -> None:
    """`python -m forerun.moe.deepspeed script.py …`: runs the script as it is, registered."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m forerun.moe.deepspeed SCRIPT [ARGUMENTS ...]")
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"{script} is not a file: python -m forerun.moe.deepspeed SCRIPT [ARGUMENTS ...]")
    register()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


def _initializing(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def initialize(*arguments: Any, **named: Any) -> Any:
        given = engine.arguments_of(stock, arguments, named)
        config = engine.configuration(given)
        section, plan = _asked(given.get("model"), config)
        made = stock(*arguments, **named)
        _speculate(made[0], section, plan)
        return made

    return initialize


def _inferring(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def init_inference(model: Any, config: Any = None, **named: Any) -> Any:
        whole = {**(engine.configuration({"config": config}) or {}), **named}
        section, plan = _asked(model, whole)
        if SECTION in whole:  # which the host refuses
            named.pop(SECTION, None)
            config = {
                name: value
                for name, value in (engine.configuration({"config": config}) or {}).items()
                if name != SECTION
            }
        made = stock(model, config, **named)
        _speculate(made, section, plan)
        return made

    return init_inference


def _asked(model: Any, config: Mapping[str, Any] | None) -> tuple[Section, Plan | None]:
    """The section and its plan, checked as far as can be before there is an engine."""
    problem: str | None = None
    section, plan = Section(), None
    try:
        section = Section.read((config or {}).get(SECTION))
        if section.enabled and section.plan is not None:
            plan = _plan(section.plan, model, config or {})
    except ValueError as error:
        problem = str(error)
    if dist.is_initialized() and (config or {}).get(SECTION) is not None:
        agree(problem, str(section.enabled))
    if problem is not None:
        raise ValueError(problem)
    return section, plan


def _plan(path: str, model: Any, config: Mapping[str, Any]) -> Plan:
    try:
        plan = Plan.load(path)
    except OSError as error:
        raise ValueError(f"{SECTION}: the plan cannot be read: {error}") from error
    if isinstance(model, nn.Module):
        identity, ranks = _expected(model, config)
        if identity is not None:
            plan.refuse_other(identity, plan.ranks if ranks is None else ranks)
    return plan


def _expected(model: nn.Module, config: Mapping[str, Any]) -> tuple[Any, int | None]:
    """Model and ranks that there will be: of classic layers, or of those that AutoEP will put in."""
    from forerun.moe.deepspeed import identify
    from forerun.moe.transformers import identify as identify_routers
    from forerun_adapters import transformers

    found = host.layers(model)
    if found:
        return identify(model), int(found[0].layer.ep_size)
    ranks = (config.get("expert_parallel") or {}).get("autoep_size")
    return (identify_routers(model) if transformers.routers(model) else None), ranks


def _speculate(made: Any, section: Section, plan: Plan | None) -> None:
    if section.enabled:
        from forerun.moe.deepspeed import speculate

        options = {name: getattr(section, name) for name in ("exact", "shuffle", "count", "trial")}
        speculate(made, plan, **options)
