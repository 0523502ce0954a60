"""torchrec's enumerator, asking its estimators once for each size of an option's shards.

A table that is sharded by rows over 128 ranks has 128 shards of two sizes at most; torchrec's estimators look at the
option and at a shard's size, and at nothing else, yet are asked for every shard. Here they see one shard of each size,
and the others get what they say; no formula of torchrec's is repeated. torchrec then deep-copies all options to answer
a second call; here they are kept as references, and copied when somebody asks.

With a time limit the options are estimated in turns, the plainest of every table first, and those that the time does
not reach are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any

from forerun.dlrm.garbage import kept
from forerun.dlrm.torchrec_clock import Clock
from forerun_adapters import torchrec as host

__all__ = ["PLAINEST", "FastEnumerator", "quick_copy"]

# Sharding types, the plainest first: where two options of a table are the same but for their name, that one stays, and
# where time is short, that one is estimated.
PLAINEST = (
    "table_wise",
    "row_wise",
    "table_row_wise",
    "column_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)

_AT_ONCE = 250  # options that are estimated between two looks at the clock: about a tenth of a second


class FastEnumerator(host.EmbeddingEnumerator):  # type: ignore[misc]
    """Stands wherever torchrec's `EmbeddingEnumerator` stands, and gives the same options.

    Estimators that are not torchrec's own are asked for every shard, as torchrec does.
    """

    clock: Clock | None = None  # set by whoever has a time limit, before `enumerate`
    left_out: int = 0  # options that the limit left out of the last listing
    shares: bool = False  # whether shards of one size may have the same estimates' objects: if nobody changes them

    _last_stored_module: Any
    _kept: _Kept | None = None
    _held: list[tuple[Any, list[Any]]] | None = None  # shards that torchrec's deep copy is not to see
    _missed: frozenset[int] = frozenset()  # options (by id) that the limit leaves out

    def enumerate(self, module: Any, sharders: list[Any]) -> list[Any]:
        """The sharding options of every table, estimates filled in.

        Raises:
            PlannerError: The time limit came before every table had an option.
        """
        same = self._last_stored_module == module and self._last_stored_sharders == sharders
        if self._kept and same and not self.left_out:
            return self._kept.options()
        self._last_stored_module, self._missed = None, frozenset()  # torchrec's own memory of the options is not used
        held: list[tuple[Any, list[Any]]] = []
        self._held = held
        try:
            with kept():
                options: list[Any] = super().enumerate(module, sharders)
        finally:
            self._held = None
            for option, shards in held:
                option.shards = shards
        self.left_out = len(self._missed)
        options = [option for option in options if id(option) not in self._missed]
        self._kept = _Kept(options)
        self._last_stored_search_space = None
        return options

    @property
    def last_stored_search_space(self) -> list[Any] | None:
        """A copy of the options that `enumerate` last found."""
        return self._kept.options() if self._kept else None

    def populate_estimates(self, sharding_options: list[Any]) -> None:
        """Sets `perf` and `storage` of every shard."""
        listing = self._held is not None  # torchrec's `enumerate` asks
        if listing and self.clock is not None and self.clock.limit is not None:
            self._estimate_in_turns(sharding_options, self.clock)
        else:
            self._estimate(sharding_options)
        if self._held is not None:  # shards would be most of the work of torchrec's copy
            for option in sharding_options:
                self._held.append((option, option.shards))
                option.shards = []

    def _filter_sharding_types(self, *arguments: Any, **named: Any) -> Any:
        """As torchrec's, which asks it for every table: a place to look at the clock."""
        if self.clock is not None and self._held is not None and self.clock.out:
            raise _out_of_time(self.clock, "the tables' options were being listed")
        return super()._filter_sharding_types(*arguments, **named)

    def _estimate_in_turns(self, options: Sequence[Any], clock: Clock) -> None:
        """Every table's plainest option first, then their second, as far as the limit allows."""
        of_table: dict[str, list[Any]] = {}
        for option in options:
            of_table.setdefault(option.fqn, []).append(option)
        turns = zip_longest(*(sorted(choices, key=_plainness) for choices in of_table.values()))
        order = [option for turn in turns for option in turn if option is not None]
        # Two turns at least: a table of one choice may fit nowhere.
        enough = sum(min(len(choices), 2) for choices in of_table.values())
        for begin in range(0, len(order), _AT_ONCE):
            if begin >= (len(of_table) if clock.out else enough) and clock.enough_listed:
                self._missed = frozenset(id(option) for option in order[begin:])
                return
            if clock.out:
                raise _out_of_time(clock, f"{begin} of {len(of_table)} tables had an option with an estimate")
            self._estimate(order[begin : begin + _AT_ONCE])

    def _estimate(self, options: list[Any]) -> None:
        stock = [host.estimated(estimator) is not None for estimator in self._estimators]
        for quick, estimators in groupby(zip(stock, self._estimators, strict=True), key=itemgetter(0)):
            if quick:
                with _one_of_each_size(options, shared=self.shares and all(stock)):
                    for _, estimator in estimators:
                        host.quick(estimator).estimate(options, sharder_data_map=self._sharder_data_map)
            else:
                for _, estimator in estimators:
                    estimator.estimate(options, sharder_data_map=self._sharder_data_map)


def _plainness(option: Any) -> tuple[str, int]:
    plain = PLAINEST.index(option.sharding_type) if option.sharding_type in PLAINEST else len(PLAINEST)
    return "" if option.compute_kernel in ("fused", "dense") else option.compute_kernel, plain


def _out_of_time(clock: Clock, state: str) -> Exception:
    return host.planner_error("OTHER", f"timeout_seconds={clock.limit} is too short for a plan: {state} when it ended")


@contextmanager
def _one_of_each_size(options: Sequence[Any], *, shared: bool) -> Iterator[None]:
    """Leaves each option one shard of each size; then all are back, with the estimates of the one of their size.

    Args:
        options: What is estimated.
        shared: Whether shards of a size get the same objects, or copies.
    """
    whole: list[tuple[Any, list[Any], list[Any]]] = []
    for option in options:
        first: dict[tuple[int, ...], Any] = {}
        like, size, asked = [], None, None
        for shard in option.shards:
            if shard.size != size:  # most are as the one before
                size = shard.size
                asked = first.setdefault(tuple(size), shard)
            like.append(asked)
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
                perf, storage = asked.perf, asked.storage
                shard.perf, shard.storage = (perf, storage) if shared else (quick_copy(perf), quick_copy(storage))


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
