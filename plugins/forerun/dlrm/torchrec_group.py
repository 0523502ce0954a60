"""One rank's work for all ranks of a group."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from forerun_adapters import torchrec as host

__all__ = ["from_first_rank"]


def from_first_rank(work: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """What the work gives on the group's first rank, on every rank.

    torchrec lets the first rank fail alone, and the others wait for it until the group's time-out.

    Raises:
        Exception: The first rank's, on every rank.
    """
    outcome: list[Any] = [None, None]
    if group.rank() == 0:
        try:
            outcome = [work(), None]
        except Exception as error:
            if group.size() == 1:
                raise
            outcome = [None, _picklable(error)]
    if group.size() > 1:
        dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _picklable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return host.planner_error("OTHER", f"{type(error).__name__} on the group's first rank: {error}")
    return error
