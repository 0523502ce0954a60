"""The section `"runahead"` of SGLang's configuration: how a pass is shared, and how long a neighbour may be silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Link
from forerun.runahead.probe import probe
from forerun.runahead.shape import Shape
from forerun.runahead.shares import Chooser, FixedShares, SearchedShares, TableShares
from forerun.runahead.table import Table

__all__ = ["Settings", "read"]

_KNOWN = {"table", "split", "least", "flops", "bandwidth", "latency", "slack", "timeout"}
_TIMEOUT = 300.0


@dataclass(frozen=True)
class Settings:
    """As `read` gives them.

    Args:
        table: Splits found before.
        split: The same shares for every pass.
        least: With `split`: tokens of the shortest pass that is split.
        flops: Of a rank, a second; None: measured, with attention apart.
        link: Between two ranks; None: measured, or infinite where `flops` is given.
        slack: A pass is split if that is sooner by more than this share.
        timeout: Seconds.
    """

    table: Table | None = None
    split: tuple[float, ...] | None = None
    least: int = 2
    flops: float | None = None
    link: Link | None = None
    slack: float = 0.01
    timeout: float = _TIMEOUT

    def check(self, ranks: int) -> None:
        """Returns if the settings are for so many ranks.

        Raises:
            ValueError: They are for another number.
        """
        given = self.table.engines if self.table else len(self.split) if self.split else ranks
        if given != ranks:
            raise ValueError(f"the split is for {given} ranks; the server runs with --attn-cp-size {ranks}")

    def chooser(self, ranks: int, config: Mapping[str, Any], device: str, dtype: torch.dtype, group: Any) -> Chooser:
        """How passes are shared by the ranks of a group, of a model with this `config.json`.

        Where the split is searched and `flops` is not given, the ranks measure together.
        """
        if self.split:
            return FixedShares(self.split, self.least)
        if self.table:
            return TableShares(self.table, ranks)
        shape = Shape.from_config({**config, "dtype": str(dtype).removeprefix("torch.")})
        if self.flops is None:
            chain = probe(shape, group, torch.device(device), dtype, link=self.link)
        else:
            link = self.link or Link(math.inf)
            chain = Chain(shape.cost(self.flops), link, shape.layers, shape.kv_bytes, shape.before)
        return SearchedShares(chain, ranks, self.slack)


def read(section: Mapping[str, Any]) -> Settings:
    """Reads the section.

    Raises:
        OSError: The table cannot be read.
        ValueError: Something in it has no meaning.
    """
    if unknown := sorted(set(section) - _KNOWN):
        raise ValueError(f"section 'runahead' has {unknown}; expected {', '.join(sorted(_KNOWN))}")
    if "table" in section and "split" in section:
        raise ValueError("section 'runahead' has a table and a split; expected at most one of them")
    numbers = {name: section[name] for name in _KNOWN - {"table", "split"} if name in section}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name} is {value!r}; expected a number, 0 or more")
    split = section.get("split")
    if split is not None:
        if (
            not isinstance(split, list)
            or len(split) < 2
            or not all(isinstance(share, int | float) and share > 0 for share in split)
        ):
            raise ValueError(f"split is {split!r}; expected two or more numbers above 0, one for each rank")
        split = tuple(share / sum(split) for share in split)
    return Settings(
        table=Table.load(section["table"]) if "table" in section else None,
        split=split,
        least=max(2, int(numbers.get("least", 2))),
        flops=float(numbers["flops"]) if "flops" in numbers else None,
        link=Link(numbers["bandwidth"], float(numbers.get("latency", 0))) if "bandwidth" in numbers else None,
        slack=float(numbers.get("slack", 0.01)),
        timeout=float(numbers.get("timeout", _TIMEOUT)),
    )
