"""What plans are rated by: torchrec's estimates as they are, or with two of their gaps closed.

torchrec's rating, the largest sum of `Perf.total` of a rank, leaves out the time in which ids travel to the ranks that
look them up (`Perf.input_dist_comms`, estimated but not counted), and prices an all-reduce at the bandwidth between
hosts even where all ranks are on one. `corrected` counts the first and prices the second as a ring within the host.
Both favour data-parallel tables, whose ids do not travel.

Source: ring all-reduce, 2 (R - 1) / R of the bytes over each link: Patarasuk & Yuan, Bandwidth Optimal All-reduce
Algorithms for Clusters of Workstations, 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from forerun_adapters import torchrec as host
from forerun_adapters import torchrec_topology as topologies

__all__ = ["COSTS", "CorrectedModel", "Objective", "corrected"]

Objective = Literal["torchrec", "corrected"]

# Of a `Perf`, what counts to a rank's sum (ms).
COSTS: dict[Objective, Callable[[Any], float]] = {
    "torchrec": lambda perf: float(perf.total),
    "corrected": lambda perf: float(perf.total + perf.input_dist_comms),
}


class CorrectedModel(host.PerfModel):  # type: ignore[misc]
    """Rates a plan by its largest sum of costs of a rank, the travel of ids counted.

    Args:
        topology: Whose ranks are planned for.
    """

    def __init__(self, topology: Any) -> None:
        self._ranks = topology.world_size

    def rate(self, plan: list[Any]) -> float:
        """The rating (ms)."""
        sums = [0.0] * self._ranks
        for option in plan:
            for shard in option.shards:
                sums[shard.rank] += COSTS["corrected"](shard.perf)
        return max(sums)


class _RingWithinHost(topologies.GeneralizedCommsBandwidth):  # type: ignore[misc]
    """A topology's two bandwidths, an all-reduce within a host at the one within hosts."""

    def __init__(self, links: Any) -> None:
        self._links = links

    def get_bw(self, local_world_size: int, world_size: int, collective_type: Any) -> float:
        """Bytes per ms."""
        if collective_type.value == "all_reduce" and 1 < world_size <= local_world_size:
            # torchrec divides all bytes once by this.
            return float(self.intra_host_bw) * world_size / (2 * (world_size - 1))
        return float(self._links.get_bw(local_world_size, world_size, collective_type))

    @property
    def intra_host_bw(self) -> float:
        """Bytes per ms."""
        return float(self._links.intra_host_bw)

    @property
    def inter_host_bw(self) -> float:
        """Bytes per ms."""
        return float(self._links.inter_host_bw)

    def __str__(self) -> str:
        return f"{self._links}, ring all-reduce within a host"


def corrected(topology: Any) -> Any:
    """A topology that prices an all-reduce within a host as a ring there; the one given stays as it is.

    Links that answer for each collective (measured ones do) are right already, and stay.
    """
    links = topologies.links(topology)
    return topologies.with_links(topology, _RingWithinHost(links)) if topologies.knows_two_links(links) else topology
