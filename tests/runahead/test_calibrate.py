"""From measured runs to a chain's link, and from a config to rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forerun.runahead.calibrate import Run, fit_chain
from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.engine_client import EngineClient, Prompt, chain_parts
from forerun.runahead.tuning import with_dtype

COST = Cost(0.01, 1e-3, 1e-6, 2e-8)
CHAIN = Chain(COST, Link(float("inf")), 12, kv_bytes=2048)
SPLITS = [(1024, 128), (576, 576), (3968, 128), (2048, 2048), (2560, 1536)]


@pytest.mark.parametrize("bandwidth", [2e6, 1e7])
@pytest.mark.parametrize("latency", [1e-3, 0.1])
def test_a_link_that_shows_is_found(bandwidth, latency):
    truth = replace(CHAIN, link=Link(bandwidth, latency))
    found, error = fit_chain(CHAIN, [Run(split, float(truth.ttft(split))) for split in SPLITS])
    assert error < 0.005
    assert found.link.bandwidth == pytest.approx(bandwidth, rel=0.05)
    for split in [(512, 512), (1536, 1024, 256)]:
        assert float(found.ttft(split)) == pytest.approx(float(truth.ttft(split)), rel=0.02)


def test_a_link_that_hides_behind_computation_predicts_alike():
    truth = replace(CHAIN, link=Link(1e11, 1e-4))
    found, error = fit_chain(CHAIN, [Run(split, float(truth.ttft(split))) for split in SPLITS])
    assert error < 1e-3
    assert float(found.ttft((3072, 1024))) == pytest.approx(float(truth.ttft((3072, 1024))), rel=1e-3)


def test_without_runs_the_chain_stays():
    assert fit_chain(CHAIN, []) == (CHAIN, 0.0)


def test_parts_lead_from_engine_to_engine():
    addresses = [("127.0.0.1", 7001), ("127.0.0.1", 7002), ("10.0.0.3", 7003)]
    parts = chain_parts(b"c" * 16, (512, 256, 100), addresses)
    assert [(part["start"], part["end"], part["next"]) for part in parts] == [
        (0, 512, "127.0.0.1:7002"),
        (512, 768, "10.0.0.3:7003"),
        (768, 868, None),
    ]
    assert {part["chain"] for part in parts} == {(b"c" * 16).hex()}


def test_prompts_are_new_each_time():
    prompts = Prompt(100, seed=0)
    one, other = prompts(64), prompts(64)
    assert one != other
    assert set(one) | set(other) <= set(range(100))


@pytest.mark.parametrize(
    "arguments", [["--dtype", "float16"], ["--dtype=float16"], ["--dtype", "auto", "--dtype=float16"]]
)
def test_the_dtype_of_the_engines_counts(arguments):
    assert with_dtype({"dtype": "bfloat16"}, arguments)["dtype"] == "float16"
    assert with_dtype({"dtype": "bfloat16"}, ["--max-model-len", "8"])["dtype"] == "bfloat16"


def test_nobody_there_is_said():
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:9 does not answer /v1/models"):
        EngineClient.connect("http://127.0.0.1:9", ("127.0.0.1", 9))
