"""Experts moved to other places while a model goes on serving with them where they are.

A piece of a layer's experts travels in a process group of its own while forward passes go on in theirs, and is kept
beside the weights. At each call of an expert-parallel layer, which ranks make in step anyway, they agree by one number
each whether all of them have the piece; only then it is the next one's turn, and where enough experts have come they
are put in their places, by all ranks at the same call. So no rank ever computes with another order of experts than the
others, all ranks begin collectives of both groups in the same order, and there is no thread that could outlive a pass
or fail unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.move import MOVE_BYTES, Group, Route, pieces, toward

__all__ = ["STAGED_BYTES", "Background", "Movable"]

STAGED_BYTES = 128 << 20  # bytes of experts that a rank keeps beside the weights at most, or two experts

_channels: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # kept: names of groups that are gone may come again


class Movable(NamedTuple):
    """A layer whose experts shall lie elsewhere."""

    weights: Callable[[], Sequence[Sequence[Tensor]]]  # those of `move`
    lies: Callable[[], Tensor]  # [E] the expert at each place now
    after: Tensor  # [E] the same in the end
    lay: Callable[[Tensor], None]  # is told the order that experts were put in


class Background:
    """A move of layers' experts that goes on a step at each call of a layer; all ranks of the group do alike.

    On the way a rank holds `most` bytes of buffers, and at most `staged` bytes of experts or two experts, if that is
    more. So some experts go by way of a place that they are not meant for: 4% more bytes at ten experts at a time, a
    quarter at two (64 experts on 4 ranks). Weights must not be written meanwhile, unless `drop` is called before that.

    Args:
        layers: In the order that they shall be moved in.
        group: Of the ranks that call `step`; None: all.
        done: Is called when every expert is where it shall be.
        most: Bytes of both buffers.
        staged: Bytes of experts.
    """

    def __init__(
        self,
        layers: Sequence[Movable],
        group: Group,
        done: Callable[[], None],
        most: int = MOVE_BYTES,
        staged: int = STAGED_BYTES,
    ) -> None:
        self._layers, self._done, self._most, self._bound = layers, done, most, staged
        self._group = dist.group.WORLD if group is None else group
        self._channel = _channel(self._group)
        self._steps: Iterator[None] | None = None  # None: nothing is on its way
        self._work: Any = None
        self._error: Exception | None = None  # of this rank, not yet told
        self.staged: list[tuple[list[Tensor], Tensor]] = []  # pieces of weights, and what is meant for them
        self.failed = False

    def left(self) -> int:
        """Layers whose experts are not yet where they shall be."""
        return sum(not torch.equal(layer.lies(), layer.after) for layer in self._layers)

    @torch.no_grad()
    def step(self) -> None:
        """Goes on, if all ranks have what was on its way; it waits for nothing but the ranks' agreement.

        Raises:
            RuntimeError: A rank is lost or failed: experts may lie in other orders on other ranks.
        """
        if not self._agreed():
            return
        self.failed = True
        if self._steps is None:
            self._steps = self._moves()
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
            self._done()
        self.failed = False

    def drop(self) -> None:
        """Forgets what has come and is not in its place; `step` begins with that layer anew, as it lies then.

        Raises:
            RuntimeError: A rank is lost or failed.
        """
        if self._steps is None:
            return
        self._agreed()
        self.failed = True
        if self._work is not None:
            self._work.wait()
        self._steps, self._work, self.staged = None, None, []
        self.failed = False

    def _moves(self) -> Iterator[None]:
        """The whole move, yielding whenever a piece is on its way."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        for layer in self._layers:
            weights = layer.weights()
            size = sum(places[0].numel() * places[0].element_size() for places in weights)
            while not torch.equal(before := layer.lies(), layer.after):
                order = toward(before, layer.after, ranks, max(2, self._bound // size))
                route = Route.between(before, order, rank, ranks)
                for parts in pieces(weights, route, self._most):
                    received = self._send(route, parts)
                    yield
                    self.staged.append((parts, received))
                for parts, received in self.staged:
                    route.put(parts, received)
                self._work, self.staged = None, []
                layer.lay(order)

    def _send(self, route: Route, parts: list[Tensor]) -> Tensor:
        self._work = None
        try:
            received, self._work = route.exchange(parts, self._channel, later=True)
        except Exception as error:  # memory, for one: the other ranks are told when they ask next
            self._error, received = error, parts[0]
        return received

    def _agreed(self) -> bool:
        """Whether all ranks have what was on its way."""
        if self.failed:
            raise RuntimeError("a rank failed while experts were moved")
        self.failed = True
        try:
            device = self._layers[0].weights()[0][0].device
            told = torch.tensor([self._state()], device=device)
            dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
            least = int(told)
        except RuntimeError as error:
            raise RuntimeError("a rank was lost while experts were moved") from error
        if least < 0:
            del _channels[self._group]  # ranks may have begun other things there
            raise RuntimeError("a rank failed while experts were moved") from self._error
        self.failed = False
        return least == 1

    def _state(self) -> int:
        """1: this rank has what was on its way; 0: not yet; -1: it failed."""
        if self._error is None and self._work is not None:
            if not self._work.is_completed():
                return 0
            try:
                self._work.wait()
            except RuntimeError as error:
                self._error = error
        return 1 if self._error is None else -1


def _channel(group: Any) -> Any:
    """A process group of the same ranks, for what travels beside; made once."""
    if group not in _channels:
        ranks = dist.get_process_group_ranks(group)
        _channels[group] = dist.new_group(ranks, use_local_synchronization=len(ranks) < dist.get_world_size())
    return _channels[group]
