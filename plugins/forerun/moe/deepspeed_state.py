"""What a DeepSpeed layer carries while it is speculated, and where its experts lie.

Everything here happens alike on all ranks of the layer's group: an expert-parallel layer's calls are in step anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forerun.moe.background import Background, Movable
from forerun.moe.move import MOVE_BYTES, move
from forerun.moe.overlap import Pace
from forerun_adapters import deepspeed as host

if TYPE_CHECKING:
    from forerun.moe.deepspeed_counts import Counter
    from forerun.moe.deepspeed_trial import Trial

__all__ = [
    "State",
    "answered",
    "lay",
    "lay_beside",
    "lie_as_stock",
    "refuse_torn",
    "speculated",
    "stock_places",
    "stop_moving",
]


@dataclass
class State:
    """What a layer carries while it is ours."""

    name: str
    stock: type[nn.Module]
    exact: bool
    index: int  # its place among the model's layers
    order: Tensor | None = None  # [E] the expert at each place; None: stock's
    place: Tensor | None = None  # [E] the place of each expert
    move: Background | None = None  # to another order, while the layer serves
    torn: bool = False  # experts were being moved when a rank failed
    shuffle: bool = True  # whether tokens go where a plan expects their experts, if attention is tensor-parallel
    counter: Counter | None = None
    trial: Trial | None = None
    hooks: list[Any] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    looked_at: bool = False  # whether `seen` is asked for
    seen: Tensor | None = None  # [n] the rank of most of each token's experts, in the last batch
    sent: int = 0  # rows that left this rank on the way there

    def saw(self, expert: Tensor) -> None:
        """The experts `[n, k]` of a pass's tokens."""
        if self.counter is not None:
            self.counter.saw(self.index, expert)


def speculated(module: nn.Module) -> list[Any]:
    """The layers that are ours, in order."""
    return [entry.layer for entry in host.layers(module) if hasattr(entry.layer, "forerun_state")]


def answered(
    layer: Any, ours: Callable[[], Any], elsewhere: Callable[[], Any], stock: Callable[[], Any], tokens: int, batch: int
) -> Any:
    """A layer's forward pass.

    Args:
        layer: Which.
        ours: The pass that should be sooner.
        elsewhere: Stock's where experts lie by the plan: a trial asks for it, and keeps it where it is sooner.
        stock: Stock's.
        tokens: That this rank has.
        batch: What has to be the same on all ranks for stock to take them; negative: it does not.

    Raises:
        RuntimeError: Gradients are asked for while experts lie by a plan, or a rank was lost, now or while they moved.
    """
    state: State = layer.forerun_state
    refuse_torn(layer)
    if torch.is_grad_enabled():
        if state.order is not None or state.move is not None:
            raise RuntimeError("experts lie by a plan, for inference: use torch.no_grad(), or unspeculate(model)")
        return stock()
    if state.move is not None:
        state.move.step()
    with _a_lost_rank_named(state.name):
        if state.trial is None:
            return ours()
        answer = ours() if state.trial.begin(layer, tokens, batch) else elsewhere()
        state.trial.end(layer)
        return answer


@contextmanager
def _a_lost_rank_named(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RuntimeError(
            f"{name}: a rank of its group is lost or silent, and this pass with it: end all ranks and start again "
            f"({error})"
        ) from error


@torch.no_grad()
def lay(layer: Any, order: Tensor | None, most: int = MOVE_BYTES) -> int:
    """Moves a layer's experts into an order; all ranks of its group call it alike.

    Args:
        layer: Which.
        order: `[E]` the expert at each place; None: stock's.
        most: As of `move`.

    Returns:
        Bytes that left this rank.

    Raises:
        RuntimeError: A rank is lost: the layer is of no use from then on.
    """
    refuse_torn(layer)
    state: State = layer.forerun_state
    if state.move is not None:
        state.move.drop()  # it goes on from where experts lie then
    state.torn = True
    left = move(host.weights(layer), _order(layer, state.order), _order(layer, order), layer.ep_group, most)
    state.torn = False
    _note(layer, order)
    return left


def lay_beside(layers: Sequence[Any], orders: Sequence[Tensor | None], done: Callable[[], None]) -> None:
    """Begins to move layers' experts into orders while the layers go on; all ranks of their groups call it alike.

    Args:
        layers: Which; none is being moved.
        orders: As of `lay`, of each.
        done: Is called in the forward pass in which the last experts of a group's layers come to their places.
    """
    groups: dict[Any, list[tuple[Any, Tensor | None]]] = {}
    for layer, order in zip(layers, orders, strict=True):
        groups.setdefault(layer.ep_group, []).append((layer, order))
    for group, entries in groups.items():

        def end(entries: list[tuple[Any, Tensor | None]] = entries) -> None:
            for layer, _ in entries:
                layer.forerun_state.move = None
            done()

        move = Background([_movable(layer, order) for layer, order in entries], group, end)
        for layer, _ in entries:
            layer.forerun_state.move = move


def stop_moving(layers: Sequence[Any]) -> None:
    """Leaves the experts where they have come to; all ranks call it alike.

    Raises:
        RuntimeError: A rank is lost or failed.
    """
    for layer in layers:
        if layer.forerun_state.move is not None:
            layer.forerun_state.move.drop()
            layer.forerun_state.move = None


@contextmanager
def lie_as_stock(module: nn.Module) -> Iterator[None]:
    """Within, the experts of a model's layers lie where stock has them; afterwards where they lay."""
    for layer in speculated(module):
        if layer.forerun_state.move is not None:
            layer.forerun_state.move.drop()  # what has come may be of other weights than those that are loaded now
    moved = [(layer, layer.forerun_state.order) for layer in speculated(module)]
    moved = [(layer, order) for layer, order in moved if order is not None]
    for layer, _ in moved:
        lay(layer, None)
    try:
        yield
    finally:
        for layer, order in moved:
            lay(layer, order)


@torch.no_grad()
def stock_places(layer: Any, tensors: dict[str, Tensor]) -> None:
    """Moves copies of the experts' tensors, named as in `layer.experts`, to where stock has them."""
    refuse_torn(layer)
    move(host.slots(layer, tensors), _order(layer, layer.forerun_state.order), _order(layer, None), layer.ep_group)


def refuse_torn(layer: Any) -> None:
    """Raises where experts were being moved when a rank failed.

    Raises:
        RuntimeError: It was so.
    """
    state: State = layer.forerun_state
    if state.torn or (state.move is not None and state.move.failed):
        raise RuntimeError(
            f"{state.name}: a rank failed while experts were moved, and they lie in part here, in part "
            "there: build the model again and load its weights"
        )


def _movable(layer: Any, order: Tensor | None) -> Movable:
    return Movable(
        lambda: host.weights(layer),
        lambda: _order(layer, layer.forerun_state.order),
        _order(layer, order),
        lambda order: _note(layer, order),
    )


def _note(layer: Any, order: Tensor | None) -> None:
    """Experts lie in this order now."""
    state: State = layer.forerun_state
    if order is None or torch.equal(order.cpu(), _order(layer, None)):
        state.order = state.place = None
        return
    state.order = order.to(host.weights(layer)[0][0].device)
    state.place = state.order.argsort()


def _order(layer: Any, order: Tensor | None) -> Tensor:
    return torch.arange(host.experts_of(layer)) if order is None else order.cpu()
