"""The README's measured table says what the committed benchmark says."""

from __future__ import annotations

import json
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_WAYS = ("sequential", "plain", "accelerated", "ParaDiGMS 0.001")


def picard_table() -> list[str]:
    """The table's rows, from `examples/benchmarks/results/picard.json`."""
    measured = json.loads((_ROOT / "examples" / "benchmarks" / "results" / "picard.json").read_text())["measured"]
    rows = []
    for steps in sorted({row["steps"] for row in measured}):
        cells = {row["way"]: row for row in measured if (row["scheduler"], row["steps"]) == ("DDIMScheduler", steps)}
        figures = [
            f"{cells[way]['rounds']:.1f} / {cells[way]['evaluations']:.0f} / {cells[way]['seconds']:.2f} s"
            for way in _WAYS
        ]
        rows.append(f"| {steps} | {' | '.join(figures)} | {cells['accelerated']['error']:.1e} |")
    return rows


def test_the_measured_table_is_the_benchmarks() -> None:
    readme = (_ROOT / "README.md").read_text()
    for row in picard_table():
        assert row in readme
