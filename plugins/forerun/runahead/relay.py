"""The worker's half of a stage: layer by layer, own keys and values go out, those before come in and are handed on."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from forerun.runahead.mailbox import Arrival
from forerun.runahead.stage import Over, Part
from forerun.runahead.transport import Address, Peer, Receiver, Sender
from forerun.runahead.wire import Piece

__all__ = ["Relay"]

_logger = logging.getLogger(__name__)
_NEIGHBOURS = 64  # engines that are sent to at a time
_SHARES = 4096  # kept until they are reported


class Relay:
    """Moves blocks between a cache and the neighbours.

    Args:
        caches: Of each layer, `[blocks, ...]`, in order.
        block: Tokens of a block.
        peer: What is expected of the neighbours.
        listen: Where the engine before is heard.
        by: As `forerun.runahead.transport.Sender`.
        timeout: Seconds to wait for one layer.
        rank: Added to the port of every neighbour: a tensor-parallel rank talks to its like.

    Raises:
        OSError: The address to listen on is taken.
    """

    def __init__(
        self,
        caches: Sequence[Tensor],
        block: int,
        peer: Peer,
        listen: Address,
        by: Literal["auto", "tcp", "local"],
        timeout: float,
        rank: int = 0,
    ) -> None:
        self._caches, self._block, self._peer, self._by, self._timeout = caches, block, peer, by, timeout
        self._rank = rank
        self._receiver = Receiver(peer, listen)
        self._senders: dict[Address, Sender] = {}
        self._parts: Sequence[Part] = ()
        self._loading: set[int] = set()  # blocks
        self._failed_blocks: set[int] = set()
        self._failed: set[bytes] = set()  # chains whose load failed since `take_failed`
        self._lost: set[bytes] = set()  # chains of which nothing more is loaded
        self._muted: set[bytes] = set()  # chains of which nothing more is sent
        self._began = 0.0  # when the step did (s, monotonic)
        self._step_waits: dict[bytes, float] = {}  # seconds in this step, of each chain that is loaded
        self.counted = dict.fromkeys(("bytes_sent", "bytes_loaded", "layers_loaded"), 0)
        # Seconds, by the engine before; "lost": for what never came.
        self.waits: dict[str, float] = defaultdict(float)
        self.shares: deque[float] = deque(maxlen=_SHARES)  # of its loading step, that a request waited

    @property
    def address(self) -> Address:
        """Where the engine before sends to."""
        return self._receiver.address

    @property
    def waited(self) -> float:
        """Seconds, in all."""
        return sum(self.waits.values())

    @property
    def receiver(self) -> Receiver:
        return self._receiver

    def begin(self, parts: Sequence[Part], finished: Iterable[Over]) -> None:
        """A step begins that does this; these requests are over."""
        for over in finished:
            self._receiver.mailbox.finish(over.chain)
            self._lost.discard(over.chain)
            if over.misses is not None:
                self._mute(over.chain, over.misses)
            self._muted.discard(over.chain)
        self._parts = parts
        self._began = time.monotonic()
        self._step_waits = {part.stage.chain: 0.0 for part in parts if part.load is not None}
        self._loading = {block for part in parts if part.load for block in self._blocks(part, *part.load)}
        for part in parts:
            if part.load is not None and part.stage.chain in self._lost:
                self._failed_blocks.update(self._blocks(part, *part.load))

    def layer(self, index: int) -> None:
        """Called in every layer, its own keys and values written, before attention: sends first, then waits."""
        late = []
        for part in self._parts:
            if part.send is None:
                continue
            own = (max(part.send[0], part.load[1]) if part.load else part.send[0], part.send[1])
            if own[0] >= own[1]:
                continue
            if self._loading.isdisjoint(self._blocks(part, *own)):
                self._send_own(part, index, *own)
            else:
                late.append((part, own))  # a prefix that another request of this step loads
        self._load_all(index)
        for part, own in late:
            self._send_own(part, index, *own)

    def take_failed_blocks(self) -> set[int]:
        """Blocks that do not hold what they should, since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed(self) -> frozenset[bytes]:
        """Chains whose load failed since the last call."""
        failed, self._failed = frozenset(self._failed), set()
        return failed

    def close(self) -> None:
        """Ends all connections."""
        self._receiver.close()
        for sender in self._senders.values():
            sender.close()

    def _load_all(self, index: int) -> None:
        """Loads what comes first, first: engines of several chains may wait for what each other hands on."""
        pending = {
            # The engine after wants all.
            Piece(part.stage.chain, index, 0 if part.send is not None else part.load[0], part.load[1]): part
            for part in self._parts
            if part.load is not None and part.stage.chain not in self._lost
        }
        deadline = time.monotonic() + self._timeout
        while pending:
            began = time.monotonic()
            settled = self._receiver.mailbox.take_first(list(pending), max(0.0, deadline - began))
            waited = time.monotonic() - began
            piece, arrivals = settled or (next(iter(pending)), None)
            self._load(pending.pop(piece), index, arrivals)
            self._step_waits[piece.chain] += waited
            self.waits[arrivals[-1].origin if arrivals else "lost"] += waited

    def _load(self, part: Part, index: int, arrivals: list[Arrival] | None) -> None:
        assert part.load is not None
        chain = part.stage.chain
        if arrivals is None or not all(self._fits(arrival, index) for arrival in arrivals):
            told = "did not come" if arrivals is None else "is not of the size expected"
            _logger.warning("layer %d of chain %s %s: computed here", index, chain.hex(), told)
            self._lost.add(chain)
            self._failed.add(chain)
            self._failed_blocks.update(self._blocks(part, *part.load))
            if part.stage.next is not None:
                self._mute(chain, part.stage.next)
            return
        for arrival in arrivals:
            self._write(part, index, arrival)
            if part.send is not None:
                self._send(part, arrival.piece, arrival.payload)
        self.counted["layers_loaded"] += 1
        if index == len(self._caches) - 1:
            self.shares.append(self._step_waits[chain] / (time.monotonic() - self._began))

    def _write(self, part: Part, index: int, arrival: Arrival) -> None:
        assert part.load is not None
        start, end = max(arrival.piece.start, part.load[0]), min(arrival.piece.end, part.load[1])
        if start >= end:
            return
        cache = self._caches[index]
        content = torch.from_numpy(np.frombuffer(arrival.payload, np.uint8)).view(cache.dtype)
        first = (start - arrival.piece.start) // self._block
        blocks = self._blocks(part, start, end)
        came = content.view(-1, *cache.shape[1:])[first : first + len(blocks)]
        cache.index_copy_(0, torch.tensor(blocks, device=cache.device), came.to(cache.device))
        self.counted["bytes_loaded"] += came.nbytes

    def _send_own(self, part: Part, index: int, start: int, end: int) -> None:
        if not self._may_send(part):
            return
        cache = self._caches[index]
        # A copy: the blocks may be another's before it is sent.
        content = cache.index_select(0, torch.tensor(self._blocks(part, start, end), device=cache.device)).cpu()
        payload = content.view(torch.uint8).reshape(-1).numpy().data
        self._send(part, Piece(part.stage.chain, index, start, end), payload)

    def _send(self, part: Part, piece: Piece, payload: memoryview) -> None:
        if part.stage.next is None or not self._may_send(part):
            return
        sender = self._sender(part.stage.next)
        if sender is not None and sender.send(piece, payload):
            self.counted["bytes_sent"] += payload.nbytes
        else:
            self._mute(part.stage.chain, part.stage.next)

    def _mute(self, chain: bytes, follows: Address) -> None:
        """Sends nothing more of a chain, and tells the engine after, which so need not wait."""
        if chain not in self._muted:
            self._muted.add(chain)
            if (sender := self._sender(follows)) is not None:
                sender.break_off(chain)

    def _sender(self, address: Address) -> Sender | None:
        """The sender to an engine; None if there are too many that still have to send, as a client may name any."""
        address = (address[0], address[1] + self._rank)
        if address not in self._senders:
            if len(self._senders) >= _NEIGHBOURS:
                idle = next((other for other, sender in self._senders.items() if sender.flush(0)), None)
                if idle is None:
                    return None
                self._senders.pop(idle).close()
            self._senders[address] = Sender(self._peer, address, self._by, self.address[1])
        return self._senders[address]

    def _may_send(self, part: Part) -> bool:
        """Whether what the request has is right: no block of it failed to load, for itself or for another.

        What is not sent once is missed, and the engine after computes it itself: nothing more is sent.
        """
        if part.stage.next is not None and not self._failed_blocks.isdisjoint(part.blocks):
            self._mute(part.stage.chain, part.stage.next)
        return part.stage.chain not in self._muted

    def _blocks(self, part: Part, start: int, end: int) -> list[int]:
        return part.blocks[start // self._block : end // self._block]

    def _fits(self, arrival: Arrival, index: int) -> bool:
        start, end = arrival.piece.start, arrival.piece.end
        size = (end - start) // self._block * self._caches[index][0].nbytes
        return start % self._block == end % self._block == 0 and arrival.payload.nbytes == size
