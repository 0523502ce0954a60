"""A plan file: which rank holds which expert, and where each token id's experts are expected.

It names the model that it is of, and is refused on another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.moe.check import refuse_misfits
from forerun.moe.files import read, write
from forerun.moe.identity import Identity
from forerun.moe.lookback import Lookback

__all__ = ["LayerReport", "Plan"]


@dataclass(frozen=True)
class LayerReport:
    """What one layer's placement promises, on the profile that it was made from; None: it had no paths to tell by."""

    layer: int  # its number in the model
    local: float  # local activation rate, each token id at home where the table says
    contiguous: float  # the same with experts in their order, the best homes for those
    saved: float  # as `local`, pairs on near ranks counted by their nearness
    experts: float  # experts' load, max/mean over the ranks
    contiguous_experts: float  # the same with experts in their order
    tokens: float  # tokens' load, max/mean over the ranks
    exact: bool  # no placement is better on the table
    batch: float | None  # local activation rate of paths shuffled in batches, each predicted from the others
    calibration: float | None  # mean distance of predicted local shares from those that came
    fan_out: float | None  # ranks that hold a token's experts
    contiguous_fan_out: float | None
    sent: float | None  # rows a token sends, deduplicated and shuffled
    contiguous_sent: float | None  # rows a token sends in stock AutoEP: one per pair, random homes, experts in order
    lookback: float  # weight of the look-back


@dataclass(frozen=True, eq=False)
class Plan:
    """Experts' ranks and tokens' expected ranks in every layer of one model.

    Args:
        identity: The model.
        rank: `[L, E]` the rank of each expert, E/R on each.
        tokens: `[N]` ids of which something is known, rising.
        share: `[L, N, R]` what share of an id's experts is expected on each rank.
        prior: `[L, R]` the same of other ids.
        ratio: `[L, R, R, R]` of `Lookback`.
        weight: `[L]` of `Lookback`; 0: not used.
        layers: One report a layer.

    Raises:
        ValueError: The arrays do not fit together or the model, or hold what cannot be.
    """

    identity: Identity
    rank: NDArray[np.int16]
    tokens: NDArray[np.int64]
    share: NDArray[np.float16]
    prior: NDArray[np.float32]
    ratio: NDArray[np.float32]
    weight: NDArray[np.float32]
    layers: tuple[LayerReport, ...]

    def __post_init__(self) -> None:
        layers, experts, ranks = len(self.identity.layers), self.identity.experts, self.ranks
        refuse_misfits(
            [
                ("rank", self.rank, np.int16, (layers, experts)),
                ("tokens", self.tokens, np.int64, (None,)),
                ("share", self.share, np.float16, (layers, self.tokens.size, ranks)),
                ("prior", self.prior, np.float32, (layers, ranks)),
                ("ratio", self.ratio, np.float32, (layers, ranks, ranks, ranks)),
                ("weight", self.weight, np.float32, (layers,)),
            ],
            f"{self.identity} on {ranks} ranks",
        )
        if experts % ranks or not all(
            np.array_equal(np.bincount(row, minlength=ranks), np.full(ranks, experts // ranks))
            for row in np.clip(self.rank, 0, ranks)
        ):
            raise ValueError(f"rank does not put {experts} / {ranks} experts on each of {ranks} ranks")
        if (np.diff(self.tokens) <= 0).any():
            raise ValueError("tokens must rise")
        for name in ("share", "prior"):
            if not np.allclose(getattr(self, name).sum(-1, dtype=np.float64), 1, atol=0.01):
                raise ValueError(f"{name} has rows that do not sum to 1")
        if tuple(report.layer for report in self.layers) != self.identity.layers:
            raise ValueError(f"reports are of layers {[report.layer for report in self.layers]}, not of the model's")

    @property
    def ranks(self) -> int:
        """R."""
        return int(self.prior.shape[-1]) if self.prior.ndim and self.prior.shape[-1] else 1

    @property
    def order(self) -> NDArray[np.int64]:
        """`[L, E]` the experts in the order in which they lie: rank by rank, by number on each."""
        return np.argsort(self.rank, axis=1, kind="stable")

    @property
    def digest(self) -> str:
        """SHA-256 of all that ranks have to agree on."""
        found = hashlib.sha256(str(self.identity).encode())
        for array in self._arrays.values():
            found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def shares(self, layer: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """`[n, R]` what share of each id's experts is expected on each rank.

        Args:
            layer: Its place in `identity.layers`.
            ids: `[n]` any token ids.
        """
        if not len(self.tokens):
            return np.repeat(self.prior[layer][None], len(ids), 0)
        row = np.minimum(np.searchsorted(self.tokens, ids), len(self.tokens) - 1)
        known = (self.tokens[row] == ids)[:, None]
        return np.where(known, self.share[layer, row].astype(np.float32), self.prior[layer])

    def lookback(self, layer: int) -> Lookback:
        """What the ranks of a token's last two layers add."""
        return Lookback(self.ratio[layer], float(self.weight[layer]))

    def refuse_other(self, identity: Identity, ranks: int) -> None:
        """Raises unless the plan is for this model on as many ranks.

        Raises:
            ValueError: It is not; the message names both.
        """
        self.identity.refuse_other(identity, "the plan")
        if self.ranks != ranks:
            raise ValueError(f"the plan is for {self.ranks} ranks, not for {ranks}: make one with --ranks {ranks}")

    def save(self, path: str | Path) -> None:
        """Writes the plan as safetensors."""
        header = {"identity": self.identity.as_json(), "layers": [asdict(report) for report in self.layers]}
        write(path, "plan", header, self._arrays)

    @property
    def _arrays(self) -> Mapping[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in ("rank", "tokens", "share", "prior", "ratio", "weight")}

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote.

        Raises:
            OSError: The file is not there.
            ValueError: It is not a plan, or a damaged one.
        """
        header, arrays = read(path, "plan")
        try:
            reports = tuple(_report(entry) for entry in header["layers"])
            return cls(Identity.from_json(header.get("identity")), **arrays, layers=reports)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged plan: {error}") from error


def _report(entry: Any) -> LayerReport:
    report = LayerReport(**entry)
    for field in fields(report):
        value = getattr(report, field.name)
        if not (isinstance(value, int | float) or (value is None and "None" in str(field.type))):
            raise ValueError(f"a layer's {field.name} is {value!r}")
    return report
