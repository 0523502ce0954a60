"""torchrec, 1.7 to 1.9: what a planner's topology is made of.

Bandwidths are bytes per ms. The contract tests of every symbol used here are in
`tests/adapters/test_torchrec_topology.py`.
"""

from __future__ import annotations

import inspect
from copy import copy
from typing import Any

from forerun_adapters._require import require

require("torchrec")

from torchrec.distributed.planner.types import BasicCommsBandwidths as _TwoLinks  # noqa: E402
from torchrec.distributed.planner.types import CustomTopologyData as _CustomTopologyData  # noqa: E402
from torchrec.distributed.planner.types import GeneralizedCommsBandwidth as _Bandwidth  # noqa: E402
from torchrec.distributed.planner.types import Topology as _Topology  # noqa: E402

__all__ = [
    "CONSTANTS",
    "GeneralizedCommsBandwidth",
    "all_reduce_factor",
    "knows_two_links",
    "links",
    "topology",
    "with_links",
]

GeneralizedCommsBandwidth: Any = _Bandwidth

# A topology's constants that a user may give by name.
CONSTANTS = (
    "hbm_mem_bw",
    "ddr_mem_bw",
    "ssd_mem_bw",
    "hbm_to_ddr_mem_bw",
    "intra_host_bw",
    "inter_host_bw",
    "bwd_compute_multiplier",
    "weighted_feature_bwd_compute_multiplier",
    "uneven_sharding_perf_multiplier",
)


def topology(*, per_rank: dict[str, list[int]] | None = None, **given: Any) -> Any:
    """A `Topology`.

    Args:
        per_rank: `hbm_cap`, `ddr_cap` or `ssd_cap` of every rank, in bytes, where they differ.
        given: As `Topology` takes it.

    Raises:
        TypeError: The installed release takes no argument of a name that was given.
    """
    takes = inspect.signature(_Topology).parameters
    if unknown := sorted(set(given) - set(takes)):
        raise TypeError(f"torchrec's Topology takes no {unknown[0]!r}; it takes {', '.join(takes)}")
    if per_rank:
        given["custom_topology_data"] = _CustomTopologyData(per_rank, given["world_size"])
    # Without the mark it warns of constants that nobody looked at.
    return _Topology(**given, created_by_factory=True)


def links(topology: Any) -> Any:
    """What a topology answers the estimators' questions for bandwidths with."""
    return topology.comms_bandwidths


def with_links(topology: Any, links: Any) -> Any:
    """A copy of the topology with other links."""
    other = copy(topology)
    other._comms_bandwidths = links
    return other


def knows_two_links(links: Any) -> bool:
    """Whether links are torchrec's plain pair of bandwidths, within hosts and between them."""
    return type(links) is _TwoLinks


def all_reduce_factor(world_size: int, local_world_size: int) -> float:
    """What torchrec multiplies an all-reduce's bytes by before it divides them by a bandwidth.

    Source: torchrec@v1.8:torchrec/distributed/planner/estimator/estimator.py, `DataParallelEvaluator`.
    """
    hosts = min(world_size / local_world_size, 2)
    return (2 * hosts - 1) / hosts * (2 if world_size > 2 * local_world_size else 1)
