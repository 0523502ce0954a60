"""Picard sampling beside stock diffusers: what `examples/sample_digits.py` wrote, shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.report import Picture, Section, Table

__all__ = ["SCRIPT", "section"]

SCRIPT = "sample_digits.py"  # of the examples

_TEXT = """\
A UNet trained on scikit-learn's digits, sampled by diffusers' DDIMPipeline from the same seeds: as diffusers does it, \
one step after the other, and with PicardScheduler as the pipeline's scheduler; with a Picard Consistency Model too \
(PCM, a LoRA of 2 MB), which answers points that have just entered the window. The base model alone accepts points, \
but in the row that is called approximate.

Rounds are model calls that wait for one another: the time, on a device that runs a window of points as fast as one. \
Evaluations are the points that the model was asked at. Seconds are of this machine's CPU, whose cores one batch keeps \
busy already: there they follow the evaluations, not the rounds. The difference is to the sequential samples: L2, \
relative, the largest of the batch."""


def section(out: Path) -> Section:
    """The room's section of the demo's page, of what the script wrote into a folder."""
    rows: list[dict[str, Any]] = json.loads((out / "digits.json").read_text())
    table = Table(
        f"{rows[0]['samples']} digits, the sequential result and ways to it",
        ("steps", "sampler", "rounds", "evaluations", "seconds", "difference"),
        [
            (
                str(row["steps"]),
                row["sampler"],
                str(row["rounds"]),
                str(row["evaluations"]),
                f"{row['seconds']:.2f}",
                "0" if row["difference"] == 0 else f"{row['difference']:.1e}",
            )
            for row in rows
        ],
    )
    pictures: list[Picture] = []
    for steps in sorted({row["steps"] for row in rows}):
        samples, convergence = out / f"samples-{steps}.png", out / f"convergence-{steps}.png"
        pictures += [
            Picture(f"{steps} steps: the same seeds through each sampler.", samples.read_bytes()),
            Picture(
                f"{steps} steps: the largest change of a point, sweep by sweep; dashed, the tolerance.",
                convergence.read_bytes(),
            ),
        ]
    return Section("picard: parallel-in-time diffusion sampling", _TEXT, [table], pictures)
