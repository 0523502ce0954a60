"""torchrec's `Topology` with constants that were measured, in place of torchrec's own for every device."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from forerun.dlrm.calibration import Calibration, Scope
from forerun_adapters import torchrec_topology as host

__all__ = ["MeasuredBandwidths", "topology_from"]


class MeasuredBandwidths(host.GeneralizedCommsBandwidth):  # type: ignore[misc]
    """torchrec's question for a collective's bandwidth, answered by what was measured of that very collective.

    Args:
        calibration: The measurements.
        message: Bytes of the message at which bandwidths are taken; None: the largest that was measured.
        intra_host, inter_host: Bytes per ms where nothing was measured.
    """

    def __init__(
        self,
        calibration: Calibration,
        message: int | None = None,
        intra_host: float | None = None,
        inter_host: float | None = None,
    ) -> None:
        self.calibration, self.message = calibration, message
        self._given: dict[Scope, float | None] = {"intra_host": intra_host, "inter_host": inter_host}

    def get_bw(self, local_world_size: int, world_size: int, collective_type: Any) -> float:
        """Bytes per ms; of one rank alone infinitely many, for nothing travels."""
        if world_size == 1:
            return math.inf
        scope: Scope = "intra_host" if world_size <= local_world_size else "inter_host"
        bandwidth = self._bandwidth(collective_type.value, scope)
        if collective_type.value == "all_reduce":
            # The estimate is then the measured time: what was measured is the whole all-reduce.
            return bandwidth * host.all_reduce_factor(world_size, local_world_size)
        return bandwidth

    @property
    def intra_host_bw(self) -> float:
        """Bytes per ms of an all-to-all within a host; between hosts, where no host has several ranks."""
        return self._any("intra_host", "inter_host")

    @property
    def inter_host_bw(self) -> float:
        """Bytes per ms of an all-to-all between hosts; within one, where there is one only."""
        return self._any("inter_host", "intra_host")

    def lacks(self, scope: Scope) -> bool:
        """Whether nothing is known of a scope."""
        return self._given[scope] is None and self.calibration.line("all_to_all", scope) is None

    def _any(self, *scopes: Scope) -> float:
        known = [self._bandwidth("all_to_all", scope) for scope in scopes if not self.lacks(scope)]
        return known[0] if known else math.inf

    def _bandwidth(self, collective: str, scope: Scope) -> float:
        if (given := self._given[scope]) is not None:
            return given
        line = self.calibration.line(collective, scope)
        if line is None:
            raise ValueError(f"{collective}, {scope} was not measured: {_remedy(scope)}")
        return line.bandwidth(self.message)

    def __str__(self) -> str:
        at = "the largest message measured" if self.message is None else f"{self.message} bytes"
        return f"MeasuredBandwidths: of {self.calibration.made}, {self.calibration.backend}, at {at}"


class _Memory(NamedTuple):
    """A constant of a topology, and what it is measured by."""

    constant: str
    operation: str


_MEMORY = {
    "cpu": (_Memory("ddr_mem_bw", "lookup"),),
    "cuda": (_Memory("hbm_mem_bw", "lookup"), _Memory("hbm_to_ddr_mem_bw", "host_to_device")),
}


def topology_from(
    calibration: str | Path | Calibration,
    world_size: int,
    *,
    local_world_size: int | None = None,
    compute_device: str | None = None,
    message: int | None = None,
    per_rank: dict[str, list[int]] | None = None,
    **given: Any,
) -> Any:
    """A torchrec `Topology` with a calibration's constants.

    Args:
        calibration: Written by `forerun dlrm calibrate`, or its path.
        world_size: Ranks to plan for.
        local_world_size: Of them, those of a host; None: all of them.
        compute_device: What the calibration has to be of, cpu or cuda; None: whatever it is of.
        message: Bytes of a rank's message in one collective, at which bandwidths are taken: torchrec knows no latency.
            None: the largest that was measured.
        per_rank: `hbm_cap` or `ddr_cap` of every rank, in bytes, where they differ.
        given: As `Topology` takes it, such as `hbm_cap`; constants given here win.

    Raises:
        ValueError: The file is not a calibration, is of another device, or lacks what such ranks need.
        TypeError: `Topology` takes no such argument.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    if message is not None and message < 1:
        raise ValueError(f"message={message}: expected bytes, 1 or more")
    if compute_device not in (None, calibration.compute_device):
        raise ValueError(f"the calibration is of {calibration.compute_device}, the topology of {compute_device}")
    local = local_world_size or world_size
    links = MeasuredBandwidths(calibration, message, given.pop("intra_host_bw", None), given.pop("inter_host_bw", None))
    needed: dict[Scope, bool] = {"intra_host": local > 1, "inter_host": world_size > local}
    for scope, is_needed in needed.items():
        if is_needed and links.lacks(scope):
            raise ValueError(
                f"the calibration of {calibration.made} has {calibration.world_size} ranks, "
                f"{calibration.local_world_size} a host, and {scope} was not measured: {_remedy(scope)}"
            )
    if local != calibration.local_world_size:
        warnings.warn(
            f"the calibration was made with {calibration.local_world_size} ranks a host, the topology has {local}: the "
            "ranks of a host share its memory and links, so the constants may be off",
            stacklevel=2,
        )
    measured = {}
    for constant, operation in _MEMORY[calibration.compute_device]:
        if line := calibration.line(operation, "rank"):
            measured[constant] = line.bandwidth()
    return host.topology(
        per_rank=per_rank,
        world_size=world_size,
        local_world_size=local,
        compute_device=calibration.compute_device,
        generalized_comms_bandwidths=links,
        **{**measured, **given},
    )


def _remedy(scope: Scope) -> str:
    several = "several ranks a host" if scope == "intra_host" else "torchrun on several hosts"
    return f"run forerun dlrm calibrate with {several}, or give {scope}_bw (bytes per ms)"
