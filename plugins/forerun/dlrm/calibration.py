"""What this machine's memory and links were measured to do, as a file.

Every measurement is a line through times of several sizes: `ms = latency_ms + bytes / bytes_per_ms`. Bytes are a rank's
own, counted as torchrec's estimators count them (`forerun.dlrm.measure` says how).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls

from forerun.files import write_whole

__all__ = ["COLLECTIVES", "MEMORY", "Calibration", "Line", "Scope", "Timing", "fit"]

COLLECTIVES = ("all_to_all", "all_reduce", "reduce_scatter", "all_gather")
MEMORY = ("lookup", "host_to_device")
Scope = Literal["rank", "intra_host", "inter_host"]

_FORMAT, _VERSION = "forerun dlrm calibration", 1


@dataclass(frozen=True)
class Timing:
    """One size, measured: the median over repetitions of the slowest rank's time."""

    bytes: int
    ms: float


@dataclass(frozen=True)
class Line:
    """What one operation takes, by size: times, and the line through them."""

    operation: str  # of COLLECTIVES or MEMORY
    scope: Scope  # by every rank on its own, between the ranks of a host, between all ranks of several hosts
    ranks: int  # that took part in one operation
    latency_ms: float
    bytes_per_ms: float
    timings: tuple[Timing, ...]

    @property
    def largest(self) -> Timing:
        """The largest size measured."""
        return max(self.timings, key=lambda timing: timing.bytes)

    def bandwidth(self, size: float | None = None) -> float:
        """Bytes per ms of a message of `size` bytes, latency included; None: of the largest size measured.

        Between two sizes it is what was measured that counts, not the line: caches bend it. A larger message is as fast
        as the largest, a smaller one takes as long as the smallest.
        """
        size = min(self.largest.bytes, size or self.largest.bytes)
        timings = sorted(self.timings, key=lambda timing: timing.bytes)
        return size / float(np.interp(size, [timing.bytes for timing in timings], [timing.ms for timing in timings]))


def fit(timings: Sequence[Timing]) -> tuple[float, float]:
    """Latency (ms) and bytes per ms of the line with the least squared relative errors; neither is negative.

    Raises:
        ValueError: There are fewer than two sizes, or a time that is not positive.
    """
    if len({timing.bytes for timing in timings}) < 2 or not all(
        timing.ms > 0 and math.isfinite(timing.ms) for timing in timings
    ):
        raise ValueError(f"a line needs positive times of two sizes or more; there are {list(timings)}")
    sizes, times = (np.array([getattr(timing, name) for timing in timings], float) for name in ("bytes", "ms"))
    scale = sizes.max()
    (latency, slope), _ = nnls(np.stack([1 / times, sizes / scale / times], axis=1), np.ones(len(times)))
    if slope == 0:  # the largest size took no longer than the smallest
        return 0.0, float((sizes / times).max())
    return float(latency), float(scale / slope)


@dataclass(frozen=True)
class Calibration:
    """Measurements of one machine, or of several with the links between them."""

    made: str  # date and time
    compute_device: str  # cpu or cuda
    backend: str  # gloo or nccl
    world_size: int
    local_world_size: int  # ranks a host
    threads: int  # of each rank, on a CPU
    hardware: str
    versions: dict[str, str]
    lines: tuple[Line, ...]

    def line(self, operation: str, scope: Scope) -> Line | None:
        """One measurement; None where it was not made."""
        return next((line for line in self.lines if (line.operation, line.scope) == (operation, scope)), None)

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, whole or not at all."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        write_whole(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is not a calibration, or one of a later version.
        """
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text())
            kind, version = fields.pop("format", None), fields.pop("version", None)
            if kind != _FORMAT:
                raise TypeError(f"its format is {kind!r}")
            if version != _VERSION:
                raise ValueError(f"{path} is of version {version}; this release of forerun reads version {_VERSION}")
            return cls(**{**fields, "lines": tuple(map(_line, fields["lines"]))})
        except (AttributeError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a file written by forerun dlrm calibrate: {error}") from error


def _line(fields: dict[str, Any]) -> Line:
    line = Line(**{**fields, "timings": tuple(Timing(**timing) for timing in fields["timings"])})
    if not line.timings or any(timing.bytes <= 0 or timing.ms <= 0 for timing in line.timings):
        raise TypeError(f"{line.operation}, {line.scope} has no times, or some that are not positive: {line.timings}")
    return line
