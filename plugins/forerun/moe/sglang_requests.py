"""Requests of an SGLang server to its data-parallel ranks, by the plan that experts lie by just now.

The process that routes requests has no experts: since it started another plan may have been taken, or the plan laid
aside. The first rank, which runs on the same host, leaves word in a file that the environment names to both.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np

from forerun.moe.plan import Plan
from forerun.moe.requests import Arrivals

__all__ = ["Followed", "Routes"]

_log = logging.getLogger(__name__)
_FILE = "FORERUN_SGLANG_FOLLOWED"
_NONE = "-" * 64  # as long as a plan's digest: a write over another one is never seen half


class Followed:
    """Which plan is followed, as the first rank tells and the process that routes requests asks.

    Made first in the process that starts both, it is a file there until that process ends.

    Raises:
        OSError: There is no place for temporary files.
    """

    def __init__(self) -> None:
        name = os.environ.get(_FILE)
        if name is None:
            handle, name = tempfile.mkstemp(prefix="forerun-")
            os.close(handle)
            os.environ[_FILE] = name
            atexit.register(Path(name).unlink, missing_ok=True)
        self._path = Path(name)

    def tell(self, plan: Plan | None) -> None:
        """Tells of another plan, or that none is followed."""
        try:
            with self._path.open("r+b") as file:
                file.write((_NONE if plan is None else plan.digest).encode())
        except OSError as error:
            _log.warning("forerun: requests go to the ranks that they went to before: %s", error)

    def told(self) -> str:
        """The digest of the plan that is followed, or dashes.

        Empty where nothing was told yet, the file is gone with its server, or none can be opened just now: no news.
        """
        try:
            return self._path.read_text()
        except OSError:
            return ""


class Routes:
    """Ranks of requests, as in `Arrivals`, while a plan is followed.

    Args:
        path: The plan's file.
        plan: That was there at the start.
        followed: Tells whether it still is.
    """

    def __init__(self, path: Path, plan: Plan, followed: Followed) -> None:
        self._path, self._plan, self._followed = path, plan, followed
        self._arrivals: Arrivals | None = Arrivals(plan)
        self._seen = ""  # what was told last
        self._given: dict[str, int] = {}  # ranks of requests that may wait for their answers, by name

    def rank(self, name: str, request: Any, waiting: Container[str] | None = None) -> int | None:
        """The rank of the next request; None: no plan is followed, SGLang decides.

        Args:
            name: Of the request, its own.
            request: Its token ids.
            waiting: Names of requests that wait for their answers; None: not known.

        Raises:
            TypeError: It holds something else than whole numbers.
        """
        told = self._followed.told()
        if told not in ("", self._seen):
            self._seen, self._arrivals = told, self._of(told)
        if self._arrivals is None:
            return None
        if waiting is None:
            return self._arrivals.rank(request)
        self._given = {other: rank for other, rank in self._given.items() if other in waiting}
        counts = np.bincount(list(self._given.values()), minlength=self._plan.ranks)
        self._given[name] = rank = self._arrivals.rank(request, counts.tolist())
        return rank

    def _of(self, digest: str) -> Arrivals | None:
        if digest == _NONE:
            _log.info("forerun: no plan is followed: requests go to ranks as SGLang balances them")
            return None
        try:
            if digest != self._plan.digest:
                self._plan = Plan.load(self._path)
        except (OSError, ValueError) as error:
            _log.warning("forerun: requests go to ranks as SGLang balances them: %s", error)
            return None
        # Of one that was replaced once more there will be word.
        return Arrivals(self._plan) if digest == self._plan.digest else None
