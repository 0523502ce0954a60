"""What a plan puts where, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from forerun.files import write_whole

__all__ = ["Report", "Sharding"]

_LISTED = 8  # tables named in a cell or drawn in a colour of their own
_GB = 1024**3


@dataclass(frozen=True)
class Sharding:
    """How one table is sharded."""

    table: str  # with the path of its module
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]  # of each shard
    parts: tuple[tuple[int, ...], ...]  # of the table that each shard is: first row, first column, rows, columns
    cost: tuple[float, ...]  # ms of each shard
    memory: tuple[tuple[int, ...], ...]  # bytes of each shard, in each tier


@dataclass(frozen=True)
class Report:
    """A plan and what is known of it.

    `gap` says by what share of the bound the rating may be above the best possible one: 0 where no plan is better.
    """

    rating: float  # ms, of the performance model: by default the largest sum of costs of a rank
    bound: float | None  # no plan's rating is lower (ms); None where none was sought
    seconds: float  # from the call of `plan` to the report
    enumeration_seconds: float  # of them, those that listed and estimated the options
    search: str  # who found the plan
    objective: str  # what it is rated by: "torchrec", or "corrected"
    tables: tuple[Sharding, ...]
    tiers: tuple[str, ...]  # names of the kinds of memory
    capacity: tuple[tuple[int, ...], ...]  # bytes of each rank that embeddings may take, in each tier

    @property
    def gap(self) -> float | None:
        """By what share of the bound the rating may be above the best possible one; None without a bound."""
        if self.bound is None:
            return None
        return self.rating / self.bound - 1 if self.bound > 0 else 0.0

    @cached_property
    def rank_cost(self) -> tuple[float, ...]:
        """Sum of costs of each rank (ms)."""
        cost = [0.0] * len(self.capacity)
        for table in self.tables:
            for rank, value in zip(table.ranks, table.cost, strict=True):
                cost[rank] += value
        return tuple(cost)

    @cached_property
    def rank_memory(self) -> tuple[tuple[int, ...], ...]:
        """Bytes that each rank takes, in each tier."""
        memory = [[0] * len(self.tiers) for _ in self.capacity]
        for table in self.tables:
            for rank, sizes in zip(table.ranks, table.memory, strict=True):
                memory[rank] = [a + b for a, b in zip(memory[rank], sizes, strict=True)]
        return tuple(tuple(sizes) for sizes in memory)

    @property
    def binds(self) -> str:
        """Why the rating is not lower, as far as that can be told."""
        if not any(self.rank_cost):
            return "nothing: no table costs anything"
        slowest = max(range(len(self.capacity)), key=self.rank_cost.__getitem__)
        load = self.rank_cost[slowest]
        largest = max(((c, t) for t in self.tables for c in t.cost), key=lambda pair: pair[0], default=None)
        if largest and largest[0] >= 0.99 * load:
            what = f"{largest[1].table} ({largest[1].sharding_type}, {largest[0]:.4g} ms)"
            return f"one shard: {what} is all of rank {slowest}"
        mean = sum(self.rank_cost) / len(self.rank_cost)
        if load <= 1.02 * mean:
            return f"the work itself: all ranks have {mean:.4g} ms, within {abs(load / mean - 1):.1%}"
        full = [
            (used / room, rank, tier)
            for rank, (memory, capacity) in enumerate(zip(self.rank_memory, self.capacity, strict=True))
            for used, room, tier in zip(memory, capacity, self.tiers, strict=True)
            if room > 0
        ]
        share, rank, tier = max(full, default=(0.0, 0, ""))
        if share >= 0.95:
            return f"memory: {tier} of rank {rank} is {share:.1%} full"
        return f"placement: rank {slowest} has {load:.4g} ms, the mean is {mean:.4g} ms"

    def explain(self) -> RenderableType:
        """A summary and a row per rank, for `rich.print`."""
        bound = "no bound" if self.bound is None else f"no plan below {self.bound:.4f} ms (gap {self.gap:.2%})"
        corrected = "" if self.objective == "torchrec" else f" ({self.objective})"
        text = (
            f"rating {self.rating:.4f} ms{corrected}, {bound}; {self.seconds:.1f} s, of them "
            f"{self.enumeration_seconds:.1f} s to list the options; found by {self.search}\nbinds: {self.binds}"
        )
        used = [n for n in range(len(self.tiers)) if any(memory[n] for memory in self.rank_memory)]
        rows = Table("rank", "ms", *(f"{self.tiers[n]} GB (of)" for n in used), "shards", "largest (ms)")
        for rank, (cost, memory, room) in enumerate(zip(self.rank_cost, self.rank_memory, self.capacity, strict=True)):
            here = sorted(self._on(rank), key=lambda pair: (-pair[1], pair[0]))
            named = ", ".join(f"{name} {value:.3g}" for name, value in here[:3])
            sizes = (f"{m / _GB:.2f} ({c / _GB:.2f})" for m, c in ((memory[n], room[n]) for n in used))
            rows.add_row(str(rank), f"{cost:.4f}", *sizes, str(len(here)), named + (", …" if len(here) > 3 else ""))
        return Group(text, rows)

    def figure(self) -> Any:
        """A `matplotlib.figure.Figure`: each rank's cost, stacked by table.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("pictures need matplotlib: pip install matplotlib") from error
        ranks = range(len(self.capacity))
        largest = sorted(self.tables, key=lambda t: -max(t.cost, default=0.0))
        stacks = [(f"{t.table} ({t.sharding_type})", _per_rank([t], len(ranks))) for t in largest[:_LISTED]]
        if rest := largest[_LISTED:]:
            stacks.append((f"{len(rest)} other tables", _per_rank(rest, len(ranks))))
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="rank", ylabel="ms", title=f"rating {self.rating:.4f} ms")
        bottom = [0.0] * len(ranks)
        for label, heights in stacks:
            axes.bar(ranks, heights, bottom=bottom, label=label)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        if self.bound is not None:
            axes.axhline(self.bound, color="grey", linestyle="--", linewidth=1, label="lower bound")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        write_whole(Path(path), (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is not a report.
        """
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text())
            tables = tuple(
                Sharding(
                    t["table"],
                    t["sharding_type"],
                    t["compute_kernel"],
                    tuple(t["ranks"]),
                    _pairs(t["parts"]),
                    tuple(t["cost"]),
                    _pairs(t["memory"]),
                )
                for t in fields["tables"]
            )
            capacity = _pairs(fields["capacity"])
            return cls(**{**fields, "tables": tables, "tiers": tuple(fields["tiers"]), "capacity": capacity})
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a report written by planner.report.save(...): {error}") from error

    def _on(self, rank: int) -> list[tuple[str, float]]:
        return [(t.table, cost) for t in self.tables for r, cost in zip(t.ranks, t.cost, strict=True) if r == rank]


def _per_rank(tables: Iterable[Sharding], ranks: int) -> list[float]:
    heights = [0.0] * ranks
    for table in tables:
        for rank, cost in zip(table.ranks, table.cost, strict=True):
            heights[rank] += cost
    return heights


def _pairs(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)
