"""Keys and values from rank to rank of one process group, layer by layer, and the suffix back to the earlier ranks.

Of every layer a rank receives all earlier ranks' keys and values, adds its own, sends the lot on, and attends. After
the pass each rank sends its own ones to all ranks before it, which need them for what comes next, and nothing waits for
that until the next pass begins. Receives are posted some layers ahead, so that what travels does so while the rank
computes. Every rank calls the same methods in the same order.

Axes: L layers, R ranks, S rows of a pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Handover", "Kind", "Late", "Moved"]

_AHEAD = 4  # layers that receives are posted before their turn


class Kind(NamedTuple):
    """What a row of keys and one of values look like."""

    key: tuple[int, ...]  # heads, head size
    value: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of one token in one layer."""
        numbers = torch.Size(self.key).numel() + torch.Size(self.value).numel()
        return numbers * self.dtype.itemsize


@dataclass
class Moved:
    """Bytes of keys and values that this rank moved since it started."""

    sent: int = 0  # to the next rank, in a pass
    received: int = 0  # from the one before
    returned: int = 0  # to all ranks before, after it
    completed: int = 0  # from all ranks behind
    passes: int = 0  # that were split


class Late(NamedTuple):
    """Keys and values of one layer that came after the pass."""

    layer: int  # counted from 0 in the pass
    rank: int  # whose rows they are
    key: torch.Tensor
    value: torch.Tensor


@dataclass
class Handover:
    """One rank's end.

    Args:
        chain: Process group that keys and values go along in a pass.
        back: Another group of the same ranks, for what follows a pass: it never holds up the chain.
        timeout: Seconds that a neighbour may be silent.
    """

    chain: Any
    back: Any
    timeout: float
    moved: Moved = field(default_factory=Moved)
    rows: tuple[int, ...] = ()  # of each rank in the pass that goes on, or was the last
    _kind: Kind | None = None
    _layers: int = 0
    _posted: deque[tuple[torch.Tensor, torch.Tensor, list[Any]]] = field(default_factory=deque)
    _asked: int = 0  # layers whose receive is posted
    _own: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _sending: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    _awaited: list[tuple[Late, list[Any]]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.chain)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.chain)

    def begin(self, rows: Sequence[int], layers: int, kind: Kind) -> None:
        """Opens a pass, after `settle`.

        Args:
            rows: `[R]` of each rank, 1 or more.
            layers: L.
            kind: Of rows; the same on all ranks.
        """
        if self._awaited:
            raise RuntimeError("a pass began before the one before it was settled")
        self.rows, self._layers, self._kind = tuple(rows), layers, kind
        self._asked, self._own = 0, []
        self._posted.clear()
        self.moved.passes += 1
        self._post()

    def exchange(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values `[S, ...]` of all ranks up to this one; they are on their way to the next one.

        Args:
            key: This rank's own rows.
            value: The same.

        Raises:
            RuntimeError: The rank before is gone or silent.
        """
        keys, values, works = self._posted.popleft()
        before = sum(self.rows[: self.rank])
        keys[before:], values[before:] = key, value
        self._wait(works)
        self._post()
        self._own.append((keys[before:], values[before:]))
        if self.rank + 1 < self.size:
            self._sending = [(work, held) for work, held in self._sending if not work.is_completed()]
            self.moved.sent += self._send(self.rank + 1, (keys, values), self.chain)
        return keys, values

    def give_back(self) -> None:
        """Starts sending own rows to all ranks before, and receiving those of the ranks behind."""
        if len(self._own) != self._layers:
            raise RuntimeError(f"{len(self._own)} layers handed on of {self._layers}: the pass is not over")
        kind = self._known()
        for layer in range(self._layers):
            for rank in range(self.rank + 1, self.size):
                late = Late(layer, rank, *self._empty(self.rows[rank], kind))
                works = [self._receive(rank, part, self.back) for part in (late.key, late.value)]
                self.moved.completed += late.key.nbytes + late.value.nbytes
                self._awaited.append((late, works))
            for rank in range(self.rank):
                self.moved.returned += self._send(rank, self._own[layer], self.back)
        self._own = []

    def settle(self) -> list[Late]:
        """What came since the last pass, all of it; waits for the rest.

        Raises:
            RuntimeError: A rank behind is gone or silent.
        """
        came = []
        for late, works in self._awaited:
            self._wait(works)
            came.append(late)
        self._awaited = []
        self._wait([work for work, _ in self._sending])
        self._sending = []
        return came

    def last(self, rows: torch.Tensor) -> torch.Tensor:
        """The last rank's tensor, given to all; on the others `rows` is overwritten."""
        dist.broadcast(rows, dist.get_global_rank(self.chain, self.size - 1), group=self.chain)
        return rows

    def gather(self, own: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
        """`[R]` every rank's rows, on all ranks."""
        parts = [
            own.contiguous() if rank == self.rank else own.new_empty(n, *own.shape[1:]) for rank, n in enumerate(rows)
        ]
        for rank, part in enumerate(parts):
            dist.broadcast(part, dist.get_global_rank(self.chain, rank), group=self.chain)
        return parts

    def _post(self) -> None:
        kind, before = self._known(), sum(self.rows[: self.rank])
        while self._asked < self._layers and len(self._posted) < _AHEAD:
            both = self._empty(before + self.rows[self.rank], kind)
            works = []
            if before:
                works = [self._receive(self.rank - 1, part[:before], self.chain) for part in both]
                self.moved.received += before * kind.bytes
            self._posted.append((*both, works))
            self._asked += 1

    def _empty(self, rows: int, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (torch.empty(rows, *shape, dtype=kind.dtype, device=kind.device) for shape in kind[:2])
        return key, value

    def _send(self, rank: int, parts: Sequence[torch.Tensor], group: Any) -> int:
        for part in parts:
            work = dist.isend(part, dist.get_global_rank(group, rank), group=group)
            self._sending.append((work, part))
        return sum(part.nbytes for part in parts)

    def _receive(self, rank: int, part: torch.Tensor, group: Any) -> Any:
        return dist.irecv(part, dist.get_global_rank(group, rank), group=group)

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            work.wait(timedelta(seconds=self.timeout))

    def _known(self) -> Kind:
        if self._kind is None:
            raise RuntimeError("no pass was begun")
        return self._kind
