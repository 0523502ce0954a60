"""A prompt shared by the ranks of one SGLang server: what `examples/share_prompt_sglang.py` wrote, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.report import Section, Table

__all__ = ["SCRIPT", "section"]

SCRIPT = "share_prompt_sglang.py"  # of the examples

_TEXT = """\
A decoder with random weights in SGLang's own server, on the cores of this machine: on one rank, tensor-parallel \
over two, and over two with forerun's KV-Runahead as the context-parallel strategy, which is turned on by a \
variable. Each rank computes its own, uneven part of a prompt (text of Python's standard library); keys and values \
go from rank to rank, layer by layer.

Seconds are to the first token, the median of prompts that no cache knows; all requests are made by HTTP. The tokens \
after it are greedy, and compared with those of one rank."""


def section(out: Path) -> Section:
    """The section of the demo's page, of what the script wrote into a folder."""
    found: dict[str, Any] = json.loads((out / "sglang.json").read_text())
    single = found["rows"][0]["seconds"]
    table = Table(
        f"The first token of a prompt of {found['tokens']} tokens",
        ("way", "seconds", "times sooner", "the next tokens"),
        [
            (
                row["way"],
                f"{row['seconds']:.2f}",
                f"{single / row['seconds']:.2f}",
                f"{row['same']} of {found['answer']} the same",
            )
            for row in found["rows"]
        ],
    )
    return Section("runahead: a long prompt on the ranks of one SGLang server", _TEXT, [table], [])
