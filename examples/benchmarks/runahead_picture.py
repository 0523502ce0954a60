"""The benchmark's picture: seconds to the first token by prompt length, and how often one engine's they fit into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw"]

_WAYS = ("one engine", "TP=2", "PP=2", "even", "searched", "interpolated", "two engines")


def draw(parts: dict[str, Any], path: Path) -> None:
    """A panel of speed-ups over one engine for each part that has measured ones."""
    shown = [part for part in parts if part != "more"]
    figure = Figure(figsize=(5.2 * len(shown), 4.2), layout="constrained")
    for number, part in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), number, xlabel="prompt (tokens)", title=part)
        rows = parts[part]["rows"]
        single = {row["tokens"]: row["seconds"] for row in rows if row["way"] == "one engine"}
        for way in _WAYS[1:]:
            found = sorted((row["tokens"], single[row["tokens"]] / row["seconds"]) for row in rows if row["way"] == way)
            if found:
                axes.plot(*zip(*found, strict=True), "o-", label=way)
        reduces = {row["tokens"]: row["seconds"] for row in rows if row["way"] == "all-reduces of TP=2"}
        if reduces:
            found = sorted((n, single[n] / (single[n] / 2 + seconds)) for n, seconds in reduces.items())
            axes.plot(*zip(*found, strict=True), "x--", label="half of one engine + TP=2's all-reduces")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.axhline(2, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_ylabel("times sooner than one engine")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
