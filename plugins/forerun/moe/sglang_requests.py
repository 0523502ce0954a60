"""Requests of an SGLang server to its data-parallel ranks, by the plan that experts lie by just now.

The process that routes requests has no experts: since it started another plan may have been taken, or the plan laid
aside. The first rank, which runs on the same host, leaves word in a file that the environment names to both.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        """The digest of the plan that is followed, or dashes; empty where nothing was told yet."""
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
        self._path, self._followed, self._seen = path, followed, plan.digest
        self._arrivals: Arrivals | None = Arrivals(plan)

    def rank(self, request: Any, waiting: Sequence[int] | None = None) -> int | None:
        """The rank of the next request, as by `Arrivals`; None: no plan is followed, SGLang decides.

        Raises:
            TypeError: It holds something else than whole numbers.
        """
        told = self._followed.told()
        if told and told != self._seen:
            self._seen, self._arrivals = told, self._of(told)
        return None if self._arrivals is None else self._arrivals.rank(request, waiting)

    def _of(self, digest: str) -> Arrivals | None:
        if digest == _NONE:
            _log.info("forerun: no plan is followed: requests go to ranks as SGLang balances them")
            return None
        try:
            plan = Plan.load(self._path)
        except (OSError, ValueError) as error:
            _log.warning("forerun: requests go to ranks as SGLang balances them: %s", error)
            return None
        return Arrivals(plan) if plan.digest == digest else None  # replaced once more: there will be word of it
