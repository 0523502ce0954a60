"""Keys and values that came and were not taken yet: bounded in bytes and in time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Condition
from typing import NamedTuple

from forerun.runahead.wire import Piece

__all__ = ["Arrival", "Mailbox"]

_REMEMBERED = 4096  # chains that are over, or were broken off


class Arrival(NamedTuple):
    """A piece and its bytes."""

    piece: Piece
    payload: memoryview
    origin: str = ""  # "host:port" at which the engine that sent it listens


class Mailbox:
    """Arrivals by chain and layer.

    Args:
        capacity: Bytes held at most; a chain that brings more is broken off, as it can be computed without.
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
        chain = arrival.piece.chain
        with self._changed:
            self._expire()
            if chain in self._unwanted or chain in self._broken:
                self.dropped += 1
                return
            if self.bytes + arrival.payload.nbytes > self._capacity:
                self.dropped += 1
                self._forget(chain)
                self._break_off(chain)
                return
            self._held.setdefault(chain, {}).setdefault(arrival.piece.layer, []).append(arrival)
            self._came[chain] = time.monotonic()
            self.bytes += arrival.payload.nbytes
            self._changed.notify_all()

    def reach(self) -> dict[bytes, int]:
        """Of each chain, up to which token its first layer is there without a gap."""
        with self._changed:
            self._expire()
            return {chain: self._reached(chain, 0, 0) for chain in self._held}

    def break_off(self, chains: Iterable[bytes]) -> None:
        """Nothing more will come for these chains; whoever waits for them need not."""
        with self._changed:
            for chain in chains:
                self._break_off(chain)

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
        settled = self.take_first([Piece(chain, layer, start, end)], timeout)
        return settled[1] if settled is not None else None

    def take_first(self, wanted: Sequence[Piece], timeout: float) -> tuple[Piece, list[Arrival] | None] | None:
        """Of several pieces the first that is there whole, with its arrivals, or is broken off, with None.

        None if that takes too long.
        """

        def settled() -> Piece | None:
            whole = (piece for piece in wanted if self._covered(*piece))
            return next(whole, None) or next((piece for piece in wanted if piece.chain in self._broken), None)

        with self._changed:
            piece = self._changed.wait_for(settled, timeout)
            if piece is None:
                return None
            if not self._covered(*piece):
                return piece, None
            taken = self._held[piece.chain].pop(piece.layer)
            self.bytes -= sum(arrival.payload.nbytes for arrival in taken)
            if not self._held[piece.chain]:
                self._forget(piece.chain)
            return piece, taken

    def finish(self, chain: bytes) -> None:
        """Drops what a chain has here and what will come for it."""
        with self._changed:
            self._forget(chain)
            self._broken.pop(chain, None)
            self._unwanted[chain] = None
            while len(self._unwanted) > _REMEMBERED:
                self._unwanted.popitem(last=False)

    def _break_off(self, chain: bytes) -> None:
        if chain not in self._unwanted:
            self._broken[chain] = None
            while len(self._broken) > _REMEMBERED:
                self._broken.popitem(last=False)
            self._changed.notify_all()

    def _expire(self) -> None:
        now = time.monotonic()
        for chain in [chain for chain, came in self._came.items() if now - came > self._keep]:
            self.dropped += sum(map(len, self._held[chain].values()))
            self._forget(chain)

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
