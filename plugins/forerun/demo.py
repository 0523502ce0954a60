"""`forerun demo`: runs each scheme's demonstration and puts their sections on one page.

A scheme's demonstration runs a script of the repository's `examples` folder, which may import frameworks; this package
may not. It therefore needs a checkout.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from forerun._example import run_example
from forerun.report import Section, write_page

__all__ = ["SCHEMES", "DemoError", "run"]

# Each scheme's module has the example's name, `SCRIPT`, and `section(out)`.
SCHEMES = {
    "picard": "forerun.picard.demo",
    "runahead": "forerun.runahead.demo",
    "runahead-sglang": "forerun.runahead.sglang_demo",
    "dlrm": "forerun.dlrm.demo",
    "moe": "forerun.moe.demo",
    "moe-sglang": "forerun.moe.sglang_demo",
}


class DemoError(Exception):
    """A demonstration could not run; the message says why and what to do."""


def run(schemes: Sequence[str], out: Path, progress: Callable[[str], None]) -> Path:
    """Demonstrates the schemes one after the other; the path of the page.

    Args:
        schemes: Names from `SCHEMES`.
        out: Folder of the page, `index.html`; made if need be.
        progress: Is told each line of progress.

    Raises:
        DemoError: A scheme that does not exist, or a demonstration that could not run. No page is written.
    """
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown:
        raise DemoError(f"there is no scheme {unknown[0]!r}; there are {', '.join(SCHEMES)}")
    sections: list[Section] = []
    for scheme in schemes:
        room = importlib.import_module(SCHEMES[scheme])
        progress(f"{scheme}: starting")
        try:
            with tempfile.TemporaryDirectory() as folder:
                run_example(room.SCRIPT, Path(folder), progress)
                sections.append(room.section(Path(folder)))
        except (OSError, RuntimeError, ValueError) as error:
            raise DemoError(f"{scheme}: {error}") from error
    return write_page(out / "index.html", sections)
