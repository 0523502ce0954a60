"""A LoRA whose scale is each row's own: points of different age share one batched call.

The module gets forward hooks on the layers that the LoRA names, which do nothing unless rows are weighted. Nothing else
of it changes: LoRAs and adapters of the user's own stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
        """Hooks the module's layers.

        Raises:
            ValueError: The module has no layer of a name, or one of another shape; nothing is hooked then.
        """
        found = {name.replace(".base_layer", ""): layer for name, layer in module.named_modules()}
        missing = sorted(name for name in self.layers if name not in found)
        if missing:
            raise ValueError(f"{type(module).__name__} has no layer {', '.join(missing[:3])} that the LoRA changes")
        changes = [
            (found[name], _Change(name, found[name], *weights, self.scale)) for name, weights in self.layers.items()
        ]
        return RowLora(changes)


class RowLora:
    """A LoRA on a module; does nothing outside of `weighted`."""

    mixes = True

    def __init__(self, changes: list[tuple[nn.Module, _Change]]) -> None:
        self._changes = [change for _, change in changes]
        self._handles: list[RemovableHandle] = [layer.register_forward_hook(change) for layer, change in changes]

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
        index = weights.nonzero().flatten()
        rows = _Rows(len(weights), index.to(device), weights[index].to(device))
        for change in self._changes:
            change.rows = rows
        try:
            yield
        finally:
            for change in self._changes:
                change.rows = None

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(frozen=True)
class _Rows:
    """The rows of a call that have the LoRA."""

    count: int  # of the call
    index: Tensor  # [n]
    weights: Tensor  # [n]


class _Change:
    """A layer's forward hook."""

    def __init__(self, name: str, layer: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        plain: Any = getattr(layer, "base_layer", layer)  # the user's own LoRA stands around it
        if not isinstance(plain, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise ValueError(
                f"the LoRA changes {name}, a {type(plain).__name__}: only linear layers and convolutions can"
            )
        shape = (up.shape[0], *down.shape[1:])
        if shape != plain.weight.shape:
            raise ValueError(f"the LoRA's change of {name} is {list(shape)}, the layer is {list(plain.weight.shape)}")
        self._layer = plain
        self._down, self._up, self._scale = down, up, scale
        self.rows: _Rows | None = None

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.rows is None:
            return None
        count, index, weights = self.rows.count, self.rows.index, self.rows.weights
        x = given[0]
        down, up = self._down.to(x.device, x.dtype), self._up.to(x.device, x.dtype)
        if not down.requires_grad:
            self._down, self._up = down, up  # moved once; in training they change
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
