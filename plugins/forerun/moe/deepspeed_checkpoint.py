"""Checkpoints in stock's layout while experts lie by a plan.

An engine's own methods see the experts where stock has them: they are moved there and back. A module's `state_dict`
holds copies of its layers' experts that were exchanged, and `load_state_dict` moves a layer's experts back for as long
as it loads them. All ranks of the expert-parallel group call these alike, as they do for an engine's checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from forerun.moe.deepspeed_state import State, lay, lie_as_stock, stock_places
from forerun_adapters import deepspeed_engine as engine

__all__ = ["keep_stock_layout", "leave_layout"]

_kept: WeakSet[nn.Module] = WeakSet()
_undo: list[Callable[[], None]] = []


def keep_stock_layout(layer: Any) -> None:
    """Makes checkpoints of a speculated layer stock's."""
    loading: list[Tensor | None] = []

    def saved(_experts: nn.Module, entries: dict[str, Any], prefix: str, _metadata: Any) -> None:
        if layer.forerun_state.order is not None:
            own = {name.removeprefix(prefix): name for name in entries if name.startswith(prefix)}
            copies: dict[str, Tensor] = {short: entries[name].detach().clone() for short, name in own.items()}
            stock_places(layer, copies)
            entries.update({own[short]: copy for short, copy in copies.items()})

    def before_loading(*_: Any) -> None:
        loading.append(layer.forerun_state.order)
        lay(layer, None)

    def after_loading(*_: Any) -> None:
        lay(layer, loading.pop())

    state: State = layer.forerun_state
    state.hooks += [
        layer.experts.register_state_dict_post_hook(saved),
        layer.experts.register_load_state_dict_pre_hook(before_loading),
        layer.experts.register_load_state_dict_post_hook(after_loading),
    ]
    if not _undo:
        _undo.append(engine.around_checkpoints(_stock_layout))
    _kept.add(layer)


def leave_layout(layer: Any) -> None:
    """Takes it out again; the engines' methods are stock's once no layer is left."""
    for hook in layer.forerun_state.hooks:
        hook.remove()
    _kept.discard(layer)
    if not _kept and _undo:
        _undo.pop()()


def _stock_layout(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def within(self: Any, *arguments: Any, **named: Any) -> Any:
        with lie_as_stock(self.module):
            return method(self, *arguments, **named)

    return within
