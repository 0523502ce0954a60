"""torchrec's planner and DLRMPlanner: ratings against the lower bound, and seconds of the whole `plan()`.

MLPerf's DLRMv2 on 8 to 128 ranks, with column-wise cuts of 64, with 2 and 4 ranks a host, and with less memory on every
other rank; synthetic models of up to 2000 tables on 128 ranks, made from a seed, also with time limits. torchrec's
planner has a time limit of 60 s; with 1000 tables it only lists its options, with 2000 it is not run. Writes
`results/dlrm.json` and a picture beside it. Cases that are not named keep what an earlier run wrote.

    python examples/benchmarks/dlrm.py [--cases mlperf-8,synthetic-100x8]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measurement import comparison, provenance
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import PlannerError

from forerun.dlrm.torchrec import DLRMPlanner

sys.path.append(str(Path(__file__).parents[1]))  # the examples: plan_dlrm

from plan_dlrm import DIM, HOTNESS, ROWS, SHARDERS, planner_arguments, tables

_HERE = Path(__file__).parent
_LIMIT = 60.0  # of torchrec's planner (s)
_PACKAGES = ("torch", "torchrec", "fbgemm_gpu-cpu", "scipy", "numpy")


@dataclass(frozen=True)
class Case:
    """Tables and ranks to plan for."""

    name: str
    ranks: int
    rows: Sequence[int] = field(default=tuple(ROWS), repr=False)
    hotness: Sequence[float] = field(default=tuple(HOTNESS), repr=False)
    dim: int = DIM
    local: int = 8  # ranks a host
    min_partition: int | None = None  # columns of the narrowest shard; None: torchrec's default
    memory: Sequence[int] = (80,)  # GB of the ranks, over again where there are more
    limit: float | None = None  # timeout_seconds of DLRMPlanner
    peer: str = "plan"  # what torchrec does: "plan", "enumerate" (list the options only), or "not run"

    def arguments(self) -> dict[str, Any]:
        narrow = {} if self.min_partition is None else {"min_partition": self.min_partition}
        return planner_arguments(self.ranks, self.hotness, self.local, self.memory, **narrow)


def synthetic(count: int, ranks: int, peer: str, seed: int = 0) -> Case:
    """`count` tables of log-normal rows and lookups, dimension 64."""
    random = np.random.default_rng(seed)
    rows = np.clip(random.lognormal(11.0, 2.5, count), 10, 40_000_000).astype(int)
    hotness = np.clip(random.lognormal(1.0, 1.2, count), 1, 100).round()
    return Case(f"synthetic-{count}x{ranks}", ranks, rows.tolist(), hotness.tolist(), dim=64, peer=peer)


CASES = [
    *(Case(f"mlperf-{ranks}", ranks) for ranks in (8, 16, 64, 128)),
    *(Case(f"mlperf-{ranks} columns of 64", ranks, min_partition=64) for ranks in (8, 16)),
    *(Case(f"mlperf-16 hosts of {local}", 16, local=local) for local in (2, 4)),
    *(Case(f"mlperf-{ranks} of 80 and 24 GB", ranks, memory=(80, 24)) for ranks in (8, 16)),
    synthetic(100, 8, "plan"),
    synthetic(200, 16, "plan"),
    synthetic(1000, 16, "enumerate"),
    synthetic(2000, 128, "not run"),
    *(
        replace(synthetic(tables, ranks, "not run"), name=f"synthetic-{tables}x{ranks} in {limit} s", limit=limit)
        for tables, ranks, limit in ((1000, 16, 1), (1000, 16, 3), (2000, 128, 2), (2000, 128, 5), (2000, 128, 10))
    ),
]


class Row(NamedTuple):
    """One case, both planners; None: not run."""

    case: str
    tables: int
    ranks: int
    rating: float | None  # ms, of DLRMPlanner's plan; None: the time limit was too short for one
    bound: float | None  # no plan's rating is lower (ms); None: the time limit left options out
    search: str  # who found DLRMPlanner's plan
    seconds: float  # of its plan()
    enumeration_seconds: float  # of them, to list the options
    peer_rating: float | None  # ms, of torchrec's plan
    peer_seconds: float | None
    peer_enumeration_seconds: float | None
    peer: str  # "plan", "enumerate", "not run"
    limit: float | None = None  # DLRMPlanner's time limit (s)


class Timed(EmbeddingEnumerator):
    """torchrec's enumerator, with a clock."""

    seconds = 0.0

    def enumerate(self, *arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = super().enumerate(*arguments, **named)
        self.seconds += time.perf_counter() - began
        return found


def measured(case: Case) -> Row:
    """Plans one case with DLRMPlanner, then with torchrec's planner as far as the case says."""
    module = tables(case.rows, case.dim)
    ours = DLRMPlanner(**case.arguments(), timeout_seconds=case.limit)
    began = time.perf_counter()
    with suppress(PlannerError) if case.limit is not None else nullcontext():
        ours.plan(module, SHARDERS)
    seconds = time.perf_counter() - began
    report = ours.report
    peer_rating = peer_seconds = peer_listing = None
    if case.peer != "not run":
        given = case.arguments()
        enumerator = Timed(given["topology"], given["batch_size"], given["constraints"])
        stock = EmbeddingShardingPlanner(**given, enumerator=enumerator, timeout_seconds=_LIMIT)
        began = time.perf_counter()
        if case.peer == "plan":
            plan = stock.plan(module, SHARDERS)
            peer_seconds = time.perf_counter() - began
            peer_rating = ours.rate(plan).rating
        else:
            enumerator.enumerate(module, SHARDERS)
        peer_listing = enumerator.seconds
    return Row(
        case.name,
        len(case.rows),
        case.ranks,
        report and report.rating,
        report and report.bound,
        report.search if report else "the time limit was too short",
        seconds,
        report.enumeration_seconds if report else seconds,
        peer_rating,
        peer_seconds,
        peer_listing,
        case.peer,
        case.limit,
    )


def as_result(rows: Sequence[Row], command: str) -> dict[str, Any]:
    """The file's content: comparisons `ours` against `peer` (a ratio above 1: ours is better), and every row."""
    comparisons = []
    for row in rows:
        if row.rating is not None and row.bound is not None:
            comparisons.append(comparison(row.case, "ms", row.rating, row.bound, "lower bound", row.bound))
        if row.limit is not None:
            comparisons.append(comparison(row.case, "seconds", row.seconds, row.limit, "time limit", row.limit + 1))
        pairs = (
            ("ms", row.rating, row.peer_rating, row.bound),
            ("seconds", row.seconds, row.peer_seconds, None),
            ("enumeration seconds", row.enumeration_seconds, row.peer_enumeration_seconds, None),
        )
        for unit, ours, theirs, bound in pairs:
            if theirs is not None and ours is not None:
                comparisons.append(comparison(row.case, unit, ours, theirs, "torchrec", bound))
    return {
        **provenance(torch.device("cpu"), _PACKAGES, command),
        "peer_limit_seconds": _LIMIT,
        "rows": comparisons,
        "measured": [row._asdict() for row in rows],
    }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Ratings over the bound, and seconds, of both planners."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.6), layout="constrained")
    gaps, seconds = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))
    for offset, name, colour, shares, took in (
        (-0.2, "torchrec", "C7", [_over(row.peer_rating, row.bound) for row in rows], [r.peer_seconds for r in rows]),
        (0.2, "forerun", "C0", [_over(row.rating, row.bound) for row in rows], [row.seconds for row in rows]),
    ):
        for axes, values in ((gaps, shares), (seconds, took)):
            heights = [np.nan if value is None else value for value in values]
            axes.barh(places + offset, heights, 0.4, color=colour, label=name)
    gaps.axvline(1.0, color="black", linestyle="--", linewidth=1, label="no plan is below")
    gaps.set(xlabel="rating / lower bound (no bar: not run, or no bound)", xlim=(0.9, None))
    gaps.set_yticks(places, [row.case for row in rows])
    gaps.invert_yaxis()
    gaps.legend(fontsize=8)
    seconds.set(xlabel="seconds of plan()", xscale="log")
    figure.savefig(path, dpi=110)


def _over(rating: float | None, bound: float | None) -> float | None:
    return None if rating is None or bound is None else rating / bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="parts of names, parted by commas (default: all)")
    parser.add_argument("--out", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    wanted = None if options.cases is None else options.cases.split(",")
    cases = [case for case in CASES if wanted is None or any(part in case.name for part in wanted)]
    if not cases:
        parser.error(f"no case is named so; there are {'; '.join(case.name for case in CASES)}")
    logging.disable(logging.WARNING)  # torchrec's, one for each table that is copied to every rank
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "dlrm.json"
    found = {row["case"]: Row(**row) for row in json.loads(file.read_text())["measured"]} if file.is_file() else {}
    command = " ".join(["python examples/benchmarks/dlrm.py", *sys.argv[1:]])
    measured(Case("warm-up", 2, rows=[1000, 200], hotness=[1, 2], dim=16))
    for case in cases:
        found[case.name] = row = measured(case)
        theirs = "not run" if row.peer_rating is None else f"{row.peer_rating:.4f} in {row.peer_seconds:.1f} s"
        over = _over(row.rating, row.bound)
        gap = "no bound" if over is None else f"{over - 1:.2%} above the bound"
        rating = "no plan" if row.rating is None else f"{row.rating:.4f}"
        print(f"{case.name}: {rating} ({gap}) in {row.seconds:.1f} s; torchrec {theirs}", flush=True)
        rows = [found[case.name] for case in CASES if case.name in found]
        file.write_text(json.dumps(as_result(rows, command), indent=1) + "\n")
    draw(rows, options.out / "dlrm.png")


if __name__ == "__main__":
    main()
