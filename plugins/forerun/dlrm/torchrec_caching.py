"""How well a table can be cached, from data: torchrec's `CacheStatistics`, measured over batches.

torchrec looks at them where a table may lie in unified memory with a cache (`fused_uvm_caching`) and a load factor says
how large the cache is, and in its `EmbeddingOffloadScaleupProposer`, which chooses load factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid

from forerun.dlrm.torchrec_batches import check_features, jagged_tensors, tables_of
from forerun_adapters import torchrec_data as host

__all__ = ["SampledStatistics", "caching_from"]

_POINTS = 128  # of a curve


class SampledStatistics(host.CacheStatistics):  # type: ignore[misc]
    """A table's lookups: the cache holds the rows that were most popular in the first half of the batches.

    Args:
        steps: Distinct rows of every global batch.
        rows: Of the table.
    """

    def __init__(self, steps: Sequence[NDArray[np.int64]], rows: int) -> None:
        self._lookups = float(np.mean([len(step) for step in steps]))
        past, present = np.concatenate(steps[: len(steps) // 2]), np.concatenate(steps[len(steps) // 2 :])
        seen, popularity = np.unique(past, return_counts=True)
        ranked = seen[np.argsort(-popularity, kind="stable")]
        looked_up, times = np.unique(present, return_counts=True)
        hits = np.concatenate([[0], np.cumsum(_counts(ranked, looked_up, times))])
        total = max(1, len(present))
        # Rows that nobody has seen yet come in no order: the rest of the cache has its share of them.
        lines = np.unique(np.concatenate([np.geomspace(1, rows, _POINTS).astype(int), [0, len(ranked), rows]]))
        unseen = (len(present) - hits[-1]) * (lines - len(ranked)) / max(1, rows - len(ranked))
        found = np.where(lines <= len(ranked), hits[np.minimum(lines, len(ranked))], hits[-1] + unseen)
        self._shares, self._misses = lines / rows, 1 - found / total
        self._misses[-1] = 0.0

    @property
    def expected_lookups(self) -> float:
        """Distinct rows of a global batch, on average."""
        return self._lookups

    def expected_miss_rate(self, clf: float) -> float:
        """Share of the lookups that a cache of `clf` of the table's rows does not hold."""
        return float(np.interp(clf, self._shares, self._misses))

    @property
    def cacheability(self) -> float:
        """The mean miss rate over all sizes of the cache: 0 for lookups of few rows, near 0.5 for lookups at random."""
        return float(trapezoid(self._misses, self._shares))


def caching_from(
    batches: Iterable[Any],
    tables: Any,
    constraints: Mapping[str, Any] | None = None,
    *,
    ranks: int = 1,
    limit: int | None = 100,
) -> dict[str, Any]:
    """torchrec's constraints for a planner, with cache statistics (`cache_params.stats`) of every table.

    Args:
        batches: As `forerun.dlrm.torchrec_pooling.constraints_from` takes them, one rank's after the other's.
        tables: The model, or the tables' configurations.
        constraints: Your own. They are copied; statistics that they have stay.
        ranks: Batches that make one step.
        limit: Most batches taken; None: all of them.

    Raises:
        TypeError: A batch holds no `KeyedJaggedTensor`.
        ValueError: The batches are fewer than two steps, a table's feature is in none, or an id is of no row.
    """
    wanted = tables_of(tables)
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: expected 1 or more")
    steps: list[list[NDArray[np.int64]]] = []  # of each table
    found: set[str] = set()
    step: list[tuple[str, Any]] = []  # features and ids
    taken = 0
    for batch in jagged_tensors(batches, limit):
        taken += 1
        step += [pair for tensor in batch for pair in host.ids(tensor)]
        found |= {name for name, _ in step}
        if taken % ranks == 0:
            steps.append([_distinct(step, table) for table in wanted])
            step = []
    check_features(wanted, found, taken)
    if len(steps) < 2:
        raise ValueError(f"{taken} batches are {len(steps)} steps of {ranks} ranks; expected at least two steps")
    made = dict(constraints or {})
    for table, rows in zip(wanted, zip(*steps, strict=True), strict=True):
        made[table.name] = host.cached_by(made.get(table.name), SampledStatistics(rows, table.rows))
    return made


def _distinct(step: Sequence[tuple[str, Any]], table: host.TableFeatures) -> NDArray[np.int64]:
    ids = [ids.cpu().numpy() for name, ids in step if name in table.features]
    rows = np.unique(np.concatenate(ids or [np.empty(0, np.int64)]))
    if len(rows) and not 0 <= rows[0] <= rows[-1] < table.rows:
        raise ValueError(
            f"table {table.name!r} has {table.rows} rows, and features {table.features} look up {rows[0]} to {rows[-1]}"
        )
    return rows.astype(np.int64)


def _counts(wanted: NDArray[Any], found: NDArray[Any], times: NDArray[Any]) -> NDArray[Any]:
    """How often each of the rows wanted was found."""
    if not len(found):
        return np.zeros(len(wanted), int)
    at = np.minimum(np.searchsorted(found, wanted), len(found) - 1)
    return np.where(found[at] == wanted, times[at], 0)
