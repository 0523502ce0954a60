"""Costs fitted from measured times, and tables of splits: between rows, refined, on disk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Compute, Cost, Link, corrected, fit_cost
from forerun.runahead.partition import search
from forerun.runahead.table import Row, Table, make_table

TRUE = Cost(2e-3, 1e-4, 1e-7, 3e-9)
GRID = [(n, past) for n in (64, 256, 1024, 4096) for past in (0, 512, 4096)]


def measured(cost, noise=0.0, grid=GRID, seed=0):
    rng = np.random.default_rng(seed)
    return [Compute(n, past, float(cost(n, past)) * (1 + noise * rng.standard_normal())) for n, past in grid]


@pytest.fixture
def table():
    chain = Chain(TRUE, Link(2e9, 1e-4), 12, 8192)
    return make_table(chain, [1024, 4096, 16384], 3, model="tiny", hardware="1 core", block=16, slack=0)


def test_a_fit_finds_the_cost_that_was_measured():
    found = fit_cost(measured(TRUE))
    assert found(4096, 2048) == pytest.approx(TRUE(4096, 2048))
    assert found.per_pair == pytest.approx(TRUE.per_pair, rel=1e-6)
    assert found.fixed == pytest.approx(TRUE.fixed, rel=1e-6)


@given(st.builds(Cost, st.floats(0, 1e-2), st.floats(1e-6, 1e-3), st.floats(0, 1e-6), st.floats(0, 1e-8)))
def test_any_cost_is_found_again(cost):
    found = fit_cost(measured(cost))
    for n, past in GRID:
        assert found(n, past) == pytest.approx(cost(n, past), rel=1e-6)


def test_noise_leaves_no_negative_coefficient_and_a_close_fit():
    for seed in range(20):
        found = fit_cost(measured(TRUE, 0.05, seed=seed))
        for n, past in GRID:
            assert found(n, past) == pytest.approx(TRUE(n, past), rel=0.15)


def test_what_was_not_measured_costs_nothing():
    assert fit_cost([Compute(n, 0, float(TRUE(n))) for n in (64, 512, 4096)]).per_past == 0


def test_a_cost_is_corrected_in_its_two_parts():
    now = Cost(3 * TRUE.fixed, 3 * TRUE.per_token, 10 * TRUE.per_past, 10 * TRUE.per_pair)
    found = corrected(TRUE, measured(now, 0.02) * 4)
    for n, past in GRID:
        assert found(n, past) == pytest.approx(now(n, past), rel=0.05)


def test_contexts_of_one_length_correct_both_parts():
    found = corrected(TRUE, [Compute(4096, 0, 2 * float(TRUE(4096)))] * 32)
    assert found(4096) == pytest.approx(2 * TRUE(4096), rel=0.02)
    assert found.per_token == pytest.approx(2 * TRUE.per_token, rel=0.02)


@pytest.mark.parametrize("samples", [[], [Compute(0, 0, 1.0)], [Compute(1, 0, 0.0)], [Compute(1, 0, math.nan)]])
def test_what_is_no_measurement_is_refused(samples):
    with pytest.raises(ValueError, match="measurement"):
        fit_cost(samples)
    with pytest.raises(ValueError, match="measurement"):
        corrected(TRUE, samples)


def test_a_row_is_the_search(table):
    for row in table.rows:
        assert row.contexts == search(table.chain, row.tokens, 3, block=16, slack=0).contexts
        assert table.split(row.tokens).contexts == row.contexts


@given(tokens=st.integers(1, 40_000), cached=st.integers(0, 2000))
def test_any_prompt_has_a_split_no_slower_than_one_engine(tokens, cached):
    chain = Chain(TRUE, Link(2e9, 1e-4), 12, 8192)
    rows = (Row(1024, (1024,)), Row(4096, (2176, 1920)), Row(16384, (7184, 4864, 4336)))
    split = Table("tiny", "1 core", 3, chain, rows, block=16).split(tokens, cached)
    assert sum(split.contexts) == tokens
    assert all(start % 16 == 0 for start in split.bounds[:-1])
    assert split.ttft <= split.single


@pytest.mark.parametrize("tokens", [2000, 3000, 6000, 8000, 12000])
def test_between_rows_little_is_lost(table, tokens):
    searched = search(table.chain, tokens, 3, block=16, slack=0)
    assert table.split(tokens).ttft <= searched.ttft * 1.02


def test_measurements_refine_the_rows(table):
    """A machine whose attention is ten times as slow as the table has it: the splits move towards the new best."""
    slow = Cost(TRUE.fixed, TRUE.per_token, 10 * TRUE.per_past, 10 * TRUE.per_pair)
    refined = table.refined(measured(slow) * 4)
    truth = Chain(slow, table.chain.link, 12, 8192)
    for tokens in (4096, 16384):
        best = search(truth, tokens, 3, block=16, slack=0)
        assert float(truth.ttft(refined.split(tokens).contexts)) == pytest.approx(best.ttft, rel=3e-3)
        assert float(truth.ttft(table.split(tokens).contexts)) > best.ttft * 1.01
    assert refined.chain.link == table.chain.link


def test_a_saved_table_is_the_same(table, tmp_path):
    kept = table.refined(measured(TRUE, 0.01))
    for one in (table, kept, make_table(Chain(TRUE, Link(math.inf), 2, 4), [10], 2, model="m", hardware="h")):
        one.save(tmp_path / "table.json")
        assert Table.load(tmp_path / "table.json") == one
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_a_save_that_fails_leaves_what_was_there(table, tmp_path, monkeypatch):
    table.save(tmp_path / "table.json")
    before = (tmp_path / "table.json").read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        table.refined(measured(TRUE)).save(tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda fields: fields.update(version=1), "version 1; this release reads version 2"),
        (lambda fields: fields.update(rows=[]), "at least one"),
        (lambda fields: fields.pop("chain"), "chain"),
        (lambda fields: fields["rows"][0].update(contexts=[1, 2]), "add up to 3"),
        (lambda fields: fields["chain"]["cost"].update(fixed=-1), "fixed is -1"),
        (lambda fields: fields.update(forerun="something"), "version None"),
        (lambda fields: fields["rows"].reverse(), "longer than the one before"),
    ],
)
def test_another_file_is_refused(table, tmp_path, change, told):
    path = tmp_path / "table.json"
    table.save(path)
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=told):
        Table.load(path)


@pytest.mark.parametrize("content", [b"[]", b"not json", b"\xff\xfe", b"{}"])
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json is not a table"):
        Table.load(tmp_path / "other.json")
