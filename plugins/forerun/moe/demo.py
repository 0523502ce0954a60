"""Speculative MoE beside stock DeepSpeed: runs `examples/serve_tiny_moe.py` and shows what it wrote."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forerun._example import run_example
from forerun.report import Picture, Section, Table

__all__ = ["run"]

_TEXT = """\
A small OLMoE (4 layers of 16 experts, 4 of them a token) trained on the standard library's sources, its experts \
spread over processes of this machine by DeepSpeed's AutoEP. Requests from files that it has not seen are continued: \
by stock, and by stock with forerun's speculate, part by part. The plan was made from another run, over training files.

Kilobytes are the hidden states that all ranks send while they answer, counted where they are handed to \
torch.distributed; other kilobytes are counts, indices and weights. Milliseconds a token are of this machine, whose \
loopback costs next to nothing: what fewer bytes save depends on the link. Same answers are requests whose greedy \
tokens are all stock's."""


def run(progress: Callable[[str], None]) -> Section:
    """The room's section of the demo's page.

    Args:
        progress: Is told each line that the example prints.

    Raises:
        FileNotFoundError: The current folder is not a checkout of forerun.
        RuntimeError: The example failed; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_example("serve_tiny_moe.py", Path(folder), progress)
        return _section(Path(folder))


def _section(out: Path) -> Section:
    rows: list[dict[str, Any]] = json.loads((out / "serving.json").read_text())
    table = Table(
        f"{rows[0]['requests']} requests on {rows[0]['ranks']} ranks",
        ("way", "kilobytes", "other kilobytes", "ms a token", "same answers"),
        [
            (
                row["way"],
                f"{row['kilobytes']:.0f}",
                f"{row['other_kilobytes']:.0f}",
                f"{row['milliseconds']:.1f}",
                f"{row['same']} of {row['requests']}",
            )
            for row in rows
        ],
    )
    plan = Picture("What the plan promises, layer by layer: locality, rows, load.", (out / "plan.png").read_bytes())
    return Section("moe: each token to a rank once", _TEXT, [table], [plan])
