"""The recurrence against the clock: relays over real sockets, between engines that sleep where they would compute."""

from __future__ import annotations

import pytest

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.partition import search
from forerun.runahead.rehearsal import rehearse

BLOCK, LAYERS, TOKENS = 4, 8, 96
CHAIN = Chain(Cost(0.0, 0.02, 0.0, 1e-4), Link(float("inf")), LAYERS, kv_bytes=96, before=0.25)


def measure(contexts):
    return rehearse(CHAIN, contexts, block=BLOCK, timeout=20)


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
    best = min(measure(searched).ttft for _ in range(3))
    for other in ((32, 32, 32), (64, 16, 16), (16, 32, 48), (48, 24, 24)):
        assert measure(other).ttft > best
    assert CHAIN.single(TOKENS) / best > 2.5
