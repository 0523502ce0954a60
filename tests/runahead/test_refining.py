"""A router whose table follows what contexts take."""

from __future__ import annotations

import asyncio
import logging

import pytest

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Compute, Cost, Link
from forerun.runahead.partition import search
from forerun.runahead.refining import Refiner
from forerun.runahead.routing import Router, Standing
from forerun.runahead.table import Table, make_table

BLOCK, LINK = 16, Link(1e9, 1e-4)
THOUGHT, TRUE = Cost(0.01, 1e-4, 0, 1e-9), Cost(0.01, 1e-4, 0, 2e-8)
LENGTHS = [1024, 4096, 16384]
STANDINGS = [Standing(0), Standing(1)]


@pytest.fixture
def table():
    return make_table(Chain(THOUGHT, LINK, 4, 1024), LENGTHS, 2, model="m", hardware="h", block=BLOCK)


def contexts(router, tokens=16384):
    first = router.route(STANDINGS, tokens).ends[0]
    return first, tokens - first


async def noted(refiner, count, tokens=(8192, 2048, 12288, 512)):
    """Measurements of an engine whose attention is 20 times as slow as the table has it."""
    for i in range(count):
        n = tokens[i % len(tokens)]
        refiner.note(Compute(n, 0, float(TRUE(n))))
    for _ in range(600):
        if refiner.refined:
            return
        await asyncio.sleep(0.05)


def test_routes_follow_what_contexts_take(table, tmp_path):
    router, path = Router(table, 2, BLOCK), tmp_path / "refined.json"
    before, truth = contexts(router), Chain(TRUE, LINK, 4, 1024)
    refiner = Refiner(router, table, path)
    asyncio.run(noted(refiner, 200))
    assert refiner.refined == 1
    best = search(truth, 16384, 2, block=BLOCK).ttft
    assert float(truth.ttft(contexts(router))) <= 1.02 * best < 1.05 * best < float(truth.ttft(before))
    assert Table.load(path).split(16384).contexts == contexts(router)


def test_a_few_measurements_change_nothing(table):
    router = Router(table, 2, BLOCK, 300)
    refiner, before = Refiner(router, table), contexts(router)

    async def few():
        for n in range(1, 16):
            refiner.note(Compute(n, 0, 1.0))
        await asyncio.sleep(0.2)

    asyncio.run(few())
    assert refiner.refined == 0 and contexts(router) == before


def test_the_least_prompt_of_a_chain_stays_as_the_user_has_it(table):
    router = Router(table, 2, BLOCK, 300)
    asyncio.run(noted(Refiner(router, table), 16))
    assert router.least == 300


def test_a_file_that_cannot_be_written_costs_a_warning(table, tmp_path, caplog):
    refiner = Refiner(Router(table, 2, BLOCK), table, tmp_path / "none" / "refined.json")
    with caplog.at_level(logging.WARNING):
        asyncio.run(noted(refiner, 16))
    assert refiner.refined == 1 and "not kept" in caplog.text
