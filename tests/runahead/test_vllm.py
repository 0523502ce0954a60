"""`RunaheadConnector` on the real vLLM: chains answer as one engine does, whatever becomes of a neighbour."""

from __future__ import annotations

import os
import socket
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

from engines import SECRET, Engine, alone, assert_same, failures, make_model, parts, prompt, run_chain, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forerun.runahead.traffic import sent
from forerun.runahead.transport import Peer, Sender
from forerun.runahead.wire import Piece

BLOCK, LAYERS, TIMEOUT = 32, 3, 4.0
TOKEN_BYTES = 2 * 2 * 32 * 4  # keys and values, 2 heads of 32 float32

pytestmark = pytest.mark.timeout(900)  # slow beside other work


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What an installed forerun says of its entry points, as this checkout would."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "forerun_checkout-0.dist-info").mkdir()
    (folder / "forerun_checkout-0.dist-info" / "METADATA").write_text("Name: forerun-checkout\nVersion: 0\n")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (group, points) = next(item for item in project["entry-points"].items() if item[0].startswith("vllm"))
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (folder / "forerun_checkout-0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def engines(model, metadata):
    """Three engines, GQA; the first one is soon out of patience, the last one knows the connector by its name."""
    made = (("auto", TIMEOUT, None), ("tcp", 100, None), ("auto", 100, metadata))
    started = start(*(Engine(model, transport=by, timeout=timeout, metadata=where) for by, timeout, where in made))
    yield started
    for engine in started:
        engine.close()


@st.composite
def splits(draw, engines):
    """A prompt's length and bounds at blocks, contexts of one block included."""
    blocks = draw(st.integers(engines, 30))
    inner = draw(st.sets(st.integers(1, blocks - 1), min_size=engines - 1, max_size=engines - 1))
    length = (blocks - 1) * BLOCK + draw(st.integers(1, BLOCK))
    return length, [0, *(BLOCK * end for end in sorted(inner)), length]


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_chain_answers_as_one_engine(engines, count, data):
    length, bounds = data.draw(splits(count))
    tokens = prompt(length, length)
    expected = alone(engines[-1], tokens)
    before = failures(engines[-1].counts())
    answer, told = run_chain(engines[-count:], tokens, bounds)
    assert_same(answer, expected)
    assert failures(told[-1]) == before  # so it is the chain's


def test_counted_bytes_are_the_formulas(engines):
    tokens, bounds = prompt(5, 700), [0, 352, 544, 700]
    before = [told["counted"] for _, told in ((e, e.counts()) for e in engines)]
    _, told = run_chain(engines, tokens, bounds, count=1)
    moved = [after["counted"]["bytes_sent"] - old["bytes_sent"] for after, old in zip(told, before, strict=True)]
    assert moved == [352 * TOKEN_BYTES * LAYERS, 544 * TOKEN_BYTES * LAYERS, 0]
    assert sum(moved) == sent((352, 192, 156), TOKEN_BYTES * LAYERS)
    assert told[-1]["counted"]["bytes_loaded"] - before[-1]["bytes_loaded"] == 544 * TOKEN_BYTES * LAYERS


def test_requests_of_all_kinds_at_once(engines):
    """Chains from A to B and from B to A, and requests of one engine alone, together in both engines."""
    a, b = engines[:2]
    prompts = [prompt(100 + i, 200 + 61 * i) for i in range(8)]
    expected = [alone(a, tokens, 32) for tokens in prompts]
    asked = {id(a): [], id(b): []}
    for i, tokens in enumerate(prompts):
        pair = ((a, b), (b, a))[i % 2]
        if i >= 6:
            asked[id(pair[0])].append((i, {"tokens": tokens, "count": 32}))
            continue
        bounds = [0, 32 * (1 + len(tokens) // 64), len(tokens)]
        for engine, request in zip(pair, parts(tokens, bounds, pair, 32), strict=True):
            asked[id(engine)].append((i if request["count"] > 1 else None, request))
    for engine in (a, b):
        engine.begin([request for _, request in asked[id(engine)]])
    for engine in (a, b):
        told = engine.finish()
        for (i, _), answer in zip(asked[id(engine)], told["answers"], strict=True):
            if i is not None:
                assert_same(answer, expected[i])


@pytest.mark.parametrize(
    "given_part",
    [
        {"chain": "zz", "start": 64, "end": 200},
        {"chain": "00" * 16, "start": 65, "end": 200},
        {"chain": "00" * 16, "start": -32, "end": 200},
        {"chain": "00" * 16, "start": 64, "end": 200, "next": "nowhere"},
        {"chain": "00" * 16, "start": 320, "end": 400},
        {"chain": "00" * 16, "start": True, "end": 200},
        "words",
    ],
)
def test_malformed_parameters_do_no_harm(engines, given_part):
    tokens = prompt(6, 200)
    expected = alone(engines[0], tokens, 8)
    answer = engines[0].ask([{"tokens": tokens, "count": 8, "runahead": given_part}])["answers"][0]
    assert_same(answer, expected)


def test_without_the_engine_before_a_request_is_computed_in_time(engines):
    tokens = prompt(7, 400)
    expected = alone(engines[0], tokens)
    part = {"chain": os.urandom(16).hex(), "start": 192, "end": 400}
    before = engines[0].counts()
    began = time.monotonic()
    told = engines[0].ask([{"tokens": tokens, "count": 64, "runahead": part}])
    assert time.monotonic() - began < TIMEOUT + 10
    assert told["given_up"] == before["given_up"] + 1
    assert_same(told["answers"][0], expected)


def test_a_lost_engine_after_harms_nobody(engines):
    """The next engine is not there: the stage does its part, and the engine goes on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    part = {"chain": os.urandom(16).hex(), "start": 0, "end": 320, "next": nobody}
    told = engines[0].ask([{"tokens": prompt(8, 320), "count": 1, "runahead": part}])
    assert len(told["answers"][0]["tokens"]) == 1
    tokens = prompt(9, 300)
    answer, _ = run_chain(engines[:2], tokens, [0, 160, 300], count=16)
    assert_same(answer, alone(engines[0], tokens, 16))


@pytest.mark.parametrize("way", ["silent", "closes", "wrong size", "another model"])
def test_an_engine_before_that_fails_in_the_midst(engines, way):
    """It sends nonsense for the first layers, and then no more: everything is computed anew, and right."""
    tokens, chain = prompt(10, 500), os.urandom(16)
    expected = alone(engines[0], tokens)
    model = bytes(32) if way == "another model" else engines[0].model
    before = engines[0].counts()
    sender = Sender(Peer(SECRET.encode(), model), engines[0].address, "tcp")
    nonsense = np.full(256 * TOKEN_BYTES - 4 * (way == "wrong size"), 60, np.uint8).data
    for layer in range(LAYERS - 1):
        sender.send(Piece(chain, layer, 0, 256), nonsense)
    part = {"chain": chain.hex(), "start": 256, "end": 500}
    if way != "another model":
        assert sender.flush(10)
    if way == "closes":
        sender.close()
    began = time.monotonic()
    told = engines[0].ask([{"tokens": tokens, "count": 64, "runahead": part}])
    took = time.monotonic() - began
    sender.close()
    assert_same(told["answers"][0], expected)
    assert took < 2 * TIMEOUT + 10
    if way == "another model":
        assert told["counted"]["refused"]["model"] >= 1
        assert told["given_up"] == before["given_up"] + 1
    else:
        assert told["counted"]["recomputes"] == before["counted"]["recomputes"] + 1
    if way in ("closes", "wrong size"):
        assert told["counted"]["waited"] - before["counted"]["waited"] < TIMEOUT


def test_garbage_at_the_door_is_counted(engines):
    for _ in range(3):
        with socket.create_connection(engines[0].address, 5) as connection:
            connection.sendall(os.urandom(100))
    deadline = time.monotonic() + 20
    while engines[0].counts()["counted"]["refused"].get("garbage", 0) < 3:
        assert time.monotonic() < deadline
