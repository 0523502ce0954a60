"""Tables and the picture of the benchmark of Picard Consistency Models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pcm_quality
import pcm_rounds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

__all__ = ["comparison_table", "draw", "quality_table", "rounds_table"]

_COLOURS = {
    "plain": "tab:gray",
    "accelerated": "tab:blue",
    "PCM": "tab:orange",
    "PCM + acceleration": "tab:red",
    "slope only": "tab:green",
    "slope only + acceleration": "tab:olive",
    "accelerated, fitted": "tab:purple",
}
_TOLD = (1, 2, 3, 4, 6, 8, 12)  # sweeps in the table


def rounds_table(rows: Sequence[pcm_rounds.Row]) -> Table:
    made = _table("case", "stops at", "way", numbers=("rounds", "guided", "evaluations", "ms", "error (largest)"))
    for row in rows:
        made.add_row(
            f"{row.case} N={row.steps}",
            row.rule,
            row.way,
            f"{row.rounds:.1f}",
            f"{row.guided_rounds:.1f}",
            f"{row.evaluations:.0f}",
            f"{row.seconds * 1e3:.0f}",
            f"{row.error:.1e} ({row.largest_error:.1e})",
            end_section=row.way == ("accelerated, fitted" if row.case == "arm" else "slope only + acceleration"),
        )
    return made


def quality_table(rows: Sequence[pcm_quality.Row], unit: str) -> Table:
    """`unit` ("distance" or "error") after so many sweeps."""
    found = {(row.case, row.steps, row.way, row.sweeps): getattr(row, unit) for row in rows}
    told = [k for k in _TOLD if any(row.sweeps == k and row.way != "sequential" for row in rows)]
    made = _table("case", f"way: {unit} after sweeps", numbers=[*map(str, told), "all N"])
    for case, steps, way in dict.fromkeys(key[:3] for key in found):
        values = [found.get((case, steps, way, k)) if way != "sequential" else None for k in told]
        values.append(found[case, steps, way, steps] if way == "sequential" else None)
        if any(value is not None for value in values):
            made.add_row(f"{case} N={steps}", way, *("" if value is None else f"{value:.3g}" for value in values))
    return made


def comparison_table(entries: Sequence[dict[str, Any]]) -> Table:
    """How many times less ours takes, or is off; losing rows (below 1) as the others."""
    units = list(dict.fromkeys(it["unit"] for it in entries))
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for it in entries:
        found.setdefault((it["name"].removesuffix(f" {it['unit']}"), it["peer_name"]), {})[it["unit"]] = it
    made = _table("ours", "against", numbers=[*units, "to reach"])
    for (name, peer), by_unit in found.items():
        ratios = [by_unit[unit]["ratio"] if unit in by_unit else None for unit in units]
        bounds = {it["bound"] for it in by_unit.values()} - {None}
        made.add_row(name, peer, *("" if it is None else f"{it:.2f}x" for it in (*ratios, *bounds)))
    return made


def draw(rounds: Sequence[pcm_rounds.Row], quality: Sequence[pcm_quality.Row], path: Path) -> None:
    """Rounds of every case above; below, quality and error against the number of sweeps."""
    cases = list(dict.fromkeys((row.case, row.steps) for row in rounds))
    ends = list(dict.fromkeys((row.case, row.steps) for row in quality))
    pictures = list(dict.fromkeys((row.case, row.steps) for row in quality if row.distance is not None))
    across = max(len(cases), len(pictures) + len(ends), 1)
    figure = Figure(figsize=(4.6 * across, 8.4), layout="constrained")
    above, below = figure.subplots(2, across, squeeze=False)
    for axes, it in zip(above, cases, strict=False):
        _bars(axes, [row for row in rounds if (row.case, row.steps) == it])
    panels = [(it, "distance") for it in pictures] + [(it, "error") for it in ends]
    for axes, (it, unit) in zip(below, panels, strict=False):
        _lines(axes, [row for row in quality if (row.case, row.steps) == it], unit)
    for axes in (*above[len(cases) :], *below[len(panels) :]):
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, rows: list[pcm_rounds.Row]) -> None:
    rules = list(dict.fromkeys(row.rule for row in rows))
    ways = {way: colour for way, colour in _COLOURS.items() if any(row.way == way for row in rows)}
    width = 0.9 / len(ways)
    for index, (way, colour) in enumerate(ways.items()):
        values = [row.rounds for row in rows if row.way == way]
        places = [place + (index - (len(ways) - 1) / 2) * width for place in range(len(rules))]
        bars = axes.bar(places, values, width, color=colour, label=way)
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.set_xticks(range(len(rules)), rules, fontsize=8)
    first = rows[0]
    axes.set(title=f"{first.case} N={first.steps} (sequential: {first.steps})", xlabel="stops at", ylabel="rounds")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
    axes.legend(fontsize=6, ncols=2, loc="upper center")


def _lines(axes: Axes, rows: list[pcm_quality.Row], unit: str) -> None:
    for way, colour in _COLOURS.items():
        line = [row for row in rows if row.way == way]
        if line:
            values = [getattr(row, unit) for row in line]
            style = ":" if way.endswith("acceleration") else "-"
            axes.semilogy([row.sweeps for row in line], values, style, marker=".", color=colour, label=way)
    sequential = next(row for row in rows if row.way == "sequential")
    if unit == "distance":
        axes.axhline(sequential.distance, color="black", linestyle="--", linewidth=1, label="sequential")
    said = {"distance": "Fréchet distance to real digits", "error": "relative error to sequential"}[unit]
    axes.set(title=f"{sequential.case} N={sequential.steps}, ended early", xlabel="sweeps", ylabel=said)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=7)


def _table(*names: str, numbers: Sequence[str]) -> Table:
    made = Table(*names)
    for name in numbers:
        made.add_column(name, justify="right")
    return made
