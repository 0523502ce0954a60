"""Contracts with torchrec's modules: tables made from descriptions."""

from __future__ import annotations

import pytest

pytest.importorskip("torchrec")  # the oldest diffusers' environment has none

import torch

from forerun_adapters import torchrec_model as host


def test_bags_have_what_was_described_and_no_memory() -> None:
    made = host.bags([host.bag("a", 10, 8, ["f", "g"], "fp16", "mean")], weighted=True)
    (config,) = made.embedding_bag_configs()
    assert (config.name, config.num_embeddings, config.embedding_dim, config.feature_names) == ("a", 10, 8, ["f", "g"])
    assert config.pooling.value == "MEAN"
    weight = made.embedding_bags["a"].weight
    assert (weight.dtype, weight.device.type) == (torch.float16, "meta")
    assert made.is_weighted()


def test_names_of_sharding_types_and_kernels() -> None:
    assert {"table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"} <= set(host.SHARDING_TYPES)
    assert {"fused", "dense", "fused_uvm", "fused_uvm_caching"} <= set(host.COMPUTE_KERNELS)


def test_a_share_of_the_memory_is_reserved() -> None:
    assert host.reserved(0.25)._percentage == 0.25
