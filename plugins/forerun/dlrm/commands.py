"""`forerun dlrm ...`: sharding plans from files alone, and this machine's constants measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(name="dlrm", help="Sharding plans for embedding tables.", no_args_is_help=True)

_MB = 1024**2


@app.callback()
def _room() -> None:
    """Sharding plans for embedding tables."""


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.json"),
    ranks: Annotated[int | None, typer.Option(help="Processes to start here; none under torchrun.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default what torch finds.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it gives up.")] = 600.0,
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


def _install(error: ImportError) -> str:
    return str(error) if "pip install" in str(error) else f"{error}: pip install 'forerun[torchrec]'"


def _failed(command: str, reason: str) -> typer.Exit:
    typer.echo(f"forerun dlrm {command}: {reason}", err=True)
    return typer.Exit(1)
