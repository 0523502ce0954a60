"""What `train_dlrm.py` is asked for: the log, the model's size, the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from click_logs import ClickLog, SyntheticLog, Table
from criteo import COUNTS, KAGGLE_ROWS, CriteoLog, lines, parse, scaled
from movielens import MovieLens, fetch

from forerun.dlrm.synthetic import Ids, PowerLaw, StackDistance, StackDistances, Uniform

__all__ = ["Run", "opened"]

_EXPONENT = 1.05  # of the power law


@dataclass(frozen=True)
class Run:
    """What is trained, on what."""

    data: str  # "criteo:PATH", "movielens", "movielens:WHEEL", "synthetic:uniform", …
    steps: int = 200  # of each model, timed
    warm_up: int = 10  # steps before them
    batch: int = 256  # samples of a rank
    dim: int = 16  # of every embedding
    width: int = 64  # of the MLPs' hidden layers
    rows: tuple[int, ...] = tuple(KAGGLE_ROWS)  # of Criteo's tables, and of synthetic data's
    scale: float = 1.0  # of these rows
    lookups: tuple[int, ...] = (1,) * len(KAGGLE_ROWS)  # per sample, of each table of synthetic data
    min_partition: int | None = None  # columns of the narrowest shard; None: torchrec's default
    cache: Path = Path("build")  # where MovieLens is kept


def opened(run: Run) -> ClickLog:
    """The log that a run trains on.

    Raises:
        ValueError: `data` is none of those known.
    """
    kind, _, rest = run.data.partition(":")
    rows = scaled(run.rows, run.scale)
    if kind == "movielens":
        return MovieLens(Path(rest) if rest else fetch(run.cache))
    if kind == "criteo" and rest:
        return CriteoLog(Path(rest), rows)
    law, _, trace = rest.partition(":")
    if kind == "synthetic" and (law in ("uniform", "power-law") or (law == "stack-distance" and trace)):
        named = [
            Table(f"C{place}", *each) for place, each in enumerate(zip(rows, map(float, run.lookups), strict=True), 1)
        ]
        profiles = _profiles(Path(trace)) if trace else []

        def source(table: Table) -> Ids:
            if profiles:
                return StackDistance(profiles[int(table.name[1:]) - 1], table.rows)
            return Uniform(table.rows) if law == "uniform" else PowerLaw(table.rows, _EXPONENT)

        return SyntheticLog(named, COUNTS, source)
    known = "criteo:PATH, movielens, synthetic:uniform, synthetic:power-law or synthetic:stack-distance:TRACE"
    raise ValueError(f"data is {run.data!r}; give {known}, the trace a file in Criteo's format")


def _profiles(trace: Path) -> list[StackDistances]:
    """The stack distances of every category of a log in Criteo's format."""
    parsed = [parse(line, f"{trace}:{number}").categories for number, line in enumerate(lines(trace), 1)]
    return [StackDistances.of(column) for column in zip(*parsed, strict=True)]
