"""Where the shards of an option may go."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Spread"]


class Spread(IntEnum):
    """Where the shards of an option may go.

    Source: torchrec@v1.9:torchrec/distributed/planner/partitioners.py, `GreedyPerfPartitioner`.
    """

    ANY = 0  # each on any rank, several on one rank too (table-wise, column-wise)
    HOST = 1  # in order on the ranks of one host, one each (table-row-wise)
    HOSTS = 2  # in order on the ranks of as many hosts as they fill, in any order of hosts (grid)
    ALL = 3  # in order on all ranks (row-wise, data-parallel)
    WITHIN = 4  # each on any rank of one host, the same for all (table-column-wise)
    APART = 5  # each on any rank, no two on one rank (column-wise with a key-value kernel)
