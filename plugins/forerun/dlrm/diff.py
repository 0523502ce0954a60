"""What changes from one plan to another, and how many bytes must move."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from forerun.dlrm.report import Report, Sharding

__all__ = ["Difference", "difference"]

_LISTED = 8  # ranks named in a cell
_GB = 1024**3


@dataclass(frozen=True)
class Difference:
    """What changes from one plan to another."""

    rating: tuple[float, float]  # before, after (ms)
    changed: tuple[tuple[Sharding | None, Sharding | None], ...]  # tables sharded or placed otherwise; None: not there
    arriving: tuple[int, ...]  # bytes of each rank that it takes and did not hold

    @property
    def bytes_moved(self) -> int:
        """In all."""
        return sum(self.arriving)

    def explain(self) -> RenderableType:
        """A summary and a row per changed table, for `rich.print`."""
        before, after = self.rating
        text = (
            f"rating {before:.4f} -> {after:.4f} ms; {len(self.changed)} tables change, "
            f"{self.bytes_moved / _GB:.2f} GB move, {max(self.arriving, default=0) / _GB:.2f} GB of them to one rank"
        )
        rows = Table("table", "before", "after")
        for old, new in self.changed:
            rows.add_row(named.table if (named := new or old) else "", _text(old), _text(new))
        return Group(text, rows)


def difference(before: Report, after: Report) -> Difference:
    """What changes from one report's plan to another's.

    A rank keeps the part of a table that it holds already; the rest of its new shard arrives, with its share of the
    shard's memory (optimizer states and buffers are in it). Under another kernel all of it arrives: it lies in another
    kind of memory.
    """
    old, new = ({t.table: t for t in report.tables} for report in (before, after))
    arriving = [0.0] * max(len(before.capacity), len(after.capacity))
    changed = []
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name), new.get(name)
        if _placed(a) == _placed(b):
            continue
        changed.append((a, b))
        if b is not None:
            held = a if a is not None and a.compute_kernel == b.compute_kernel else None
            for rank, part, sizes in zip(b.ranks, b.parts, b.memory, strict=True):
                arriving[rank] += sum(sizes) * (1 - _held(held, rank, part))
    return Difference((before.rating, after.rating), tuple(changed), tuple(round(size) for size in arriving))


def _held(table: Sharding | None, rank: int, part: tuple[int, ...]) -> float:
    """The share of a part of the table that the rank holds: its shards there do not overlap."""
    area = part[2] * part[3]
    if table is None or not area:
        return 0.0
    return sum(_overlap(own, part) for own, r in zip(table.parts, table.ranks, strict=True) if r == rank) / area


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    rows = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    columns = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(rows, 0) * max(columns, 0)


def _placed(table: Sharding | None) -> tuple[object, ...]:
    return () if table is None else (table.sharding_type, table.compute_kernel, table.parts, table.ranks)


def _text(table: Sharding | None) -> str:
    if table is None:
        return "-"
    ranks = sorted(set(table.ranks))
    where = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > _LISTED else f"rank {', '.join(map(str, ranks))}"
    return f"{table.sharding_type}, {table.compute_kernel}, {where}"
