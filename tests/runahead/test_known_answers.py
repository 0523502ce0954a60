"""Figures of the paper, closed forms, and a simulated Llama-7B: what the model of a chain must say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.partition import balanced, even_cap, search
from forerun.runahead.shape import Shape
from forerun.runahead.traffic import all_gather, dot_products, hops, sent

INSTANT = Link(math.inf)
LLAMA = Shape(layers=32, hidden=4096, heads=32, kv_heads=32, head_size=128, intermediate=11008)
C = 16384


def llama(gbytes: float = math.inf, early: bool = True) -> Chain:
    """Llama-7B on engines that reach 150 TFLOP/s each, no latency: 16k tokens take 1.88 s on one."""
    return Chain(LLAMA.cost(150e12), Link(gbytes * 1e9), LLAMA.layers, LLAMA.kv_bytes, LLAMA.before, early)


def compute_only(ratio: float, layers: int = 1) -> Chain:
    """Attention's work over all other work at C tokens; no projections before the send, no transfer time."""
    linear, attention = (0.0, 1.0) if ratio == math.inf else (1.0, ratio)
    return Chain(Cost(0, linear / C, 0, attention / C**2), INSTANT, layers, 1, before=0)


def zigzag(tokens: int, engines: int, gbytes: float) -> float:
    """All-gather context parallelism, balanced: its transfers come before attention, nothing overlaps."""
    gathered = all_gather(tokens, engines, LLAMA.kv_bytes * LLAMA.layers) / engines
    return llama().single(tokens) / engines + gathered / (gbytes * 1e9)


def test_the_papers_toy():
    contexts = (4, 3, 2)
    assert dot_products(contexts) == [16, 21, 18]
    assert max(dot_products(contexts)) == 21
    assert sum(contexts) ** 2 / 3 == 27  # tensor or sequence parallel, per engine
    assert sent(contexts, bytes_per_token=2) == 22  # a key and a value
    assert all_gather(9, 3, bytes_per_token=2) == 36


def test_an_even_split_sends_half_of_all_gather():
    for engines in (2, 3, 4, 8):
        contexts = [C // 8] * engines
        assert 2 * sent(contexts, 7) == all_gather(sum(contexts), engines, 7)
    assert hops((4, 3, 2), 2) == [8, 14]


def test_bytes_of_keys_and_values():
    assert LLAMA.kv_bytes == 16384
    falcon = {"num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71, "multi_query": True}
    assert Shape.from_config({**falcon, "intermediate_size": 18176, "dtype": "bfloat16"}).kv_bytes == 256


def test_attention_alone_splits_by_square_roots():
    assert balanced(math.inf, 2) == pytest.approx((0.707, 0.293), abs=5e-4)
    assert balanced(math.inf, 4) == pytest.approx((0.5, 0.207, 0.159, 0.134), abs=5e-4)
    assert balanced(1e9, 4) == pytest.approx(balanced(math.inf, 4), abs=1e-4)
    assert balanced(0, 4) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("ratio", [0, 0.1, 1 / 3, 1, 10, math.inf])
@pytest.mark.parametrize("engines", [2, 3, 4, 8])
def test_the_closed_form_gives_every_engine_the_same_work(ratio, engines):
    shares = np.array(balanced(ratio, engines))
    chain = compute_only(ratio)
    work = chain.cost(shares * C, (np.cumsum(shares) - shares) * C)
    assert shares.sum() == pytest.approx(1)
    assert work == pytest.approx(work.mean())
    assert chain.single(C) / chain.ttft(shares * C) == pytest.approx(engines)  # the ideal speed-up, exactly


@pytest.mark.parametrize("ratio", [0, 0.1, 1 / 3, 1, 10])
@pytest.mark.parametrize("engines", [2, 4, 8])
def test_an_even_split_is_capped(ratio, engines):
    chain = compute_only(ratio)
    speedup = chain.single(C) / float(chain.ttft([C / engines] * engines))
    assert speedup == pytest.approx(even_cap(ratio, engines))
    assert speedup <= engines * (1 + 1e-12)


@pytest.mark.parametrize("ratio", [0.1, 1 / 3, 1, 10])
@pytest.mark.parametrize("engines", [2, 3, 4])
def test_the_search_finds_the_closed_form(ratio, engines):
    """But for the last layer, of which the chain need not wait for all engines: hence the many layers."""
    found = search(compute_only(ratio, layers=400), C, engines, slack=0)
    assert np.array(found.contexts) / C == pytest.approx(balanced(ratio, engines), abs=4e-3)
    assert found.speedup == pytest.approx(engines, rel=4e-3)


def test_one_simulated_gpu():
    assert llama().single(C) == pytest.approx(1.88, abs=5e-3)


@pytest.mark.parametrize(("gbytes", "zigzags"), [(300, 0.261), (10, 0.987), (1, 7.75)])
def test_simulated_zigzag(gbytes, zigzags):
    assert zigzag(C, 8, gbytes) == pytest.approx(zigzags, rel=2e-3)


# The stated .652 and 1.66 are of a coarser search: this one finds .650 and 1.647.
@pytest.mark.parametrize(("gbytes", "stated"), [(300, 0.240), (10, 0.652), (1, 1.66)])
def test_simulated_runahead(gbytes, stated):
    found = search(llama(gbytes), C, 8, fewest=8, slack=0)
    assert len(found.contexts) == 8
    assert stated * 0.99 <= found.ttft <= stated
    assert found.ttft < zigzag(C, 8, gbytes)
    assert search(llama(gbytes), C, 8, slack=0).ttft <= found.ttft


def test_the_compute_optimal_split_is_slower_than_one_engine_on_a_slow_link():
    chain = llama(1)
    ratio = float(chain.cost.attention(C, 0) / chain.cost.linear(C))
    contexts = [share * C for share in balanced(ratio, 8)]
    assert float(chain.ttft(contexts)) == pytest.approx(8.5, abs=0.05)
    assert float(chain.ttft(contexts)) > zigzag(C, 8, 1) > chain.single(C)


@pytest.mark.parametrize(("engines", "dearer"), [(2, 0.5), (4, 1.9), (8, 4.9)])
def test_sending_late_costs_percents(engines, dearer):
    contexts = search(llama(300), C, engines, fewest=engines).contexts
    late, early = (float(llama(300, early).ttft(contexts)) for early in (False, True))
    assert 100 * (late / early - 1) == pytest.approx(dearer, abs=0.05)
