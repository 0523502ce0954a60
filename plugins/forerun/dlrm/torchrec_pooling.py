"""Pooling factors from data: what the samples look up, measured over batches instead of taken for 1.

torchrec plans from `ParameterConstraints.pooling_factors`, the ids per sample of each feature of a table, and takes 1.0
where none are given. `constraints_from` fills them in from batches; `measure` gives the figures themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.dlrm.torchrec_batches import check_features, jagged_tensors, tables_of
from forerun_adapters import torchrec_data as host

__all__ = ["FeaturePooling", "Pooling", "constraints_from", "measure"]


@dataclass(frozen=True)
class FeaturePooling:
    """What batches hold of one feature."""

    ids: int
    samples: int
    batches: int  # in which the feature was
    weighted: bool  # its ids come with weights
    varies: bool  # it has a number of samples of its own (variable batch per feature)

    @property
    def factor(self) -> float:
        """Mean ids per sample; 0 for a feature without any."""
        return self.ids / self.samples if self.samples else 0.0

    @property
    def batch_size(self) -> int:
        """Mean samples per batch, at least 1."""
        return max(1, round(self.samples / self.batches))


@dataclass(frozen=True)
class Pooling:
    """What batches hold of every feature."""

    batches: int  # taken
    features: Mapping[str, FeaturePooling]

    def constraints(self, tables: Any, constraints: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """torchrec's constraints of every table, with the measured figures; see `constraints_from`."""
        own = dict(constraints or {})
        wanted = tables_of(tables)
        check_features([table for table in wanted if _asks(own.get(table.name))], self.features, self.batches)
        for table in wanted:
            if all(feature in self.features for feature in table.features):
                found = [self.features[feature] for feature in table.features]
                own[table.name] = self._completed(own.get(table.name), found)
        return own

    def _completed(self, constraint: Any, found: Sequence[FeaturePooling]) -> Any:
        measured: dict[str, Any] = {"pooling_factors": [feature.factor for feature in found]}
        measured["is_weighted"] = any(feature.weighted for feature in found)
        # torchrec multiplies numbers of poolings with batch sizes: those that a user gives stand for both.
        if any(feature.varies for feature in found) and not getattr(constraint, "num_poolings", None):
            measured["batch_sizes"] = [feature.batch_size for feature in found]
        return host.completed(constraint, **measured)


def constraints_from(
    batches: Iterable[Any],
    tables: Any,
    constraints: Mapping[str, Any] | None = None,
    *,
    limit: int | None = 100,
) -> dict[str, Any]:
    """torchrec's constraints for a planner, with pooling factors measured over batches.

    Args:
        batches: A data loader, or batches: each a `KeyedJaggedTensor`, or tuples, dicts and dataclasses that hold some
            (such as torchrec's `Batch`). An iterator is read from, so the batches taken are gone: their number is
            logged.
        tables: The model, or the tables' configurations.
        constraints: Your own. They are copied; what they set stays, and only fields that are still torchrec's
            defaults are filled in: `pooling_factors`, `is_weighted`, and `batch_sizes` where the batches have a number
            of samples for each feature.
        limit: Most batches taken; None: all of them.

    Raises:
        TypeError: A batch holds no `KeyedJaggedTensor`.
        ValueError: There is no batch, no batch has a sample, a table's feature is in none, or tables of one name have
            different features.

    Sequential equivalent::

        {table: ParameterConstraints(pooling_factors=[batch[feature].lengths().float().mean() for feature in …])}
    """
    return measure(batches, limit=limit).constraints(tables, constraints)


def measure(batches: Iterable[Any], *, limit: int | None = 100) -> Pooling:
    """What batches hold of every feature; a feature that some batches lack is measured over the others.

    Raises:
        TypeError: A batch holds no `KeyedJaggedTensor`.
        ValueError: There is no batch, or no batch has a sample.
    """
    found: dict[str, FeaturePooling] = {}
    taken = 0
    for jagged in jagged_tensors(batches, limit):
        taken += 1
        for feature in (feature for tensor in jagged for feature in host.pooled_features(tensor)):
            found[feature.name] = _added(found.get(feature.name), feature)
    if not any(feature.samples for feature in found.values()):
        raise ValueError(f"{taken} batches, and not one sample in them")
    return Pooling(taken, found)


def _added(sum_: FeaturePooling | None, more: host.PooledFeature) -> FeaturePooling:
    was = sum_ or FeaturePooling(0, 0, 0, False, False)
    return FeaturePooling(
        was.ids + more.ids,
        was.samples + more.samples,
        was.batches + 1,
        was.weighted or more.weighted,
        was.varies or more.varies,
    )


def _asks(constraint: Any) -> bool:
    """Whether a table's pooling factors are to be measured."""
    return host.completed(constraint, pooling_factors=None).pooling_factors is None
