"""In how many pieces ranks hand over what is large.

A rank that hands megabytes to a socket at once fills the buffers of a slow link, and what is dropped at the end of such
a burst is sent again only after a time-out: 0.31 s were measured where the wire takes 0.16. In pieces, each begun when
the last but one has arrived, nothing is dropped. On a fast link pieces only cost: there everything goes at once, and so
it does where no socket is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from forerun.moe.exchange import Group

__all__ = ["PIECE_BYTES", "Begin", "End", "Pieces"]

PIECE_BYTES = 256 << 10  # two of them are on their way
_SLOW = 1.5e8  # bytes a second of a rank, below which there are pieces
_LOOKS = 4  # of what is large, until the link is known
_AGAIN = 16  # and until it is looked at anew

End = Callable[[], object]  # waits for what was begun
Begin = Callable[[slice], End]  # begins to hand over some of each rank's rows


class Pieces:
    """What the ranks of a group know of their link, alike on all of them.

    Args:
        group: Of the ranks; None: all.
        slow: Whether there are pieces, until it is known.
    """

    def __init__(self, group: Group = None, *, slow: bool = False) -> None:
        self._group, self.slow = group, slow
        self._looks, self._least = _LOOKS, float("inf")

    def hand_over(self, rows: int, row_bytes: int, begin: Begin) -> None:
        """Begins and ends all of it; all ranks call it alike.

        Args:
            rows: Of the rank that has most.
            row_bytes: That a rank sends for each, to all others together.
            begin: Is asked about rows from 0 on.
        """
        step = max(1, PIECE_BYTES // max(1, row_bytes)) if self.slow else max(1, rows)
        start, begun = time.perf_counter(), list[End]()
        for first in range(0, rows, step):
            begun.append(begin(slice(first, min(first + step, rows))))
            if len(begun) > 1:
                begun.pop(0)()
        for end in begun:
            end()
        if rows * row_bytes > 2 * PIECE_BYTES:
            self._took((time.perf_counter() - start) / (rows * row_bytes))

    def _took(self, seconds: float) -> None:
        """For a byte. The least counts: waiting for other ranks comes on top."""
        self._least, self._looks = min(self._least, seconds), self._looks - 1
        if self._looks:
            return
        told = torch.tensor([self._least], dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        self.slow = float(told) * _SLOW > 1
        self._looks, self._least = _AGAIN, float("inf")
