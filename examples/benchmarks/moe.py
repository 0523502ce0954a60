"""Speculative MoE, part by part; parts that are not named keep what an earlier run wrote in `results/moe.json`.

- `placement`: what grouping gains on real routing tables, whose folder FORERUN_ROUTING_DATA names; no model is run.
- `serving`: pinned models on 2 and 4 ranks over gloo, stock and ours, over loopback and over links of 1 Gbit/s and
  100 Mbit/s between network namespaces, which need root (`--links loopback` does not). A case (model, ranks, link) that
  is run replaces its own rows.

    python examples/benchmarks/moe.py --parts placement [--effort 600] [--curve-effort 150]
    python examples/benchmarks/moe.py --parts serving [--links loopback] [--shape small --repeats 1]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import moe_serving
import torch
from measurement import provenance
from moe_placement import curves, draw, measured, rows

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "scipy", "highspy", "torch", "deepspeed", "transformers")
_PARTS = ("placement", "serving")


def main(parts: list[str], out: Path, options: argparse.Namespace) -> None:
    if unknown := set(parts) - set(_PARTS):
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    file = out / "moe.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    kept = dict(old.get("parts", {}))
    command = "python " + " ".join(["examples/benchmarks/moe.py", *sys.argv[1:]])
    here = provenance(torch.device("cpu"), _PACKAGES, command)
    run = {"command": command, "commit": here["commit"]}
    if "placement" in parts:
        placements = measured(options.effort)
        trade = curves(options.curve_effort)
        kept["placement"] = {"run": run, "rows": rows(placements), "measured": placements, "curves": trade}
        draw(placements, trade, out / "moe-placement.png")
    if "serving" in parts:
        settings = {
            "models": options.models.split(","),
            "shape": options.shape,
            "requests": {"random": 8, "planted": 8, "folded": 8, "tiny": 16},
            "length": {"random": options.length, "planted": options.length, "folded": options.length, "tiny": 32},
            "decode": 4,
            "repeats": options.repeats,
            "calibration": 6,
            "effort": 20,
        }
        ranks = [int(count) for count in options.ranks.split(",")]
        found = moe_serving.held(moe_serving.measured(settings, ranks, options.links.split(","), options.seconds))
        found = moe_serving.merged(kept.get("serving", {}).get("measured", []), found, run)
        kept["serving"] = {"run": run, "rows": moe_serving.rows(found), "settings": settings, "measured": found}
        moe_serving.draw(found, out / "moe-serving.png")
    result = {**here, "rows": [row for part in kept.values() for row in part["rows"]], "parts": kept}
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS), help="separated by commas")
    parser.add_argument("--effort", type=int, default=600, help="descents of a placement")
    parser.add_argument("--curve-effort", type=int, default=150, help="descents of a point of the trade-off")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--models", default="random,planted,folded,tiny", help="of the serving part")
    parser.add_argument("--shape", choices=("olmoe", "small"), default="olmoe", help="of models with random weights")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument("--links", default=",".join(moe_serving.LINKS), help="links; all but loopback need root")
    parser.add_argument("--length", type=int, default=8, help="tokens of a request")
    parser.add_argument("--repeats", type=int, default=2, help="of each timing")
    parser.add_argument("--seconds", type=float, default=1800, help="after which a run is given up")
    options = parser.parse_args()
    main(options.parts.split(","), options.out, options)
