"""Modules and planners of the real torchrec that the tests plan: MLPerf's DLRM-DCNv2, and smaller ones."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

# mlcommons/training: recommendation_v2/torchrec_dlrm, Criteo 1TB multi-hot
ROWS = [40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976]
ROWS += [14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36]
HOTNESS = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]

SHARDERS = [EmbeddingBagCollectionSharder()]


def module(rows: list[int], dim: int = 128, device: str = "meta") -> torch.nn.Module:
    tables = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=dim, num_embeddings=n, feature_names=[f"f{i}"])
        for i, n in enumerate(rows)
    ]
    return torch.nn.Sequential(EmbeddingBagCollection(tables=tables, device=torch.device(device)))


def topology(ranks: int, *, device: str = "cuda", gigabytes: float = 80, **kwargs: Any) -> Topology:
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    return Topology(
        world_size=ranks,
        local_world_size=kwargs.pop("local", min(8, ranks)),
        compute_device=device,
        hbm_cap=int(gigabytes * 1024**3),
        **kwargs,
    )


def pooling(hotness: list[int], **kwargs: Any) -> dict[str, ParameterConstraints]:
    return {f"t{i}": ParameterConstraints(pooling_factors=[float(h)], **kwargs) for i, h in enumerate(hotness)}


def mlperf(ranks: int, **kwargs: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The module and a planner's arguments."""
    arguments = {
        "topology": topology(ranks),
        "batch_size": 65536 // ranks,
        "constraints": pooling(HOTNESS, **kwargs),
        "storage_reservation": FixedPercentageStorageReservation(0.05),
        "stats": [],
    }
    return module(ROWS), arguments


def small(ranks: int = 2, **kwargs: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Four small tables on CPU ranks."""
    hotness = [1, 5, 2, 9]
    arguments = {
        "topology": topology(ranks, device="cpu"),
        "constraints": pooling(hotness, **kwargs),
        "storage_reservation": FixedPercentageStorageReservation(0.05),
        "stats": [],
    }
    return module([1000, 200, 30, 4000], dim=16, device="cpu"), arguments
