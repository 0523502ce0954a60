"""Speculative MoE beside stock SGLang: what `examples/serve_moe_sglang.py` wrote, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.report import Section, Table

__all__ = ["SCRIPT", "section"]

SCRIPT = "serve_moe_sglang.py"  # of the examples

_TEXT = """\
A small Qwen3-MoE with random weights (4 layers of 16 experts, 4 of them a token) in SGLang's own server, its \
experts spread over two ranks of this machine (--tp 2 --ep 2): stock, and with forerun, which is turned on by a \
variable. The plan was made from another run, over other files; requests are continued by HTTP.

Kilobytes are what a rank sends between attention and experts and back: counted by forerun, as the server's \
/server_info tells; by formula for stock's two sums over all ranks. Same answers are requests whose greedy tokens \
are all stock's. What fewer bytes save depends on the link: this machine's loopback takes next to no time for them, \
and more collectives take some."""


def section(out: Path) -> Section:
    """The section of the demo's page, of what the script wrote into a folder."""
    rows: list[dict[str, Any]] = json.loads((out / "sglang.json").read_text())
    table = Table(
        f"{rows[0]['requests']} requests on 2 ranks",
        ("way", "kilobytes a rank", "ms a token", "same answers"),
        [
            (
                row["way"],
                f"{row['kilobytes']:.0f}",
                f"{row['milliseconds']:.1f}",
                f"{row['same']} of {row['requests']}",
            )
            for row in rows
        ],
    )
    return Section("moe: each token to a rank once, in SGLang", _TEXT, [table], [])
