"""A prompt shared by two vLLM engines: what `examples/share_prompt.py` wrote, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.report import Picture, Section, Table

__all__ = ["SCRIPT", "section"]

SCRIPT = "share_prompt.py"  # of the examples

_TEXT = """\
A decoder with random weights, served by two stock vLLM engines, each on cores of its own. A long prompt (text of \
Python's standard library) is given to one engine, as vLLM does it, and to both as a chain: each computes its own \
context and gets the keys and values of the tokens before it layer by layer from the engine before. The split follows \
from prefills that were measured just before; a table of such splits also says when one engine is the better choice.

Seconds are to the first token, the median of three prompts in turns. The tokens after it are greedy, and compared."""


def section(out: Path) -> Section:
    """The room's section of the demo's page, of what the script wrote into a folder."""
    found: dict[str, Any] = json.loads((out / "chain.json").read_text())
    single = found["rows"][0]["seconds"]
    table = Table(
        f"The first token of a prompt of {found['tokens']} tokens",
        ("way", "contexts", "seconds", "expected", "times sooner", "the next tokens"),
        [
            (
                row["way"],
                " + ".join(map(str, row["contexts"])),
                f"{row['seconds']:.2f}",
                f"{row['predicted']:.2f}",
                f"{single / row['seconds']:.2f}",
                f"{found['answer']} the same" if found["same"] else "differ",
            )
            for row in found["rows"]
        ],
    )
    told = "When each engine does what in the chain, by the model that was fitted to the measured prefills."
    pictures = [Picture(told, (out / "timeline.png").read_bytes())]
    return Section("runahead: a long prompt's first token from several engines", _TEXT, [table], pictures)
