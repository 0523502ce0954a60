"""SGLang: hooks on its functions, and the certainty that they are in place.

SGLang's registry only logs a hook that could not be applied, and goes on without it. `put` names it and ends start-up
instead: a server that was told to use a drop-in either uses it in every process, or does not start.

`forerun_adapters.sglang_plugin` is what SGLang calls. The contract tests are in `tests/adapters/test_sglang.py`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forerun_adapters._require import HOSTS, require

RELEASE = require("sglang")

from sglang.srt.plugins.hook_registry import HookRegistry as _registry  # noqa: E402
from sglang.srt.plugins.hook_registry import HookType as _kinds  # noqa: E402

__all__ = ["RELEASE", "Hook", "missing", "put"]


@dataclass(frozen=True)
class Hook:
    """A function around one of SGLang's own.

    Args:
        target: Dotted name of a function or method, as `sglang.srt.managers.scheduler.Scheduler.get_internal_state`.
        function: Called as its kind says.
        kind: `around(original, *args, **kwargs)` is called in the target's place; `after(result, *args, **kwargs)` may
            return another result.
    """

    target: str
    function: Callable[..., Any]
    kind: Literal["after", "around"] = "around"


def put(hooks: Sequence[Hook]) -> None:
    """Registers hooks; once SGLang has applied what is registered, each is checked.

    It is for plugins, which run before SGLang applies hooks.

    Raises:
        ValueError: This release lacks a target. No hook was registered.
        SystemExit: Later, where SGLang applies hooks: one of these was not applied.
    """
    for hook in hooks:
        try:
            found = pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError) as error:
            raise ValueError(_unmet(hook.target, str(error))) from error
        if not callable(found):
            raise ValueError(_unmet(hook.target, f"it is a {type(found).__name__}, not a function"))
    for hook in hooks:
        _registry.register(hook.target, hook.function, _kinds(hook.kind))
    _check_once_applied(hooks)


def missing(hooks: Sequence[Hook]) -> list[str]:
    """Targets of hooks that are not in place in this process."""
    return [hook.target for hook in hooks if not _is_in_place(hook)]


def _is_in_place(hook: Hook) -> bool:
    if hook.target not in _registry._patched:
        return False
    try:
        found: Any = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return False
    return hasattr(found, "__wrapped__")


def _check_once_applied(hooks: Sequence[Hook]) -> None:
    # SGLang looks `apply_hooks` up on the class when all plugins have run. Ours takes its place for that one call.
    stock = _registry.__dict__["apply_hooks"]

    def apply_hooks(registry: Any) -> None:
        registry.apply_hooks = stock
        registry.apply_hooks()
        absent = missing(hooks)
        if absent:
            raise SystemExit(f"forerun: {_unmet(absent[0], 'SGLang did not apply the hook; its log says why')}")

    _registry.apply_hooks = classmethod(apply_hooks)


def _unmet(target: str, reason: str) -> str:
    return (
        f"no hook on {target} in sglang {RELEASE}, which forerun needs ({reason}); "
        f"forerun supports sglang{HOSTS['sglang'].supported}: {HOSTS['sglang'].remedy}"
    )
