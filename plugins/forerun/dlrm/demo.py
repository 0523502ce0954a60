"""DLRMPlanner beside torchrec's planner: what `examples/plan_dlrm.py` wrote, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.report import Picture, Section, Table

__all__ = ["SCRIPT", "section"]

SCRIPT = "plan_dlrm.py"  # of the examples

_TEXT = """\
The 26 embedding tables of MLPerf's DLRMv2, planned for 8 to 128 GPUs of 80 GB, 8 of them on a host: by torchrec's \
EmbeddingShardingPlanner, and by DLRMPlanner in its place, from the same arguments.

The rating is torchrec's own: the largest sum of estimated costs of a rank, in milliseconds. The bound is \
DLRMPlanner's: no plan rates less under the same estimates. The gap says by how much of the bound a plan may be above \
the best one; at 0 there is no better one. All are estimates: no training was run, and no table has memory here. \
Seconds are of the whole plan() on this machine."""


def section(out: Path) -> Section:
    """The room's section of the demo's page, of what the script wrote into a folder."""
    rows: list[dict[str, Any]] = json.loads((out / "dlrm.json").read_text())
    table = Table(
        "MLPerf DLRMv2, global batch 65536",
        ("ranks", "planner", "rating (ms)", "bound (ms)", "gap", "seconds"),
        [
            (
                str(row["ranks"]),
                row["planner"],
                f"{row['rating']:.4f}",
                f"{row['bound']:.4f}",
                f"{row['gap']:.2%}",
                f"{row['seconds']:.2f}",
            )
            for row in rows
        ],
    )
    loads = Picture("What each rank is given, by either planner; dashed, the bound.", (out / "loads.png").read_bytes())
    return Section("dlrm: sharding plans with a proven gap", _TEXT, [table], [loads])
