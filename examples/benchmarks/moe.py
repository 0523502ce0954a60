"""Speculative MoE, part by part. So far: `placement`, what grouping gains on real routing tables; no model is run.

Needs the tables' folder in FORERUN_ROUTING_DATA. Writes `results/moe.json` and `results/moe-placement.png`; parts that
are not named keep what an earlier run wrote.

    python examples/benchmarks/moe.py [--parts placement] [--effort 600] [--curve-effort 150]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from measurement import provenance
from moe_placement import curves, draw, measured, rows

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "scipy", "highspy")
_PARTS = ("placement",)


def main(parts: list[str], effort: int, curve_effort: int, out: Path) -> None:
    file = out / "moe.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    kept = {part: old["parts"][part] for part in old.get("parts", {}) if part not in parts}
    if "placement" in parts:
        placements = measured(effort)
        trade = curves(curve_effort)
        kept["placement"] = {"rows": rows(placements), "measured": placements, "curves": trade}
        draw(placements, trade, out / "moe-placement.png")
    command = "python " + " ".join(["examples/benchmarks/moe.py", *sys.argv[1:]])
    result = {
        **provenance(torch.device("cpu"), _PACKAGES, command),
        "rows": [row for part in kept.values() for row in part["rows"]],
        "parts": kept,
    }
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS), help="separated by commas")
    parser.add_argument("--effort", type=int, default=600, help="descents of a placement")
    parser.add_argument("--curve-effort", type=int, default=150, help="descents of a point of the trade-off")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args()
    main(options.parts.split(","), options.effort, options.curve_effort, options.out)
