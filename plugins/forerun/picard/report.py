"""What a run did: rounds, evaluations, seconds, residuals, and why it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Report", "plot"]


@dataclass(frozen=True)
class Report:
    """One run of a parallel sampler.

    `rounds` counts every model call that had to wait for the one before it, a coarse start's included; the sequential
    run makes `points` of them.
    """

    scheduler: str
    points: int  # T, model calls of the sequential run
    window: int  # W, most points in a sweep
    tolerance: float
    acceleration: str
    rounds: int  # model calls one after the other
    evaluations: int  # points the model was asked at, per sample
    seconds: float  # from the first timestep to the result
    residuals: tuple[float, ...]  # largest change of a point, per sweep
    stopped: Literal["converged", "exact", "approximate", "interrupted", "stepped aside"]
    fell_back: bool  # the acceleration diverged and plain Picard iteration finished the run
    residual: float = 0.0  # largest change of an accepted sample that the model had been asked at: the certificate
    guided_rounds: int = 0  # of them, those in which a Picard Consistency Model answered some points
    cost: dict[str, float] | None = None  # seconds of one point and of a window, when they were measured

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, for `forerun picard plot`."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is not a report.
        """
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text())
            return cls(**{**fields, "residuals": tuple(fields["residuals"])})
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a report written by scheduler.report.save(...): {error}") from error


def plot(reports: Iterable[Report], path: str | Path, labels: Iterable[str] | None = None) -> None:
    """Draws residual against round for each report, on a logarithmic axis, into a picture file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'forerun[diffusers]'") from error
    reports = list(reports)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="round (model calls one after the other)", ylabel="largest change of a point")
    for report, label in zip(reports, labels or [_label(report) for report in reports], strict=True):
        first = report.rounds - len(report.residuals) + 1
        rounds = range(first, report.rounds + 1)
        axes.semilogy(rounds, [max(residual, 1e-16) for residual in report.residuals], marker="o", label=label)
    for tolerance in {report.tolerance for report in reports if report.tolerance > 0}:
        axes.axhline(tolerance, color="grey", linestyle="--", linewidth=1)
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(Path(path), dpi=120)


def _label(report: Report) -> str:
    return f"{report.scheduler}, {report.acceleration}: {report.rounds} rounds for {report.points} steps"
