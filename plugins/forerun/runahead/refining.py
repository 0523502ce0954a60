"""A table that follows its engines: what contexts took while serving refines it.

The first engine of a chain waits for no other: its time is that of its context, computed beside the rest of the chain
as in the calibration. Where that engine had nothing else to do, it is one more measurement.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from pathlib import Path

from forerun.runahead.cost import Compute
from forerun.runahead.routing import Router
from forerun.runahead.table import Table

__all__ = ["Refiner"]

_EVERY = 16  # measurements
_KEPT = 64  # the latest

_logger = logging.getLogger(__name__)


class Refiner:
    """Refines a router's table; the link between engines stays as it was measured, as only calibration tells it.

    Args:
        router: That routes by the table.
        table: Measured, for these engines.
        path: Where the refined table is kept; None: nowhere.
    """

    def __init__(self, router: Router, table: Table, path: Path | None = None) -> None:
        self._router, self._calibrated, self._path = router, table, path
        self._measured: deque[Compute] = deque(maxlen=_KEPT)
        self._new = 0
        self._task: asyncio.Task[None] | None = None
        self.refined = 0  # times

    def note(self, measured: Compute) -> None:
        """Takes a measurement; enough of them refine the table, in the background."""
        self._measured.append(measured)
        self._new += 1
        if self._new >= _EVERY and (self._task is None or self._task.done()):
            self._new = 0
            self._task = asyncio.create_task(self._refine())

    async def _refine(self) -> None:
        self._router.become(await asyncio.to_thread(self._searched, tuple(self._measured)))
        self.refined += 1

    def _searched(self, measured: tuple[Compute, ...]) -> Router:
        table = self._calibrated.refined(measured)
        router = self._router.with_table(table)
        router.complete()
        longest = table.rows[-1]
        _logger.info("the table is refined: %d tokens as %s", longest.tokens, "+".join(map(str, longest.contexts)))
        if self._path is not None:
            try:
                table.save(self._path)
            except OSError as error:
                _logger.warning("the refined table is not kept: %s", error)
        return router
