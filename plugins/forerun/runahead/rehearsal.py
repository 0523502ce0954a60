"""A chain rehearsed: real caches, relays and sockets between engines that sleep where they would compute.

What it takes, against the recurrence's prediction, is what the recurrence leaves out. It needs no cores, so that more
engines than the machine has can be rehearsed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from forerun.runahead.chain import Chain
from forerun.runahead.relay import Relay
from forerun.runahead.stage import Part, Stage
from forerun.runahead.transport import Peer
from forerun.runahead.wire import identity

__all__ = ["Rehearsed", "rehearse"]


class Rehearsed(NamedTuple):
    """What a rehearsal took."""

    ttft: float  # seconds to the first token
    waits: list[float]  # seconds that each engine waited for the one before


class _Sleeper:
    """An engine's worker that takes the time of the cost model and computes nothing."""

    def __init__(self, chain: Chain, tokens: int, block: int, peer: Peer, timeout: float) -> None:
        elements = chain.kv_bytes // 4
        caches = [torch.zeros(-(-tokens // block), block, elements) for _ in range(chain.layers)]
        self.relay = Relay(caches, block, peer, ("127.0.0.1", 0), "auto", timeout)
        self.done = 0.0
        self._chain, self._late = chain, 0.0

    def prefill(self, part: Part, tokens: int) -> None:
        chain, past = self._chain, part.stage.start
        linear = float(chain.cost.linear(tokens)) / chain.layers
        attention = float(chain.cost.attention(tokens, past)) / chain.layers
        self.relay.begin([part], [])
        for layer in range(chain.layers):
            self._spend(chain.before * linear)
            self._exchange(layer)
            self._spend(attention + (1 - chain.before) * linear)
        self.done = time.monotonic()

    def _spend(self, seconds: float) -> None:
        """Sleeps; what a busy machine made it oversleep is taken off the next sleep."""
        began = time.monotonic()
        time.sleep(max(0.0, seconds - self._late))
        self._late += time.monotonic() - began - seconds

    def _exchange(self, layer: int) -> None:
        before = self.relay.waited
        self.relay.layer(layer)
        self._late = max(0.0, self._late - (self.relay.waited - before))  # in time, it would have waited longer


def rehearse(chain: Chain, contexts: Sequence[int], *, block: int, timeout: float = 60.0) -> Rehearsed:
    """Runs one chain of sleeping engines over loopback, whatever link the chain is planned with.

    Args:
        chain: What the engines take; `kv_bytes` a multiple of 4.
        contexts: Tokens of each engine's context; all but the last multiples of `block`.
        block: Tokens of a block of the caches.
        timeout: Seconds that a layer may wait, and the whole chain twice that.

    Raises:
        RuntimeError: An engine did not end in time, or lost its neighbour.
    """
    tokens, ends, peer = sum(contexts), list(accumulate(contexts)), Peer(b"rehearsal", identity("sleeping"))
    sleepers = [_Sleeper(chain, tokens, block, peer, timeout) for _ in contexts]
    name, threads = os.urandom(16), []
    blocks = list(range(-(-tokens // block)))
    try:
        for i, (sleeper, own, end) in enumerate(zip(sleepers, contexts, ends, strict=True)):
            is_last = i == len(contexts) - 1
            stage = Stage(name, end - own, end, None if is_last else sleepers[i + 1].relay.address)
            part = Part(stage, blocks, (0, end - own) if i else None, None if is_last else (0, end))
            threads.append(threading.Thread(target=sleeper.prefill, args=(part, own), daemon=True))
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, began + 2 * timeout - time.monotonic()))
            if thread.is_alive():
                raise RuntimeError(f"a rehearsed engine did not end in {2 * timeout} s")
        if any(sleeper.relay.take_failed_blocks() for sleeper in sleepers):
            raise RuntimeError("a rehearsed engine lost its neighbour")
        return Rehearsed(sleepers[-1].done - began, [sleeper.relay.waited for sleeper in sleepers])
    finally:
        for sleeper in sleepers:
            sleeper.relay.close()
