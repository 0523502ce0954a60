"""Speculative MoE beside stock DeepSpeed: what `examples/serve_tiny_moe.py` wrote, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.report import Picture, Section, Table

__all__ = ["SCRIPT", "section"]

SCRIPT = "serve_tiny_moe.py"  # of the examples

_TEXT = """\
A small OLMoE (4 layers of 16 experts, 4 of them a token) trained on the standard library's sources, its experts \
spread over processes of this machine by DeepSpeed's AutoEP. Requests from files that it has not seen are continued: \
by stock, and by stock with forerun's speculate, part by part. The plan was made from another run, over training files.

Kilobytes are the hidden states that all ranks send while they answer, counted where they are handed to \
torch.distributed; other kilobytes are counts, indices and weights. Milliseconds a token are of this machine, whose \
loopback costs next to nothing: what fewer bytes save depends on the link. Same answers are requests whose greedy \
tokens are all stock's."""


def section(out: Path) -> Section:
    """The room's section of the demo's page, of what the script wrote into a folder."""
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
