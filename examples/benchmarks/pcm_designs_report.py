"""The best of all designs of the arm's PCM, their table and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measurement import comparison
from pcm_designs_rounds import PAPER, Point, Reference
from rich.table import Table

__all__ = ["draw", "reached", "table"]

_Row = TypeVar("_Row", Point, Reference)

_GAINS = {"sequential": 2.71, "plain": 1.77}  # the paper's, by the peer
_PEERS = {
    "plain": ("sequential", "plain", "plain, fitted", "slope only", "its own start"),
    "accelerated": ("sequential", "accelerated", "slope only + acceleration", "its own start"),
}
_LINES = {
    "plain": {"plain": "black", "plain, fitted": "tab:purple", "slope only": "tab:green"},
    "accelerated": {
        "accelerated": "black",
        "accelerated, fitted": "tab:purple",
        "slope only + acceleration": "tab:green",
    },
}
_SAID = {"plain": "plain iteration + PCM", "accelerated": "default acceleration + PCM"}


def reached(points: Sequence[Point], references: Sequence[Reference]) -> list[dict[str, Any]]:
    """For each N and moments the lowest point of all curves, once trained, against the paper's gains and no training.

    "its own start" is the same design, under the same switch, before its training: what it gains over that is the
    training's, the rest its slope's.
    """
    entries = []
    for steps, moments in sorted({(point.steps, point.moments) for point in points}):
        peers = {row.way: row.rounds for row in _under(references, steps, moments)}
        trained = [point for point in _under(points, steps, moments) if point.turn]
        for way, against in _PEERS.items():
            best = min(trained, key=lambda point: getattr(point, way))
            design = f"{best.design} {best.switch} at turn {best.turn}"
            start = [point for point in _under(points, steps, moments) if point[:3] == best[:3] and point.turn == 0]
            known = peers | ({"its own start": getattr(start[0], way)} if start else {})
            name = f"arm N={steps}, {moments} moments, {PAPER}, {_SAID[way]}, {design}"
            for peer in against:
                if peer in known:
                    bound = _GAINS.get(peer) if way == "plain" else None
                    entries.append(comparison(name, "rounds", getattr(best, way), known[peer], peer, bound))
    return entries


def table(points: Sequence[Point], references: Sequence[Reference]) -> Table:
    """References, then every design where its training ended, by every rule."""
    made = Table("N", "moments", "stops at", "design", "switch")
    for name in ("turns", "s", "plain", "default"):
        made.add_column(name, justify="right")
    for row in references:
        made.add_row(str(row.steps), row.moments, row.rule, row.way, "", "", "", f"{row.rounds:.2f}", "")
    last = {(point.design, point.switch, point.moments, point.rule): point for point in points}
    for point in last.values():
        told = (str(point.steps), point.moments, point.rule, point.design, point.switch, str(point.turn))
        made.add_row(*told, f"{point.seconds:.0f}", f"{point.plain:.2f}", f"{point.accelerated:.2f}")
    return made


def draw(points: Sequence[Point], references: Sequence[Reference], path: Path) -> None:
    """Rounds over the training, a column for each N; plain iteration above, the default acceleration below."""
    every = sorted({point.steps for point in points})
    figure = Figure(figsize=(6.6 * max(len(every), 1), 11), layout="constrained")
    panels = figure.subplots(2, max(len(every), 1), squeeze=False)
    for column, steps in enumerate(every):
        mine = _under(points, steps, "any")
        known = {row.way: row.rounds for row in _under(references, steps, "any")}
        for axes, way in zip(panels[:, column], _SAID, strict=True):
            _curves(axes, mine, way)
            _levels(axes, known, way)
            axes.set(title=f"arm N={steps}, any moment, {_SAID[way]}", xlabel="minutes of training, one core")
            shown = [getattr(point, way) for point in mine] + [known[name] for name in _LINES[way] if name in known]
            axes.set_ylim(min(shown) - 0.3, max(shown) + 0.3)  # a target above what plain iteration takes is not shown
            axes.set_ylabel("rounds until the papers' rule")
            axes.grid(visible=True, alpha=0.3)
        panels[0, column].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1), handlelength=4)
        panels[1, column].legend(*_levels_only(panels[1, column]), fontsize=7)
    figure.savefig(path, dpi=110)


def _curves(axes: Axes, points: Sequence[Point], way: str) -> None:
    designs = list(dict.fromkeys(point.design for point in points))
    for design, switch in dict.fromkeys((point.design, point.switch) for point in points):
        line = [point for point in points if (point.design, point.switch) == (design, switch)]
        axes.plot(
            [point.seconds / 60 for point in line],
            [getattr(point, way) for point in line],
            "-" if switch == "trained" else "--",
            marker=".",
            color=colormaps["tab10"](designs.index(design) % 10),
            label=design if switch == "trained" else f"{design}, {switch}",
        )


def _levels(axes: Axes, known: dict[str, float], way: str) -> None:
    for name, colour in _LINES[way].items():
        if name in known:
            axes.axhline(known[name], color=colour, linestyle=":", label=f"{name}: {known[name]:.2f}")
    for peer, gain in _GAINS.items() if way == "plain" else ():
        if peer in known:
            level = known[peer] / gain
            axes.axhline(level, color="tab:red", linestyle="-.", label=f"target, {peer} / {gain}: {level:.2f}")


def _under(rows: Sequence[_Row], steps: int, moments: str) -> list[_Row]:
    """Those by the papers' rule."""
    return [row for row in rows if (row.steps, row.moments, row.rule) == (steps, moments, PAPER)]


def _levels_only(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    kept = [(handle, label) for handle, label in zip(handles, labels, strict=True) if ":" in label]
    return [handle for handle, _ in kept], [label for _, label in kept]
