"""Keys and values that came and were not taken yet: bounded in bytes and in time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from threading import Condition
from typing import NamedTuple

from forerun.runahead.wire import Piece

__all__ = ["Arrival", "Mailbox"]

_REMEMBERED = 4096  # chains that are over, or were broken off


class Arrival(NamedTuple):
    """A piece and its bytes."""

    piece: Piece
    payload: memoryview


class Mailbox:
    """Arrivals by chain and layer.

    Args:
        capacity: Bytes held at most; what comes beyond is dropped, as its chain can be computed without it.
        keep: Seconds after which what nobody took is dropped.
    """

    def __init__(self, capacity: int, keep: float) -> None:
        self._capacity, self._keep = capacity, keep
        self._held: OrderedDict[bytes, dict[int, list[Arrival]]] = OrderedDict()
        self._came: dict[bytes, float] = {}  # a chain's latest arrival
        self._broken: OrderedDict[bytes, None] = OrderedDict()
        self._unwanted: OrderedDict[bytes, None] = OrderedDict()
        self._changed = Condition()
        self.bytes = 0
        self.dropped = 0

    def put(self, arrival: Arrival) -> None:
        """Keeps an arrival, or drops it: where it is not wanted, or no room is left."""
        chain, now = arrival.piece.chain, time.monotonic()
        with self._changed:
            for old in [old for old, came in self._came.items() if now - came > self._keep]:
                self.dropped += sum(map(len, self._held[old].values()))
                self._forget(old)
            if chain in self._unwanted or self.bytes + arrival.payload.nbytes > self._capacity:
                self.dropped += 1
                return
            self._held.setdefault(chain, {}).setdefault(arrival.piece.layer, []).append(arrival)
            self._came[chain] = now
            self.bytes += arrival.payload.nbytes
            self._changed.notify_all()

    def holds(self, chain: bytes, layer: int, start: int, end: int) -> bool:
        """Whether all tokens from `start` up to `end` are there."""
        with self._changed:
            return self._covered(chain, layer, start, end)

    def reach(self) -> dict[bytes, int]:
        """Of each chain, up to which token its first layer is there without a gap."""
        with self._changed:
            return {chain: self._reached(chain, 0, 0) for chain in self._held}

    def break_off(self, chains: Iterable[bytes]) -> None:
        """Nothing more will come for these chains; whoever waits for them need not."""
        with self._changed:
            self._broken.update((chain, None) for chain in chains if chain not in self._unwanted)
            while len(self._broken) > _REMEMBERED:
                self._broken.popitem(last=False)
            self._changed.notify_all()

    @property
    def broken(self) -> frozenset[bytes]:
        """Chains that were broken off and are not finished."""
        with self._changed:
            return frozenset(self._broken)

    def wait(self, timeout: float) -> None:
        """Returns once something comes, or the time is over."""
        with self._changed:
            self._changed.wait(timeout)

    def take(self, chain: bytes, layer: int, start: int, end: int, timeout: float) -> list[Arrival] | None:
        """All arrivals of a layer once they hold the tokens from `start` up to `end`.

        None if that takes too long, or the chain was broken off before.
        """

        def settled() -> bool:
            return self._covered(chain, layer, start, end) or chain in self._broken

        with self._changed:
            if not self._changed.wait_for(settled, timeout) or not self._covered(chain, layer, start, end):
                return None
            taken = self._held[chain].pop(layer)
            self.bytes -= sum(arrival.payload.nbytes for arrival in taken)
            if not self._held[chain]:
                self._forget(chain)
            return taken

    def finish(self, chain: bytes) -> None:
        """Drops what a chain has here and what will come for it."""
        with self._changed:
            self._forget(chain)
            self._broken.pop(chain, None)
            self._unwanted[chain] = None
            while len(self._unwanted) > _REMEMBERED:
                self._unwanted.popitem(last=False)

    def _covered(self, chain: bytes, layer: int, start: int, end: int) -> bool:
        return layer in self._held.get(chain, {}) and self._reached(chain, layer, start) >= end

    def _reached(self, chain: bytes, layer: int, start: int) -> int:
        reached = start
        for arrival in sorted(self._held.get(chain, {}).get(layer, ()), key=lambda arrival: arrival.piece):
            if arrival.piece.start <= reached:
                reached = max(reached, arrival.piece.end)
        return reached

    def _forget(self, chain: bytes) -> None:
        for arrivals in self._held.pop(chain, {}).values():
            self.bytes -= sum(arrival.payload.nbytes for arrival in arrivals)
        self._came.pop(chain, None)
