"""torchrec's enumerator, asking its estimators once for each size of an option's shards.

A table that is sharded by rows over 128 ranks has 128 shards of two sizes at most; torchrec's estimators look at the
option and at a shard's size, and at nothing else, yet are asked for every shard. Here they see one shard of each size,
and the others get a copy of what they say; no formula of torchrec's is repeated. torchrec then deep-copies all options
to answer a second call; here they are kept as references, and copied when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from forerun.dlrm.garbage import kept
from forerun_adapters import torchrec as host

__all__ = ["FastEnumerator", "quick_copy"]


class FastEnumerator(host.EmbeddingEnumerator):  # type: ignore[misc]
    """Stands wherever torchrec's `EmbeddingEnumerator` stands, and gives the same options.

    Estimators that are not torchrec's own are asked for every shard, as torchrec does.
    """

    _kept: _Kept | None = None
    _held: list[tuple[Any, list[Any]]] | None = None  # shards that torchrec's deep copy is not to see

    def enumerate(self, module: Any, sharders: list[Any]) -> list[Any]:
        """The sharding options of every table, estimates filled in."""
        if self._kept and self._last_stored_module == module and self._last_stored_sharders == sharders:
            return self._kept.options()
        held: list[tuple[Any, list[Any]]] = []
        self._held = held
        try:
            with kept():
                options: list[Any] = super().enumerate(module, sharders)
        finally:
            self._held = None
            for option, shards in held:
                option.shards = shards
        self._kept = _Kept(options)
        self._last_stored_search_space = None
        return options

    @property
    def last_stored_search_space(self) -> list[Any] | None:
        """A copy of the options that `enumerate` last found."""
        return self._kept.options() if self._kept else None

    def populate_estimates(self, sharding_options: list[Any]) -> None:
        """Sets `perf` and `storage` of every shard."""
        for estimator in self._estimators:
            if attribute := host.estimated(estimator):
                with _one_of_each_size(sharding_options, attribute):
                    host.quick(estimator).estimate(sharding_options, sharder_data_map=self._sharder_data_map)
            else:
                estimator.estimate(sharding_options, sharder_data_map=self._sharder_data_map)
        if self._held is not None:  # torchrec's `enumerate` asks; shards would be most of the work of its copy
            for option in sharding_options:
                self._held.append((option, option.shards))
                option.shards = []


@contextmanager
def _one_of_each_size(options: Sequence[Any], attribute: str) -> Iterator[None]:
    """Leaves each option one shard of each size; then all are back, with the attribute of the one of their size."""
    whole: list[tuple[Any, list[Any], list[Any]]] = []
    for option in options:
        first: dict[tuple[int, ...], Any] = {}
        like = [first.setdefault(tuple(shard.size), shard) for shard in option.shards]
        whole.append((option, option.shards, like))
        option.shards = list(first.values())
    try:
        yield
    finally:
        for option, shards, _ in whole:
            option.shards = shards
    for _, shards, like in whole:
        for shard, asked in zip(shards, like, strict=True):
            if shard is not asked:
                setattr(shard, attribute, quick_copy(getattr(asked, attribute)))


def quick_copy(estimate: Any) -> Any:
    """A copy of a flat dataclass; `copy.copy` takes five times as long."""
    if estimate is None:
        return None
    new = object.__new__(type(estimate))
    new.__dict__.update(estimate.__dict__)
    return new


class _Kept:
    """Options as they were, whatever happens to the shards of the original ones (planners set their ranks)."""

    def __init__(self, options: Sequence[Any]) -> None:
        self._options = [
            (option, dict(option.__dict__), [(s.size, s.offset, s.perf, s.storage, s.rank) for s in option.shards])
            for option in options
        ]

    def options(self) -> list[Any]:
        copies = []
        for option, state, shards in self._options:
            new = object.__new__(type(option))
            new.__dict__.update(state)
            new.shards = [
                host.shard(list(size), list(offset), quick_copy(perf), quick_copy(storage), rank)
                for size, offset, perf, storage, rank in shards
            ]
            copies.append(new)
        return copies
