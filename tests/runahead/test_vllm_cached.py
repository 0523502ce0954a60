"""`RunaheadConnector` on the real vLLM with prefix caches and chunked prefill, and with an engine that is killed."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import pytest

pytest.importorskip("vllm")

from engines import SECRET, Engine, alone, assert_same, failures, make_model, parts, prompt, run_chain, start

from forerun.runahead.transport import Peer, Sender
from forerun.runahead.wire import Piece

LAYERS = 3
TOKEN_BYTES = 2 * 32 * 4  # keys and values, 1 head of 32 float32

pytestmark = pytest.mark.timeout(900)  # slow beside other work


@pytest.fixture(scope="module")
def caching(tmp_path_factory):
    """Two engines, MQA, with prefix caches and chunks that end within blocks."""
    model = make_model(tmp_path_factory.mktemp("caching"), layers=LAYERS, kv_heads=1, kind="qwen3")
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 150, "timeout": 40}
    started = start(*(Engine(model, **options) for _ in range(2)))
    yield started
    for engine in started:
        engine.close()


def test_chunks_and_cached_prefixes(caching):
    """Chunks end within blocks; then the same prompt, and others that share its beginning, from both caches."""
    tokens = prompt(20, 700)
    fresh, _ = run_chain(caching, tokens, [0, 384, 700])
    again, told = run_chain(caching, tokens, [0, 384, 700])
    assert_same(again, fresh)
    for length, start_at in ((650, 320), (700, 96), (420, 384)):
        other = [*tokens[: length - 60], *prompt(length, 60)]
        answer, told = run_chain(caching, other, [0, start_at, length])
        # The first engine has no more than the part of it that is cached: it computes the rest for itself.
        assert_same(answer, alone(caching[0], other))
    assert [failures(one) for one in told] == [0, 0]


def test_a_failed_load_leaves_nothing_in_the_prefix_cache(caching):
    tokens, chain = prompt(21, 500), os.urandom(16)
    sender = Sender(Peer(SECRET.encode(), caching[1].model), caching[1].address, "tcp")
    sender.send(Piece(chain, 0, 0, 256), np.full(256 * TOKEN_BYTES, 60, np.uint8).data)
    assert sender.flush(10)
    sender.close()
    part = {"chain": chain.hex(), "start": 256, "end": 500}
    told = caching[1].ask([{"tokens": tokens, "count": 64, "runahead": part}])
    assert told["counted"]["recomputes"] == 1
    expected = alone(caching[0], tokens)
    assert_same(told["answers"][0], expected)
    assert_same(alone(caching[1], tokens), expected)


def test_an_engine_that_is_killed(caching):
    """SIGKILL of the engine before while it computes: the last one answers all the same. (Its engine is gone after.)"""
    first, last = caching
    tokens = prompt(22, 2000)
    expected = alone(last, prompt(23, 1900))
    for engine, request in zip(caching, parts(tokens, [0, 1792, 2000], caching, 64), strict=True):
        engine.begin([request])
    time.sleep(0.05)
    first.kill()
    began = time.monotonic()
    answer = last.finish()["answers"][0]
    assert time.monotonic() - began < 40 + 40  # nothing may have been said yet that could break off
    assert_same(answer, alone(last, tokens))
    assert_same(alone(last, prompt(23, 1900)), expected)


@pytest.mark.soak
def test_ranks_of_two_engines_are_a_chain_each(tmp_path):
    """Tensor parallelism within the engines: rank by rank; then a rank of the last one loses what it waits for."""
    model = make_model(tmp_path)
    options = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, "timeout": 60}
    addresses = [("127.0.0.1", free_ports(2)) for _ in range(2)]
    pair = [Engine(model, listen="{}:{}".format(*address), **options) for address in addresses]
    single = Engine(model, chained=False)
    try:
        start(*pair, single)
        for engine, address in zip(pair, addresses, strict=True):
            engine.address = address
        for turn in range(10):
            tokens = prompt(200 + turn, 300 + 50 * turn)
            answer, told = run_chain(pair, tokens, [0, 192, len(tokens)])
            assert_same(answer, alone(single, tokens))
            assert failures(told[-1]) == 0
        tokens = prompt(300, 500)
        part = {"chain": os.urandom(16).hex(), "start": 256, "end": 500}
        lead = {"chain": part["chain"], "start": 0, "end": 256, "next": "127.0.0.1:9"}  # nobody
        pair[1].begin([{"tokens": tokens, "count": 64, "runahead": part}])
        pair[0].ask([{"tokens": tokens[:256], "count": 1, "runahead": lead}])
        told = pair[1].finish()
        assert_same(told["answers"][0], alone(single, tokens))
        assert failures(told) == 1
    finally:
        for engine in (*pair, single):
            engine.close()


def free_ports(count):
    """The first of so many that follow each other."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                for i in range(1, count):
                    socket.create_server(("127.0.0.1", port + i)).close()
            except OSError:
                continue
            return port


@pytest.mark.soak
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"kv_heads": 4}, {}),
        ({"kv_heads": 1}, {"block_size": 64}),
        ({}, {"block_size": 128}),
        ({"kind": "qwen3", "head_size": 64}, {"enforce_eager": False}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"layers": 5}, {"enable_prefix_caching": True, "max_num_batched_tokens": 200}),
    ],
    ids=["mha", "mqa", "gqa", "compiled", "bfloat16", "float16", "chunked"],
)
def test_models_and_modes(tmp_path, shape, options):
    started = start(*(Engine(make_model(tmp_path, **shape), **options) for _ in range(2)))
    try:
        rng, block = np.random.default_rng(0), options.get("block_size", 64)
        for turn in range(20):
            length = int(rng.integers(200, 1500))
            tokens = prompt(turn, length)
            bounds = [0, block * int(rng.integers(1, (length - 1) // block + 1)), length]
            answer, told = run_chain(started, tokens, bounds)
            assert_same(answer, alone(started[0], tokens))
            assert failures(told[-1]) == 0
    finally:
        for engine in started:
            engine.close()
