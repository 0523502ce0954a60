"""A LoRA whose scale is each row's own: points of different age share one batched call.

While rows are weighted, the layers that the LoRA names are of a class of their own, which adds to what they answer (as
`torch.nn.utils.parametrize` does it). A compiled module sees that: torch.compile guards the classes of layers, and not
their hooks. Outside of that nothing is left on the module, and LoRAs and adapters of the user's own stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forerun.picard.change import base_name

__all__ = ["Lora", "RowLora"]


@dataclass(frozen=True)
class Lora:
    """Low-rank changes of layers: `change = scale * up(down(x))`.

    Args:
        layers: By the layer's name in its module: the weights of `down` and `up`, in a linear layer's or a
            convolution's form.
        scale: What the change is multiplied by (alpha over rank).

    Source: LoRA, arXiv 2106.09685, eq. 3.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    def on(self, module: nn.Module) -> RowLora:
        """The LoRA on the module's layers; nothing changes on them before `RowLora.weighted`.

        Raises:
            ValueError: The module has no layer of a name, or one of another shape.
        """
        found = {base_name(name): layer for name, layer in module.named_modules(remove_duplicate=False)}
        missing = sorted(name for name in self.layers if name not in found)
        if missing:
            kind = type(getattr(module, "_orig_mod", module)).__name__
            raise ValueError(f"{kind} has no layer {', '.join(missing[:3])} that the LoRA changes")
        changes = {
            found[name]: _Change(name, found[name], *weights, self.scale) for name, weights in self.layers.items()
        }
        return RowLora([*changes.values()])  # of a layer under two names, one


class RowLora:
    """A LoRA on a module; does nothing outside of `weighted`."""

    mixes = True

    def __init__(self, changes: list[_Change]) -> None:
        self._changes = changes

    def answer(self, ask: Callable[[], Any], weights: Tensor, device: torch.device) -> Any:
        """What `ask` returns under the LoRA: `weights` `[rows]` on the CPU, the call's tensors are on `device`."""
        with self.weighted(weights, device):
            return ask()

    @contextlib.contextmanager
    def weighted(self, weights: Tensor, device: torch.device | None = None) -> Iterator[None]:
        """Within, the module's row r answers with `weights[r]` times the LoRA.

        Args:
            weights: `[rows]` of the module's batch, on the CPU.
            device: Of the module's inputs; the CPU by default.
        """
        device = device or weights.device
        index = weights.nonzero().flatten()
        # Neither copy waits for what the device has still to do.
        moved = (values.to(device, non_blocking=True) for values in (index, weights[index]))
        rows = _Rows(len(weights), *moved)
        begun: list[_Change] = []
        try:
            for change in self._changes:
                change.begin(rows, device)
                begun.append(change)
            yield
        finally:
            for change in begun:
                change.end()


@dataclass(frozen=True)
class _Rows:
    """The rows of a call that have the LoRA."""

    count: int  # of the call
    index: Tensor  # [n]
    weights: Tensor  # [n]


class _Changed(nn.Module):
    """A layer while it has a change; the base of classes that `_changed` makes."""

    _forerun_change: _Change

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        output: Any = super().__call__(*args, **kwargs)
        return self._forerun_change.added(given, output)


_CHANGED: dict[type[Any], type[Any]] = {}  # by a layer's own class


def _changed(kind: type[Any]) -> type[Any]:
    if kind not in _CHANGED:
        _CHANGED[kind] = type(kind.__name__, (_Changed, kind), {})
    return _CHANGED[kind]


class _Change:
    """A layer's change, and the rows that have it at the moment."""

    def __init__(self, name: str, layer: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or getattr(layer, "groups", 1) != 1:
            raise ValueError(
                f"the LoRA changes {name}, a {type(layer).__name__}: only linear layers, and convolutions of one "
                "group, can be changed"
            )
        shape = (up.shape[0], *down.shape[1:])
        if shape != layer.weight.shape:
            raise ValueError(f"the LoRA's change of {name} is {list(shape)}, the layer is {list(layer.weight.shape)}")
        self._name = name
        self._layer: Any = layer
        self._kind: type[Any] = type(layer)
        self._down, self._up, self._scale = down, up, scale
        self._placed = down, up
        self._rows: _Rows | None = None

    def begin(self, rows: _Rows, device: torch.device) -> None:
        """From now on the layer answers with the change at some rows."""
        layer, dtype = self._layer, self._layer.weight.dtype
        # In training they change; else they are moved once, and again when the layer has moved since.
        if not self._down.requires_grad and (self._placed[0].device, self._placed[0].dtype) != (device, dtype):
            self._placed = self._down.to(device, dtype), self._up.to(device, dtype)
        self._rows, self._kind = rows, type(layer)
        layer.__class__ = _changed(self._kind)
        layer._forerun_change = self

    def end(self) -> None:
        """The layer is as it was."""
        self._layer.__class__ = self._kind
        del self._layer._forerun_change
        self._rows = None

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's `output` for `x`, with the change."""
        assert self._rows is not None
        count, index, weights = self._rows.count, self._rows.index, self._rows.weights
        if len(x) % count:
            raise ValueError(
                f"{self._name}, which the LoRA changes, was given {len(x)} rows in a call of {count}: it answers for "
                "several of them together, and a change by row needs a multiple of them. Train the Picard Consistency "
                "Model as a whole model: forerun picard train --full, or Training(full=True)"
            )
        down, up = (values.to(x.device, x.dtype) for values in self._placed)
        if len(index) < count:
            x = x.unflatten(0, (count, -1))[index].flatten(0, 1)
        if isinstance(self._layer, nn.Linear):
            change = nn.functional.linear(nn.functional.linear(x, down), up)
        else:
            change = self._convolved(x, down, up)
        scale = (weights * self._scale).to(output.dtype).repeat_interleave(len(change) // len(index))
        change = change * scale.reshape(-1, *(1,) * (change.ndim - 1))
        if len(index) == count:
            return output + change
        by_row: Tensor = output.unflatten(0, (count, -1))
        return by_row.index_add(0, index, change.unflatten(0, (len(index), -1)).to(output.dtype)).flatten(0, 1)

    def _convolved(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        layer = self._layer
        convolve: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[x.ndim - 3]
        inner = convolve(x, down, None, layer.stride, layer.padding, layer.dilation)
        change: Tensor = convolve(inner, up)
        return change
