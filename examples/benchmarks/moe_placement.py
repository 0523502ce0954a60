"""Experts placed by real routing tables: locality, both loads, another text, and what balance costs.

On another text a plan is tried as it is, and one made anew from a hundredth of that text's pairs on all the others.

Peers: experts in their order (stock expert parallelism), and experts packed by load alone, as EPLB does without copies.
All have the best homes found for their placement, tokens' load at most 1.1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measurement import comparison
from numpy.typing import NDArray
from rich.progress import track

from forerun.moe.balance import balance
from forerun.moe.grouping import Grouping, contiguous, group
from forerun.moe.homes import homes
from forerun.moe.identity import Identity
from forerun.moe.predict import calibration, fit
from forerun.moe.profile import Paths, Profile, Table
from forerun.moe.task import Limits, Rating, Task, nearness

__all__ = ["curves", "draw", "measured", "rows"]

LAYERS = (0, 7, 15)
MODELS = {"olmoe-1b-7b": (64, 8), "mixtral-8x7b": (8, 2)}
CASES = (("olmoe-1b-7b", 4), ("olmoe-1b-7b", 8), ("mixtral-8x7b", 4), ("mixtral-8x7b", 2))
COUNTED = 0.01  # of another text's pairs, before a plan is made anew
EXPERT_LIMITS = (1.02, 1.05, 1.1, 1.15, 1.25, 1.5, 2.0)


def tables(model: str, domain: str) -> Profile:
    """The counts of a model on a text.

    Raises:
        SystemExit: FORERUN_ROUTING_DATA is not set.
    """
    folder = os.environ.get("FORERUN_ROUTING_DATA")
    if not folder:
        raise SystemExit("FORERUN_ROUTING_DATA does not name the folder of the routing tables")
    with np.load(Path(folder) / f"{model}.{domain}.npz") as file:
        columns = [file[name] for name in ("layer", "token", "expert", "count")]
    experts, top_k = MODELS[model]
    return Profile.from_counts(Identity(model, LAYERS, experts, top_k), *columns)


def measured(effort: int) -> list[dict[str, Any]]:
    """Every case and layer: ours and the peers on the text they were made from, ours on another text."""
    found = []
    for model, ranks in track(CASES, description="placements"):
        wikipedia, book = tables(model, "wikipedia"), tables(model, "book")
        counted, rest = _split(book, COUNTED)
        for place, layer in enumerate(LAYERS):
            table, other = wikipedia.table(place), book.table(place)
            task = Task(table.counts, nearness(ranks), wikipedia.identity.top_k)
            test = Task(other.counts, nearness(ranks), wikipedia.identity.top_k)
            start = time.perf_counter()
            ours = group(task, effort=effort)
            seconds = time.perf_counter() - start
            packed = np.empty(task.experts, np.int64)
            packed[balance(task.load, ranks, task.experts // ranks).expert] = np.arange(ranks)[:, None]
            share, home = _expected(table, other, test, ours)
            seen = np.isin(other.tokens, table.tokens)
            local = other.counts[np.arange(len(home))[:, None], _members(ours, home)].sum(1)
            found.append(
                {
                    "model": model,
                    "ranks": ranks,
                    "layer": layer,
                    "effort": effort,
                    "seconds": seconds,
                    "exact": ours.exact,
                    "ours": _figures(ours.rating),
                    "in order": _figures(task.rate(contiguous(task.experts, ranks))),
                    "by load": _figures(task.rate(packed)),
                    "book, predicted": _figures(test.rate_with(ours.rank, home)),
                    "book, planned anew": _anew(counted.table(place), rest.table(place), task, effort),
                    "book, its own homes": _figures(test.rate(ours.rank)),
                    "book, in order": _figures(test.rate(contiguous(task.experts, ranks))),
                    "book, share of ids not seen": float(test.occurrences[~seen].sum() / test.occurrences.sum()),
                    "calibration": calibration(share[np.arange(len(home)), home], local, other.counts.sum(1)).error,
                }
            )
    return found


def curves(effort: int) -> list[dict[str, Any]]:
    """OLMoE on 4 ranks: the best placement for each limit of the experts' load; a tighter one's counts for a looser."""
    found = []
    profile = tables("olmoe-1b-7b", "wikipedia")
    for place, layer in enumerate(LAYERS):
        best: Grouping | None = None
        for limit in track(EXPERT_LIMITS, description=f"trade-off, layer {layer}"):
            task = Task(profile.table(place).counts, nearness(4), 8, Limits(experts=limit))
            trial = group(task, effort=effort)
            if best is None or not best.within_limits or trial.rating.local > best.rating.local:
                best = trial
            found.append({"layer": layer, "limit": limit, **_figures(best.rating)})
    return found


def rows(placements: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons of the share of pairs that leave their rank."""
    return [
        comparison(
            f"{row['model']} layer {row['layer']} on {row['ranks']} ranks, pairs that leave their rank",
            "share",
            1 - row["ours"]["local"],
            1 - row[peer]["local"],
            name,
            1 - row["ours"]["local"] if row["exact"] else None,
        )
        for row in placements
        for peer, name in (("in order", "experts in order"), ("by load", "experts packed by load"))
    ]


def draw(placements: Sequence[dict[str, Any]], trade: Sequence[dict[str, Any]], path: Path) -> None:
    """Locality against the experts' load on 4 ranks, a panel a layer, with both peers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(LAYERS), sharey=True), LAYERS, strict=True):
        line = [point for point in trade if point["layer"] == layer]
        axes.plot([p["experts"] for p in line], [p["local"] for p in line], "o-", label="forerun, by limit")
        (row,) = (row for row in placements if (row["model"], row["ranks"], row["layer"]) == ("olmoe-1b-7b", 4, layer))
        for name, marker, colour in (("ours", "*", "C3"), ("in order", "^", "C7"), ("by load", "s", "C8")):
            label = "forerun, limit 1.25, searched longer" if name == "ours" else f"experts {name}"
            axes.plot(row[name]["experts"], row[name]["local"], marker, color=colour, label=label, markersize=9)
        axes.axhline(0.25, color="black", linewidth=1, linestyle=":", label="random homes")
        axes.set(title=f"layer {layer}", xlabel="experts' load, max/mean over 4 ranks")
        axes.grid(visible=True, alpha=0.3)
        if layer == LAYERS[0]:
            axes.set(ylabel="local activation rate")
            axes.legend(fontsize=7)
    figure.suptitle("OLMoE-1B-7B on Wikipedia text, tokens' load at most 1.1", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _split(profile: Profile, share: float) -> tuple[Profile, ...]:
    """A profile of about that share of all pairs, drawn at random, and one of the others."""
    drawn = np.random.default_rng(0).binomial(profile.counts, share)
    none = Paths(*(part[:0] for part in profile.paths))
    return tuple(
        Profile(profile.identity, profile.keys[count > 0], count[count > 0], none)
        for count in (drawn, profile.counts - drawn)
    )


def _anew(counted: Table, rest: Table, task: Task, effort: int) -> dict[str, float]:
    """What a plan made from a few pairs of a text is worth on the others."""
    ours = group(replace(task, counts=counted.counts), effort=effort)
    test = replace(task, counts=rest.counts)
    _, home = _expected(counted, rest, test, ours)
    return _figures(test.rate_with(ours.rank, home))


def _expected(table: Table, other: Table, test: Task, ours: Grouping) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`[N, R]` the shares that one table expects of another's ids on each rank, and their homes `[N]`."""
    share = fit(table).shares(other.tokens) @ np.eye(test.ranks, dtype=np.float32)[ours.rank]
    home, _ = homes(share.T * test.occurrences, test.occurrences, test.token_limit)
    return share, home


def _members(found: Grouping, home: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[N, E/R]` the experts on each token's home."""
    ranks = int(found.rank.max()) + 1
    return np.argsort(found.rank, kind="stable").reshape(ranks, -1)[home]


def _figures(rating: Rating) -> dict[str, float]:
    return {"local": rating.local, "experts": rating.experts, "tokens": rating.tokens}
