"""Synthetic ids: each distribution is what it says, and a trace's stack distances come out again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from forerun.dlrm.synthetic import PowerLaw, StackDistance, StackDistances, Uniform


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plain_distances(trace: list[int]) -> list[int]:
    """The definition, on a stack that is searched."""
    stack: list[int] = []
    found = []
    for each in trace:
        found.append(stack.index(each) + 1 if each in stack else 0)
        if each in stack:
            stack.remove(each)
        stack.insert(0, each)
    return found


def histogram(values: list[int]) -> dict[int, int]:
    return {value: values.count(value) for value in set(values)}


def as_dict(profile: StackDistances) -> dict[int, int]:
    return dict(zip(profile.distances.tolist(), profile.counts.tolist(), strict=True))


@given(st.lists(st.integers(-5, 20), min_size=1, max_size=200))
def test_a_profile_is_the_definitions(trace: list[int]) -> None:
    assert as_dict(StackDistances.of(trace)) == histogram(plain_distances(trace))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 2**32))
def test_only_the_profiles_distances_come_out(trace: list[int], rows: int, seed: int) -> None:
    profile = StackDistances.of(trace)
    source = StackDistance(profile, rows)
    ids = np.concatenate([source.draw(size, random(seed)) for size in (0, 1, 100)])
    assert ids.min() >= 0
    assert ids.max() < rows
    allowed = set(profile.distances.tolist())
    if min(allowed - {0}, default=rows + 1) > rows:  # none is in reach once every row was seen
        allowed = {0, rows}
    assert set(plain_distances(ids.tolist())) <= allowed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_distances_of_a_long_trace_are_matched(seed: int) -> None:
    """The chi-square test at 1e-4, after as many ids that the stack reaches every distance."""
    trace = PowerLaw(60, 1.1).draw(5000, random(seed)).tolist()
    profile = StackDistances.of(trace)
    source = StackDistance(profile, 10**9)  # ids never end, so that 0 stays as likely
    source.draw(20_000, random(seed + 10))
    drawn = source.draw(20_000, random(seed + 20)).tolist()
    start = StackDistance(profile, 10**9)
    before = start.draw(20_000, random(seed + 10)).tolist()
    assert start.draw(20_000, random(seed + 20)).tolist() == drawn  # the same seeds, the same ids
    distances = plain_distances(before + drawn)[20_000:]
    expected = profile.shares * len(distances)
    observed = np.array([distances.count(each) for each in profile.distances.tolist()])
    assert observed.sum() == len(distances)  # and no other distance
    often = expected >= 5
    pooled = np.append(observed[often], observed[~often].sum()), np.append(expected[often], expected[~often].sum())
    keep = pooled[1] > 0
    assert chisquare(pooled[0][keep], pooled[1][keep]).pvalue > 1e-4


def test_a_table_that_is_full_gives_no_new_id() -> None:
    source = StackDistance(StackDistances.of([1, 2, 3, 1, 2, 3, 3, 2]), rows=4)
    assert set(source.draw(500, random()).tolist()) == {0, 1, 2, 3}


@settings(max_examples=25)
@given(st.integers(1, 2000), st.sampled_from([0.3, 0.7, 0.999999, 1.0, 1.000001, 1.3, 2.0, 4.0]), st.integers(0, 2**32))
def test_a_power_law_has_its_probabilities(rows: int, exponent: float, seed: int) -> None:
    size = 20_000
    ids = PowerLaw(rows, exponent).draw(size, random(seed))
    share = np.arange(1, rows + 1) ** -exponent
    share /= share.sum()
    # The Dvoretzky-Kiefer-Wolfowitz inequality: further apart than this once in 1e9 times.
    apart = np.abs(np.bincount(ids, minlength=rows).cumsum() / size - share.cumsum()).max()
    assert apart < np.sqrt(np.log(2e9) / (2 * size))


@pytest.mark.parametrize("exponent, rows", [(0.6, 1000), (1.0, 10_000_000), (1.7, 10_000_000)])
def test_the_exponent_is_the_slope(exponent: float, rows: int) -> None:
    counts = np.bincount(PowerLaw(rows, exponent).draw(2_000_000, random()), minlength=32)[:32]
    slope = np.polyfit(np.log(np.arange(1, 33)), np.log(counts), 1, w=np.sqrt(counts))[0]
    assert slope == pytest.approx(-exponent, abs=0.02)


def test_uniform_ids_are_all_as_likely() -> None:
    ids = Uniform(50).draw(100_000, random())
    assert chisquare(np.bincount(ids, minlength=50)).pvalue > 1e-4
    assert set(Uniform(1).draw(10, random()).tolist()) == {0}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        Uniform(0)
    with pytest.raises(ValueError, match="exponent is 0"):
        PowerLaw(10, 0.0)
    with pytest.raises(ValueError, match="exponent is nan"):
        PowerLaw(10, float("nan"))
    with pytest.raises(ValueError, match="trace is empty"):
        StackDistances.of([])
    without_first = StackDistances(np.array([1]), np.array([3]))
    with pytest.raises(ValueError, match="no distance 0"):
        StackDistance(without_first, 4)
