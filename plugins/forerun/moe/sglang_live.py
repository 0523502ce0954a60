"""Experts moved to where another plan has them, while an SGLang server goes on serving.

The plan's file may be replaced: after so many batches the first rank looks at the file and tells the others; where it
has changed all ranks load it and move experts between the same two batches. A file that is no plan of this model is
reported, and the old plan stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.agreement import agree
from forerun.moe.move import move, toward
from forerun.moe.plan import Plan
from forerun.moe.sglang_spread import Spread
from forerun_adapters import sglang_moe as host

__all__ = ["Watch", "replace", "steps"]

_log = logging.getLogger(__name__)
_STEP = 2  # experts of a layer that a rank takes between two batches


class Watch:
    """Looks at a plan's file every so many batches; all ranks call it alike.

    Args:
        path: The file.
        batches: Between two looks.
        taken: Is told the plan that all ranks have loaded.
        misfit: Why a plan cannot be taken; None: it can.
    """

    def __init__(
        self, path: Path, batches: int, taken: Callable[[Plan], None], misfit: Callable[[Plan], str | None]
    ) -> None:
        self._path, self._batches, self._taken, self._misfit = path, batches, taken, misfit
        self._left, self._seen = batches, self._stamp()

    def __call__(self) -> None:
        """A batch begins."""
        self._left -= 1
        if self._left:
            return
        self._left = self._batches
        group, told = host.group(), [self._stamp() if host.rank() == 0 else ""]
        dist.broadcast_object_list(told, dist.get_global_rank(group, 0), group=group)
        if told[0] != self._seen:
            self._seen = str(told[0])
            self._load(group)

    def _stamp(self) -> str:
        try:
            status = self._path.stat()
        except OSError:
            return ""
        return f"{status.st_mtime_ns} {status.st_size}"

    def _load(self, group: Any) -> None:
        problem, plan = None, None
        try:
            plan = Plan.load(self._path)
            problem = self._misfit(plan)
        except (OSError, ValueError) as error:
            problem = str(error)
        try:
            agree(problem, "" if plan is None else plan.digest, group)
        except ValueError as error:
            _log.error("forerun: the plan stays as it is: %s", error)
            return
        assert plan is not None
        self._taken(plan)


def replace(found: Mapping[int, Any], spread: Mapping[int, Spread], plan: Plan | None) -> int:
    """Moves every layer's experts at once; arguments and errors are those of `steps`.

    Returns:
        Bytes that left this rank.
    """
    return sum(steps(found, spread, plan, max(one.experts for one in spread.values())))


def steps(
    found: Mapping[int, Any], spread: Mapping[int, Spread], plan: Plan | None, most: int = _STEP
) -> Iterator[int]:
    """Moves experts bit by bit, so that batches can run in between; all ranks take every step alike.

    Args:
        found: SGLang's experts of each layer, by its number.
        spread: What each layer carries.
        plan: Where experts shall lie; None: in their order.
        most: Experts of a layer that a rank takes in a step.

    Yields:
        Bytes that left this rank.

    Raises:
        RuntimeError: A rank is lost: the server is of no use from then on.
    """
    for number, one in spread.items():
        in_order = torch.arange(one.experts)
        at = in_order if one.place is None else one.place.cpu().argsort()
        after = in_order if plan is None else torch.from_numpy(plan.order[one.layer])
        while not at.equal(after):
            to = toward(at, after, one.ranks.size, most)
            left = move(host.weights(found[number]), at, to, one.ranks.group)
            place: Tensor = to.argsort()
            one.place, at = place.to(next(found[number].parameters()).device), to
            yield left
        if plan is None:
            one.place = None
