"""Cache statistics measured over batches, against caches that are really run, and in torchrec's own estimate."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.types import CacheParams, CacheStatistics
from torchrec_models import SHARDERS, module, topology

from forerun.dlrm.torchrec_caching import SampledStatistics, caching_from

_ROWS = 1000


def steps(kind: str, count: int = 40, size: int = 200) -> list[np.ndarray]:
    """Distinct rows of each step: everywhere alike, or mostly few rows."""
    random = np.random.default_rng(0)
    if kind == "uniform":
        return [np.unique(random.integers(_ROWS, size=size)) for _ in range(count)]
    return [np.unique(np.minimum(random.zipf(1.5, size=size), _ROWS) - 1) for _ in range(count)]


def batch(rows: Any, feature: str = "f0") -> KeyedJaggedTensor:
    values = torch.as_tensor(np.asarray(rows))
    return KeyedJaggedTensor(keys=[feature], values=values, lengths=torch.ones(len(values), dtype=torch.int64))


@pytest.mark.parametrize("kind", ["uniform", "skewed"])
def test_a_miss_rate_is_that_of_the_cache_itself(kind: str) -> None:
    made = steps(kind)
    past, present = made[:20], made[20:]
    rows, popularity = np.unique(np.concatenate(past), return_counts=True)
    ranked = rows[np.argsort(-popularity, kind="stable")]
    found = SampledStatistics(made, _ROWS)
    for lines in (1, 10, 50, len(ranked)):
        cached = set(ranked[:lines].tolist())
        misses = [row not in cached for step in present for row in step.tolist()]
        assert found.expected_miss_rate(lines / _ROWS) == pytest.approx(np.mean(misses), abs=0.01)


@pytest.mark.parametrize("kind", ["uniform", "skewed"])
def test_a_curve_falls_from_all_to_nothing(kind: str) -> None:
    found = SampledStatistics(steps(kind), _ROWS)
    rates = [found.expected_miss_rate(share) for share in np.linspace(0, 1, 101)]
    assert (rates[0], rates[-1]) == (1.0, 0.0)
    assert all(after <= before + 1e-12 for before, after in pairwise(rates))
    assert isinstance(found, CacheStatistics)


def test_few_popular_rows_are_easy_to_cache() -> None:
    skewed, uniform = (SampledStatistics(steps(kind), _ROWS) for kind in ("skewed", "uniform"))
    assert skewed.cacheability < 0.2
    assert uniform.cacheability == pytest.approx(0.5, abs=0.05)
    assert uniform.expected_lookups == np.mean([len(step) for step in steps("uniform")])
    assert pickle.loads(pickle.dumps(skewed)).cacheability == skewed.cacheability


def test_a_step_is_all_ranks_batches() -> None:
    tables = [EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=10, feature_names=["f0", "f1"])]
    batches = [(batch([1, 1, 2]), batch([3], "f1")), batch([2, 4]), batch([1]), batch([1, 5], "f1")]
    assert caching_from(batches, tables, ranks=2)["t"].cache_params.stats.expected_lookups == (4 + 2) / 2
    assert caching_from(batches, tables)["t"].cache_params.stats.expected_lookups == (3 + 2 + 1 + 2) / 4


def test_what_a_user_set_stays() -> None:
    own = SampledStatistics([np.array([1]), np.array([1])], _ROWS)
    tables = [EmbeddingBagConfig(name=n, embedding_dim=8, num_embeddings=10, feature_names=["f0"]) for n in ("t", "u")]
    given = {
        "t": ParameterConstraints(cache_params=CacheParams(load_factor=0.25), pooling_factors=[3.0]),
        "u": ParameterConstraints(cache_params=CacheParams(stats=own)),
    }
    made = caching_from([batch([1]), batch([2])], tables, given)
    assert (made["t"].cache_params.load_factor, made["t"].pooling_factors) == (0.25, [3.0])
    assert made["u"] is given["u"]
    assert given["t"].cache_params.stats is None


def test_torchrec_prices_what_the_cache_misses() -> None:
    """Its estimate of prefetching is then the missed rows' bytes over the bandwidth."""
    where = topology(2, hbm_to_ddr_mem_bw=1e6)
    lookups = [batch(step) for step in steps("skewed")]
    own = {"t0": ParameterConstraints(cache_params=CacheParams(load_factor=0.05), sharding_types=["table_wise"])}
    own["t0"].compute_kernels = ["fused_uvm_caching"]
    made = caching_from(lookups, module([_ROWS]), own)
    (option,) = EmbeddingEnumerator(where, 64, made).enumerate(module([_ROWS]), SHARDERS)
    stats = made["t0"].cache_params.stats
    missed = stats.expected_miss_rate(0.05) * stats.expected_lookups
    assert option.shards[0].perf.prefetch_compute == pytest.approx(missed * 128 * 4 / 1e6)


def test_what_is_refused_says_what_to_do() -> None:
    tables = [EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=10, feature_names=["f0"])]
    with pytest.raises(ValueError, match="3 batches are 1 steps of 2 ranks"):
        caching_from([batch([1])] * 3, tables, ranks=2)
    with pytest.raises(ValueError, match=r"has 10 rows, and features .* look up 1 to 10"):
        caching_from([batch([1, 10])] * 2, tables)
    with pytest.raises(ValueError, match="ranks=0"):
        caching_from([batch([1])] * 2, tables, ranks=0)
    with pytest.raises(ValueError, match="1 features are in none of the 2 batches: 'f0' of table 't'"):
        caching_from([batch([1], "other")] * 2, tables)
    unused = caching_from([batch([])] * 2, tables)["t"].cache_params.stats
    assert (unused.expected_lookups, unused.expected_miss_rate(1.0)) == (0.0, 0.0)
