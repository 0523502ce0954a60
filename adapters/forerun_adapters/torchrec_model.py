"""torchrec, 1.7 to 1.9: tables to plan for, made from descriptions, without memory.

The contract tests of every symbol used here are in `tests/adapters/test_torchrec_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from forerun_adapters._require import require

require("torchrec")

from torchrec import EmbeddingBagCollection, EmbeddingBagConfig  # noqa: E402
from torchrec.distributed.embedding_types import EmbeddingComputeKernel  # noqa: E402
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation  # noqa: E402
from torchrec.distributed.types import ShardingType  # noqa: E402
from torchrec.modules.embedding_configs import DataType, PoolingType  # noqa: E402

__all__ = ["COMPUTE_KERNELS", "SHARDING_TYPES", "bag", "bags", "reserved"]

SHARDING_TYPES = tuple(kind.value for kind in ShardingType)
COMPUTE_KERNELS = tuple(kernel.value for kernel in EmbeddingComputeKernel)


def bag(name: str, rows: int, dim: int, features: Iterable[str], data_type: str, pooling: str) -> Any:
    """A table's configuration; types and poolings by torchrec's names in lower case."""
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        feature_names=list(features),
        data_type=DataType[data_type.upper()],
        pooling=PoolingType[pooling.upper()],
    )


def bags(configs: list[Any], *, weighted: bool) -> torch.nn.Module:
    """A collection of tables on the meta device."""
    made: torch.nn.Module = EmbeddingBagCollection(tables=configs, is_weighted=weighted, device=torch.device("meta"))
    return made


def reserved(share: float) -> Any:
    """A reservation of a share of every rank's memory."""
    return FixedPercentageStorageReservation(share)
