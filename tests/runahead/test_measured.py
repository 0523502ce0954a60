"""The recurrence against the clock: relays over real sockets, between engines that sleep where they would compute."""

from __future__ import annotations

import os
import threading
import time
from itertools import accumulate

import pytest
import torch

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.partition import search
from forerun.runahead.relay import Relay
from forerun.runahead.stage import Part, Stage
from forerun.runahead.transport import Peer
from forerun.runahead.wire import identity

BLOCK, LAYERS, TOKENS = 4, 8, 96
CHAIN = Chain(Cost(0.0, 0.02, 0.0, 1e-4), Link(float("inf")), LAYERS, kv_bytes=96, before=0.25)
PEER = Peer(b"secret", identity("sleeping"), timeout=20.0)


class Sleeper:
    """An engine's worker that takes the time of the cost model and computes nothing."""

    def __init__(self):
        caches = [torch.zeros(32, 2, BLOCK, 3) for _ in range(LAYERS)]
        self.relay = Relay(caches, BLOCK, PEER, ("127.0.0.1", 0), "auto", 20)
        self._late = 0.0

    def spend(self, seconds):
        """Sleeps; what a busy machine made it oversleep is taken off the next sleep."""
        began = time.monotonic()
        time.sleep(max(0.0, seconds - self._late))
        self._late += time.monotonic() - began - seconds

    def exchange(self, layer):
        before = self.relay.waited
        self.relay.layer(layer)
        self._late = max(0.0, self._late - (self.relay.waited - before))  # in time, it would have waited longer

    def prefill(self, part, tokens):
        past = part.stage.start
        linear = float(CHAIN.cost.linear(tokens)) / LAYERS
        attention = float(CHAIN.cost.attention(tokens, past)) / LAYERS
        self.relay.begin([part], [])
        for layer in range(LAYERS):
            self.spend(CHAIN.before * linear)
            self.exchange(layer)
            self.spend(attention + (1 - CHAIN.before) * linear)
        self.done = time.monotonic()


def measure(contexts):
    """Seconds to the first token, and that each engine waited."""
    sleepers, chain = [Sleeper() for _ in contexts], os.urandom(16)
    ends = list(accumulate(contexts))
    threads = []
    try:
        for i, (sleeper, tokens, end) in enumerate(zip(sleepers, contexts, ends, strict=True)):
            is_last = i == len(contexts) - 1
            stage = Stage(chain, end - tokens, end, None if is_last else sleepers[i + 1].relay.address)
            load, send = (0, end - tokens) if i else None, None if is_last else (0, end)
            part = Part(stage, list(range(32)), load, send)
            threads.append(threading.Thread(target=sleeper.prefill, args=(part, tokens), daemon=True))
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not any(sleeper.relay.take_failed_blocks() for sleeper in sleepers)
        return sleepers[-1].done - began, [sleeper.relay.waited for sleeper in sleepers]
    finally:
        for sleeper in sleepers:
            sleeper.relay.close()


def close_to(value, share):
    return pytest.approx(value, rel=share)


@pytest.mark.parametrize(
    "contexts",
    [(48, 48), (64, 32), (32, 64), (32, 32, 32), (40, 32, 24), (64, 16, 16)],
    ids=str,
)
def test_the_recurrence_predicts_the_first_token(contexts):
    predicted = CHAIN.timeline(contexts)
    assert 0.5 < float(predicted.ttft) < CHAIN.single(TOKENS)
    for _ in range(4):  # whatever else the machine does only adds to it
        measured, waited = measure(contexts)
        assert measured > float(predicted.ttft) * 0.99
        if measured == close_to(float(predicted.ttft), 0.05):
            break
    assert measured == close_to(float(predicted.ttft), 0.05)
    assert waited == pytest.approx(predicted.waits.tolist(), abs=0.05 * float(predicted.ttft))


def test_the_searched_split_is_the_fastest_of_those_measured():
    searched = search(CHAIN, TOKENS, 3, block=BLOCK, slack=0).contexts
    best = min(measure(searched)[0] for _ in range(3))
    for other in ((32, 32, 32), (64, 16, 16), (16, 32, 48), (48, 24, 24)):
        assert measure(other)[0] > best
    assert CHAIN.single(TOKENS) / best > 2.5
