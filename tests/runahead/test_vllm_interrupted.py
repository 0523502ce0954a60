"""`RunaheadConnector` on the real vLLM: clients that leave, caches that are too small, engines that come back."""

from __future__ import annotations

import os
import socket
import time

import pytest

pytest.importorskip("vllm")

from engines import Engine, alone, assert_nothing_left, assert_same, failures, make_model, parts, prompt, start

TIMEOUT, CHUNK, BLOCKS = 60.0, 160, 40  # seconds, tokens of a step, blocks of 32 tokens

pytestmark = pytest.mark.timeout(900)  # slow beside other work


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engines(model):
    """Two engines that compute in chunks and have room for 40 blocks, patient for a minute."""
    options = {"timeout": TIMEOUT, "max_num_batched_tokens": CHUNK, "max_model_len": 1024}
    options["num_gpu_blocks_override"] = BLOCKS + 1  # one is never used
    started = start(*(Engine(model, **options) for _ in range(2)))
    yield started
    for engine in started:
        engine.close()


@pytest.fixture(scope="module")
def unhurried(model):
    """An engine alone, with room for all."""
    (engine,) = start(Engine(model, chained=False))
    yield engine
    engine.close()


@pytest.fixture
def other(unhurried):
    """A request beside the chain's, and its answer."""
    tokens = prompt(40, 100)
    return {"tokens": tokens, "count": 16}, alone(unhurried, tokens, 16)


def test_a_client_leaves_the_sender_between_chunks(engines, unhurried, other):
    """Whoever waits for it hears so at once, and computes for itself."""
    first, last = engines
    tokens = prompt(41, 700)
    lead, follow = parts(tokens, [0, 512, 700], engines, 32)
    before = last.counts()
    last.begin([follow, other[0]])
    began = time.monotonic()
    told = first.ask([lead | {"abort": 2}, other[0]])
    assert told["answers"][0] is None
    assert_same(told["answers"][1], other[1])
    told = last.finish()
    assert time.monotonic() - began < TIMEOUT / 2
    assert_same(told["answers"][0], alone(unhurried, tokens, 32))
    assert_same(told["answers"][1], other[1])
    assert told["given_up"] == before["given_up"] + 1
    assert_nothing_left(first, last)


def test_a_client_leaves_while_the_receiver_waits(engines, other):
    """What the sender still has to say finds nobody, and is dropped."""
    first, last = engines
    lead, follow = parts(prompt(42, 700), [0, 512, 700], engines, 32)
    told = last.ask([follow | {"abort": 5}, other[0]])
    assert told["answers"][0] is None
    assert_same(told["answers"][1], other[1])
    assert_nothing_left(last)
    assert_same(first.ask([lead, other[0]])["answers"][1], other[1])
    assert_nothing_left(first, last)


def test_a_client_leaves_the_receiver_between_chunks(engines, other):
    first, last = engines
    lead, follow = parts(prompt(43, 700), [0, 128, 700], engines, 32)
    first.ask([lead])
    before = last.counts()["counted"]["bytes_loaded"]
    told = last.ask([follow | {"abort": 2}, other[0]])
    assert told["answers"][0] is None
    assert told["counted"]["bytes_loaded"] > before
    assert_same(told["answers"][1], other[1])
    assert_nothing_left(first, last)


def test_a_client_leaves_the_receiver_and_the_sender_goes_on(engines, other):
    """Layers that come for a request that is over are nobody's."""
    first, last = engines
    lead, follow = parts(prompt(44, 900), [0, 800, 900], engines, 32)
    first.begin([lead])
    last.ask([follow | {"abort": 1}])
    first.finish()
    assert_nothing_left(first, last)
    assert_same(last.ask([other[0]])["answers"][0], other[1])


def test_a_stage_is_preempted_between_chunks(engines, unhurried):
    """Three requests grow into the blocks that a chain's first stage needs: it starts anew, and sends the rest."""
    first, last = engines
    tokens, grown = prompt(45, 400), [prompt(46 + i, 315) for i in range(3)]
    lead, follow = parts(tokens, [0, 320, 400], engines, 64)
    before = first.counts()["preempted"], failures(last.counts())
    last.begin([follow])
    told = first.ask([*({"tokens": own, "count": 40} for own in grown), lead | {"lead": 6}])
    assert told["preempted"] > before[0]
    for answer, own in zip(told["answers"], grown, strict=False):
        assert_same(answer, alone(unhurried, own, 40))
    told = last.finish()
    assert_same(told["answers"][0], alone(unhurried, tokens, 64))
    assert failures(told) == before[1]  # so the chain's, all of it
    assert_nothing_left(first, last)


def test_the_last_stage_is_preempted_while_it_decodes(engines, unhurried):
    """What it had loaded is gone: it computes the whole prompt."""
    first, last = engines
    tokens, grown = prompt(50, 310), [prompt(51 + i, 310) for i in range(3)]
    lead, follow = parts(tokens, [0, 160, 310], engines, 64)
    first.ask([lead])
    before = last.counts()
    told = last.ask([*({"tokens": own, "count": 64} for own in grown), follow | {"lead": 6}])
    assert told["preempted"] > before["preempted"]
    assert told["counted"]["bytes_loaded"] > before["counted"]["bytes_loaded"]
    for answer, own in zip(told["answers"], [*grown, tokens], strict=True):
        assert_same(answer, alone(unhurried, own, 64))
    assert_nothing_left(first, last)


def test_more_chains_than_the_caches_hold(engines, unhurried):
    """Chains in both directions and requests of one engine, in caches that hold a third of them."""
    prompts = [prompt(60 + i, 330 + 40 * i) for i in range(8)]
    asked, batches = [(i, engines[:: 1 - 2 * (i % 2)]) for i in range(6)], {id(engine): [] for engine in engines}
    for i, pair in asked:
        for engine, request in zip(pair, parts(prompts[i], [0, 192, len(prompts[i])], pair, 48), strict=True):
            batches[id(engine)].append((i if request["count"] > 1 else None, request))
    for i, engine in zip((6, 7), engines, strict=True):
        batches[id(engine)].insert(0, (i, {"tokens": prompts[i], "count": 48}))
    for engine in engines:
        engine.begin([request for _, request in batches[id(engine)]])
    for engine in engines:
        told = engine.finish()
        assert told["preempted"]
        for (i, _), answer in zip(batches[id(engine)], told["answers"], strict=True):
            if i is not None:
                assert_same(answer, alone(unhurried, prompts[i], 48))
    assert_nothing_left(*engines)


def test_an_engine_comes_back(engines, model, unhurried):
    """Killed in the midst and started again at its address: the engine before finds it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
    first, tokens = engines[0], prompt(70, 900)
    for turn in range(2):
        (last,) = start(Engine(model, listen=listen, timeout=TIMEOUT, max_num_batched_tokens=CHUNK))
        try:
            lead, follow = parts(tokens, [0, 640, 900], [first, last], 32, os.urandom(16).hex())
            last.begin([follow])
            first.begin([lead])
            if turn == 0:
                last.kill()
            else:
                told = last.finish()
                assert_same(told["answers"][0], alone(unhurried, tokens, 32))
                assert failures(told) == 0
            assert first.finish()["answers"][0]["tokens"]
        finally:
            last.close()
    assert_nothing_left(first, seconds=2 * TIMEOUT)
