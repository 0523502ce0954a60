"""torchrec, 1.7 to 1.9: the batches that its models are fed, and the tables that look them up.

The contract tests of every symbol used here are in `tests/adapters/test_torchrec_data.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from forerun_adapters._require import require

require("torchrec")

from torchrec.distributed.planner import ParameterConstraints as _Constraints  # noqa: E402
from torchrec.distributed.types import CacheParams as _CacheParams  # noqa: E402
from torchrec.distributed.types import CacheStatistics as _CacheStatistics  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as _KeyedJaggedTensor  # noqa: E402

__all__ = [
    "CacheStatistics",
    "KeyedJaggedTensor",
    "ParameterConstraints",
    "PooledFeature",
    "TableFeatures",
    "cached_by",
    "completed",
    "ids",
    "of_config",
    "pooled_features",
    "table_features",
]

CacheStatistics: Any = _CacheStatistics
KeyedJaggedTensor: Any = _KeyedJaggedTensor
ParameterConstraints: Any = _Constraints

_CONFIGS = ("embedding_bag_configs", "embedding_configs")  # of torchrec's two interfaces for modules with tables


class PooledFeature(NamedTuple):
    """One feature of one batch."""

    name: str
    ids: int  # of all its samples together
    samples: int
    weighted: bool
    varies: bool  # the number of samples is the feature's own, not the batch's


class TableFeatures(NamedTuple):
    """A table and the features that it is looked up by, in the order in which torchrec counts them."""

    name: str
    features: tuple[str, ...]
    rows: int


def pooled_features(batch: Any) -> Iterator[PooledFeature]:
    """What a `KeyedJaggedTensor` holds of every feature."""
    weighted = batch.weights_or_none() is not None
    varies = bool(batch.variable_stride_per_key())
    for name, ids, samples in zip(batch.keys(), batch.length_per_key(), batch.stride_per_key(), strict=True):
        yield PooledFeature(name, int(ids), int(samples), weighted, varies)


def ids(batch: Any) -> Iterator[tuple[str, Any]]:
    """The ids `[N]` of every feature of a `KeyedJaggedTensor`, all samples' together."""
    offsets = batch.offset_per_key()
    for name, begin, end in zip(batch.keys(), offsets, offsets[1:], strict=False):
        yield name, batch.values()[begin:end]


def table_features(module: Any) -> Iterator[TableFeatures]:
    """Every table of a module's embedding collections."""
    for part in module.modules():
        for listed in _CONFIGS:
            if callable(configs := getattr(part, listed, None)):
                yield from map(of_config, configs())


def of_config(config: Any) -> TableFeatures:
    """The table that a configuration describes."""
    return TableFeatures(config.name, tuple(config.feature_names), int(config.num_embeddings))


def completed(constraint: Any, **measured: Any) -> Any:
    """A copy of a table's constraints, with the fields that are still torchrec's defaults set."""
    default = _Constraints()
    constraint = constraint or default
    news = {name: value for name, value in measured.items() if getattr(constraint, name) == getattr(default, name)}
    return replace(constraint, **news)


def cached_by(constraint: Any, statistics: Any) -> Any:
    """A copy of a table's constraints with cache statistics, unless they have some."""
    constraint = constraint or _Constraints()
    params = constraint.cache_params or _CacheParams()
    if params.stats is not None:
        return constraint
    return replace(constraint, cache_params=replace(params, stats=statistics))
