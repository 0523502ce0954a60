"""`forerun dlrm ...`: sharding plans from files alone, and this machine's constants measured."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from forerun.dlrm.report import Report
    from forerun.dlrm.torchrec_files import FilePlanning
    from forerun.dlrm.torchrec_objective import Objective

__all__ = ["app"]

app = typer.Typer(name="dlrm", help="Sharding plans for embedding tables.", no_args_is_help=True)

_MB = 1024**2


@app.callback()
def _room() -> None:
    """Sharding plans for embedding tables."""


@app.command()
def plan(
    tables: Annotated[Path, typer.Option(metavar="TABLES.csv", help="name, rows, dim, pooling_factor, …")],
    topology: Annotated[Path, typer.Option(metavar="TOPOLOGY.json", help="world_size, compute_device, hbm_gb, …")],
    batch_size: Annotated[int | None, typer.Option(help="Samples of a rank; torchrec's default if not given.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="PLAN.json", help="Write the plan here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw what each rank is given.")] = None,
    before: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="A plan written earlier: say what changes.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that the planner may take.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run torchrec's planner too.")] = False,
    corrected: Annotated[
        bool, typer.Option("--corrected", help="Count the travel of ids, and all-reduces within a host as such.")
    ] = False,
) -> None:
    """Plan from files alone: no model, no GPU, no memory for the tables."""
    try:
        from forerun.dlrm.diff import difference
        from forerun.dlrm.report import Report
        from forerun.dlrm.torchrec_files import FilePlanning, NoPlan
    except ImportError as error:
        raise _failed("plan", _install(error)) from error
    show = Console().print
    try:
        _check_plan(batch_size, timeout, out, picture)
        old = None if before is None else Report.load(before)
        with _quiet("plan"):
            objective: Objective = "corrected" if corrected else "torchrec"
            planning = FilePlanning(tables, topology, batch_size=batch_size, timeout=timeout, objective=objective)
            report = planning.plan()
        show(report.explain())
        if picture is not None:
            report.figure().savefig(picture)
            typer.echo(f"picture: {picture}")
        if out is not None:
            report.save(out)
            typer.echo(f"plan: {out}")
        if old is not None:
            show(difference(old, report).explain())
        if compare:
            _compare(planning, report)
    except (ImportError, NoPlan, OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        raise _failed("plan", reason) from error


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.json"),
    ranks: Annotated[int | None, typer.Option(help="Processes to start here; none under torchrun.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what torch finds.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it gives up; under torchrun, on one exchange.")] = 600.0,
    largest: Annotated[int, typer.Option(help="MB of the largest message.")] = 64,
    repeats: Annotated[int, typer.Option(help="Of every measurement; their median counts.")] = 15,
    table: Annotated[int, typer.Option(help="MB of the table that each rank looks up.")] = 256,
) -> None:
    """Measure memory and links on the ranks that will train: constants for a planner's topology.

    `forerun dlrm calibrate --ranks 4` starts processes here; `torchrun … -m forerun dlrm calibrate` measures between
    hosts too.
    """
    try:
        from forerun.dlrm.calibrate import CalibrationError, Job, found_device
        from forerun.dlrm.calibrate import calibrate as run
        from forerun.dlrm.measure import Effort
    except ImportError as error:
        raise _failed("calibrate", _install(error)) from error
    try:
        effort = Effort(largest=largest * _MB, repeats=repeats, table=table * _MB)
        if run(Job(out, device or found_device(), timeout, effort), ranks, typer.echo):
            typer.echo(f"calibration: {out}")
    except (CalibrationError, OSError, ValueError) as error:
        raise _failed("calibrate", str(error)) from error


def _check_plan(batch_size: int | None, timeout: float | None, *files: Path | None) -> None:
    """Raises ValueError for what would fail once the plan is made."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected 1 or more")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"--timeout {timeout:g}: expected seconds, more than 0")
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.absolute().parent}")


def _compare(planning: FilePlanning, report: Report) -> None:
    from forerun.dlrm.torchrec_files import NoPlan

    try:
        with _quiet("plan"):
            peer, seconds = planning.peer()
    except NoPlan as error:
        typer.echo(f"torchrec's planner: found no plan: {error}")
        return
    less = 1 - report.rating / peer.rating if peer.rating else 0.0
    theirs, ours = (f"{of.rating:.4f} ms in {took:.1f} s" for of, took in ((peer, seconds), (report, report.seconds)))
    typer.echo(f"torchrec's planner: rating {theirs}; forerun's: {ours} ({less:.1%} less)")


@contextmanager
def _quiet(command: str) -> Iterator[None]:
    """forerun's warnings as lines, and none of torchrec's log, a line for each table."""
    log = logging.getLogger("torchrec")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        log.setLevel(level)
    for told in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        typer.echo(f"forerun dlrm {command}: warning: {told}", err=True)


def _install(error: ImportError) -> str:
    return str(error) if "pip install" in str(error) else f"{error}: pip install 'forerun[torchrec]'"


def _failed(command: str, reason: str) -> typer.Exit:
    typer.echo(f"forerun dlrm {command}: {reason}", err=True)
    return typer.Exit(1)
