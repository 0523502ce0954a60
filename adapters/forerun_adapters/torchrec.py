"""torchrec, 1.7 to 1.9: the planner's classes that `forerun.dlrm` stands on, in one shape for all releases.

What differs between them, and is hidden here by looking at what is there: `Perf` and `Storage` may have more fields,
`PlannerErrorType` more members, and the planner's base class `get_selected_options` and `get_search_space` (since 1.9).
The contract tests of every symbol used here are in `tests/adapters/test_torchrec.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Literal, NamedTuple

from forerun_adapters._require import require

require("torchrec")

from torchrec.distributed.planner import EmbeddingShardingPlanner as _Planner  # noqa: E402
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator as _Enumerator  # noqa: E402
from torchrec.distributed.planner.estimator import estimator as _perf_estimators  # noqa: E402
from torchrec.distributed.planner.estimator.types import HardwarePerfConfig as _PerfConfig  # noqa: E402
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner as _GreedyPartitioner  # noqa: E402
from torchrec.distributed.planner.perf_models import NoopPerfModel as _NoopPerfModel  # noqa: E402
from torchrec.distributed.planner.shard_estimators import (  # noqa: E402
    EmbeddingPerfEstimator as _PerfEstimator,
)
from torchrec.distributed.planner.shard_estimators import (  # noqa: E402
    EmbeddingStorageEstimator as _StorageEstimator,
)
from torchrec.distributed.planner.types import Partitioner as _Partitioner  # noqa: E402
from torchrec.distributed.planner.types import PerfModel as _PerfModel  # noqa: E402
from torchrec.distributed.planner.types import PlannerError as _PlannerError  # noqa: E402
from torchrec.distributed.planner.types import PlannerErrorType, Shard  # noqa: E402
from torchrec.distributed.planner.types import Proposer as _Proposer  # noqa: E402
from torchrec.distributed.sharding_plan import get_default_sharders  # noqa: E402
from torchrec.distributed.types import ShardingPlan as _ShardingPlan  # noqa: E402

__all__ = [
    "TIERS",
    "EmbeddingEnumerator",
    "EmbeddingShardingPlanner",
    "GreedyPartitioner",
    "Partitioner",
    "PerfModel",
    "PlannerError",
    "Proposer",
    "Sharded",
    "ShardingPlan",
    "default_sharders",
    "estimated",
    "host_of",
    "is_default_pooling",
    "is_greedy",
    "is_makespan",
    "no_plan",
    "planner_error",
    "quick",
    "shard",
    "shard_on_ranks",
    "sharded_tables",
    "spread_name",
    "tiers",
    "unlike_any",
]

EmbeddingEnumerator: Any = _Enumerator
EmbeddingShardingPlanner: Any = _Planner
GreedyPartitioner: Any = _GreedyPartitioner
Partitioner: Any = _Partitioner
PerfModel: Any = _PerfModel
PlannerError: Any = _PlannerError
Proposer: Any = _Proposer
ShardingPlan: Any = _ShardingPlan

TIERS = ("hbm", "ddr", "ssd")


class Sharded(NamedTuple):
    """How a plan shards one table."""

    path: str  # of the module that holds the table
    name: str
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]  # one for each shard
    sizes: tuple[tuple[int, ...], ...] | None  # of each shard; None where the plan does not say (data-parallel)


def planner_error(kind: str, message: str) -> Exception:
    """torchrec's `PlannerError` of a type, such as INSUFFICIENT_STORAGE; OTHER where a release lacks the type."""
    error: Exception = _PlannerError(
        error_type=getattr(PlannerErrorType, kind, PlannerErrorType.OTHER), message=message
    )
    return error


def estimated(estimator: Any) -> Literal["perf", "storage"] | None:
    """What a stock estimator sets on every shard from the option and the shard's size alone; None for any other.

    An estimator of a user's own class, and a hardware configuration that adjusts shards by one another
    (`post_process_perfs`), are None.
    """
    if type(estimator) is _StorageEstimator:
        return "storage"
    if type(estimator) is _PerfEstimator:
        estimator = estimator._estimator
    if type(estimator) is not _perf_estimators.EmbeddingPerfEstimator:
        return None
    alone = type(estimator.config).post_process_perfs is _PerfConfig.post_process_perfs
    return "perf" if alone else None


def quick(estimator: Any) -> Any:
    """A stock estimator's copy that gives the same estimates several times sooner.

    For every formula of every shard torchrec looks through all attributes of its hardware configuration for methods
    that carry a mark (`torchrec.distributed.planner.estimator.annotations`); the copy's configuration lists those only
    that can carry one. The original and its configuration stay as they are.
    """
    if type(estimator) is _PerfEstimator:
        copied: Any = copy(estimator)
        copied._estimator = quick(estimator._estimator)
        return copied
    if type(estimator) is not _perf_estimators.EmbeddingPerfEstimator or not hasattr(estimator, "_config"):
        return estimator
    config = estimator._config
    marked = [name for name in dir(config) if _may_carry_marks(getattr(config, name, None))]
    listing = type(type(config).__name__, (type(config),), {"__dir__": lambda self: marked})
    copied = copy(estimator)
    copied_config: Any = object.__new__(listing)
    copied_config.__dict__ = config.__dict__
    copied._config = copied_config
    return copied


def _may_carry_marks(attribute: Any) -> bool:
    plain = inspect.isroutine(attribute) and not getattr(attribute, "__dict__", None)
    return callable(attribute) and not plain


def tiers(storage: Any) -> tuple[int, ...]:
    """Bytes of each of `TIERS`."""
    return (storage.hbm, storage.ddr, getattr(storage, "ssd", 0))


def host_of(topology: Any) -> list[int]:
    """The host of each rank; several hosts of one pod, with a fast interconnect between them, count as one."""
    return [rank // topology.intra_group_size for rank in range(topology.world_size)]


def spread_name(option: Any) -> str:
    """Where torchrec's partitioner may put an option's shards, as a member of `forerun.dlrm.problem.Spread`.

    Source: torchrec@v1.8:torchrec/distributed/planner/partitioners.py, `GreedyPerfPartitioner`.

    Raises:
        PlannerError: torchrec's partitioner does not know the option's `partition_by` either.
    """
    if option.partition_by == "host":
        return "HOST" if option.sharding_type == "table_row_wise" else "WITHIN"
    if option.partition_by == "device":
        apart = option.sharding_type == "column_wise" and option.compute_kernel == "key_value"
        return "APART" if apart else "ANY"
    try:
        return {"uniform": "ALL", "multi_host": "HOSTS"}[option.partition_by]
    except KeyError:
        what = f"table {option.name!r} is to be partitioned by {option.partition_by!r}, which no partitioner knows"
        raise planner_error("PARTITION", what) from None


def shard(size: list[int], offset: list[int], perf: Any, storage: Any, rank: int | None) -> Any:
    """A shard of torchrec's, filled."""
    return Shard(size=size, offset=offset, storage=storage, perf=perf, rank=rank)


def shard_on_ranks(option: Any, ranks: Sequence[int]) -> Any:
    """A copy of the option whose shards lie on the ranks; the option stays as it is."""
    placed = option.__class__.__new__(option.__class__)
    placed.__dict__.update(option.__dict__)
    placed.shards = [
        Shard(size=s.size, offset=s.offset, storage=s.storage, perf=s.perf, rank=rank)
        for s, rank in zip(option.shards, ranks, strict=True)
    ]
    return placed


def unlike_any(option: Any) -> Any:
    """A copy of the option, its shards the same objects, whose hash is that of no other option."""
    kind = type(option)
    other: Any = object.__new__(type(kind.__name__, (kind,), {"__hash__": object.__hash__}))
    other.__dict__.update(option.__dict__)
    return other


def no_plan(error: Exception) -> str | None:
    """The name of the `PlannerErrorType` of torchrec's error that nothing fits; None for any other error.

    Until 1.9 torchrec fails while it words that error, for a storage reservation without a percentage.
    """
    if isinstance(error, _PlannerError):
        return str(error.error_type.name)
    unworded = isinstance(error, AttributeError) and error.name == "_percentage"
    return "INSUFFICIENT_STORAGE" if unworded else None


def is_greedy(partitioner: Any) -> bool:
    """Whether a partitioner is torchrec's default one, which keeps to nothing but memory and `partition_by`.

    With `balance_modules` it is not: it spreads each module's tables, whatever that costs.
    """
    return type(partitioner) is _GreedyPartitioner and not partitioner._balance_modules


def is_makespan(model: Any) -> bool:
    """Whether a performance model is torchrec's default one: the largest sum of `Perf.total` of a rank."""
    return type(model) is _NoopPerfModel


def is_default_pooling(constraint: Any) -> bool:
    """Whether a table's pooling factors are those that torchrec takes where none are given."""
    return constraint is None or list(constraint.pooling_factors) == type(constraint)().pooling_factors


def default_sharders() -> list[Any]:
    """The sharders that torchrec takes where none are given."""
    found: list[Any] = get_default_sharders()
    return found


def sharded_tables(plan: Any) -> Iterator[Sharded]:
    """Every table of a `ShardingPlan`."""
    for path, module_plan in plan.plan.items():
        for name, how in module_plan.items():
            spec = how.sharding_spec
            sizes = tuple(tuple(s.shard_sizes) for s in spec.shards) if spec is not None else None
            yield Sharded(path, name, how.sharding_type, how.compute_kernel, tuple(how.ranks or ()), sizes)
