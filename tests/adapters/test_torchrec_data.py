"""Contracts with torchrec's batches and table configurations."""

from __future__ import annotations

from dataclasses import fields

import pytest

pytest.importorskip("torchrec")  # the oldest diffusers' environment has none

import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams, CacheStatistics
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollectionInterface

from forerun_adapters import torchrec_data as host


def test_a_batch_says_ids_samples_and_weights_of_each_feature() -> None:
    batch = KeyedJaggedTensor(keys=["a", "b"], values=torch.arange(5), lengths=torch.tensor([1, 2, 2, 0]))
    assert [tuple(it) for it in host.pooled_features(batch)] == [("a", 3, 2, False, False), ("b", 2, 2, False, False)]
    varying = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.arange(5),
        lengths=torch.tensor([1, 2, 2]),
        weights=torch.ones(5),
        stride_per_key_per_rank=[[1], [2]],
    )
    assert [tuple(it) for it in host.pooled_features(varying)] == [("a", 1, 1, True, True), ("b", 4, 2, True, True)]


def test_constraints_have_these_fields_and_defaults() -> None:
    names = {field.name for field in fields(ParameterConstraints)}
    assert {"pooling_factors", "num_poolings", "batch_sizes", "is_weighted"} <= names
    default = ParameterConstraints()
    assert (default.pooling_factors, default.num_poolings, default.batch_sizes) == ([1.0], None, None)
    assert host.completed(None, pooling_factors=[2.0]) == ParameterConstraints(pooling_factors=[2.0])


def test_modules_with_tables_list_configurations() -> None:
    assert callable(EmbeddingBagCollectionInterface.embedding_bag_configs)
    assert callable(EmbeddingCollectionInterface.embedding_configs)
    for kind in (EmbeddingBagConfig, EmbeddingConfig):
        assert {"name", "feature_names", "num_embeddings"} <= {field.name for field in fields(kind)}


def test_a_batch_gives_the_ids_of_each_feature() -> None:
    batch = KeyedJaggedTensor(keys=["a", "b"], values=torch.arange(5), lengths=torch.tensor([1, 2, 2, 0]))
    assert {name: ids.tolist() for name, ids in host.ids(batch)} == {"a": [0, 1, 2], "b": [3, 4]}


def test_cache_statistics_have_a_place() -> None:
    assert "stats" in {field.name for field in fields(CacheParams)}
    assert CacheStatistics.__abstractmethods__ == {"expected_lookups", "expected_miss_rate", "cacheability"}
    statistics = object()
    made = host.cached_by(None, statistics)
    assert made.cache_params.stats is statistics
    assert host.cached_by(made, object()) is made
