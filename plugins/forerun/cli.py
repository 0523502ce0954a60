"""The `forerun` command: each room's commands beside `doctor` and `demo`.

Imports no torch and no framework: a room's `commands.py` imports what it runs when it runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import forerun
from forerun import demo as demos
from forerun import doctor as checks
from forerun.dlrm import commands as dlrm
from forerun.moe import commands as moe
from forerun.picard import commands as picard
from forerun.runahead import commands as runahead

__all__ = ["app"]

app = typer.Typer(name="forerun", help="The same answer, sooner.", no_args_is_help=True, add_completion=False)
app.add_typer(picard.app)
app.add_typer(dlrm.app)
app.add_typer(runahead.app)
app.add_typer(moe.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(forerun.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The same answer, sooner: parallelisation schemes as drop-ins for frameworks that run already."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which frameworks are here, what forerun can do for them, and how to get the rest.

    The exit status is 1 if a framework that is installed is of a release that forerun does not support, or if
    FORERUN_SGLANG is set to what cannot be read.
    """
    checkup = checks.examine()
    if as_json:
        typer.echo(checkup.as_json())
    else:
        Console().print(checkup.as_table())
    if not checkup.healthy:
        raise typer.Exit(1)


@app.command()
def demo(
    scheme: Annotated[str | None, typer.Option(help="One scheme only; every one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("build/report"),
) -> None:
    """Run every drop-in beside its stock host on real input and write a page with the results."""
    try:
        page = demos.run([scheme] if scheme else list(demos.SCHEMES), out, progress=typer.echo)
    except demos.DemoError as error:
        typer.echo(f"forerun demo: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"report: {page}")
