"""Sample digits one step after the other and in parallel over time, and compare: rounds, seconds, difference.

    python examples/sample_digits.py --out build/digits

Where the pipeline's folder holds a Picard Consistency Model (PCM), it has rows of its own. Prints a table; with `--out`
writes it as `digits.json`, and pictures of the samples and of the convergence.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline
from diffusers.utils.logging import disable_progress_bar
from matplotlib.figure import Figure

from forerun.picard.diffusers import PicardScheduler
from forerun.picard.report import Report, plot

ASSETS = Path(__file__).parent / "assets" / "digits"
SEQUENTIAL = "diffusers DDIM, sequential"


def samplers(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of PicardScheduler.from_pipe, by the name in the table; with a PCM where the folder has one."""
    plain: dict[str, Any] = {"acceleration": "none"}
    found = {"plain Picard iteration": plain, "forerun's default": {}}
    if (folder / "pcm").is_dir():
        pcm = {"pcm": folder / "pcm"}
        found |= {"plain iteration, PCM": {**plain, **pcm}, "default, PCM": pcm}
        found |= {"PCM, 2 sweeps, approximate": {**pcm, "exact": False, "sweeps": 2}}
    return found


@dataclass(frozen=True)
class Outcome:
    """What one sampler did."""

    sampler: str
    rounds: int
    evaluations: int  # points the model was asked at, per sample
    seconds: float  # the whole pipeline call, once warm
    difference: float  # to the sequential samples: L2, relative, the largest of the batch
    images: np.ndarray  # [B, H, W, 1] in [0, 1]
    report: Report | None  # None for the sequential run


def compare(folder: Path, steps: int, samples: int = 8, tolerance: float = 1e-3) -> list[Outcome]:
    """Samples from the same seeds with the stock scheduler, then with each of `samplers`."""
    pipe = DDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    reference, seconds = _timed(pipe, steps, samples)
    outcomes = [Outcome(SEQUENTIAL, steps, steps, seconds, 0.0, reference, None)]
    for name, options in samplers(folder).items():  # check_cost would only spend time on a warning here
        pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=tolerance, check_cost=False, **options)
        images, seconds = _timed(pipe, steps, samples)
        report = pipe.scheduler.report
        pipe.scheduler = pipe.scheduler.detach()
        difference = _difference(images, reference)
        outcomes.append(Outcome(name, report.rounds, report.evaluations, seconds, difference, images, report))
    return outcomes


def _timed(pipe: DDIMPipeline, steps: int, samples: int) -> tuple[np.ndarray, float]:
    for _ in range(2):  # the first run warms up
        generator = torch.Generator().manual_seed(0)
        start = time.perf_counter()
        images = pipe(samples, generator=generator, num_inference_steps=steps, output_type="np").images
        seconds = time.perf_counter() - start
    return images, seconds


def _difference(images: np.ndarray, reference: np.ndarray) -> float:
    difference = np.linalg.norm((images - reference).reshape(len(images), -1), axis=1)
    return float(np.max(difference / np.linalg.norm(reference.reshape(len(images), -1), axis=1)))


def draw_samples(outcomes: list[Outcome], path: Path) -> None:
    """Each sampler's digits in a grid, side by side."""
    figure = Figure(figsize=(3 * len(outcomes), 3.8), layout="constrained")
    for axes, outcome in zip(figure.subplots(1, len(outcomes)), outcomes, strict=True):
        axes.imshow(_grid(outcome.images[..., 0]), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"{outcome.sampler}\n{outcome.rounds} rounds", fontsize=10)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def _grid(images: np.ndarray) -> np.ndarray:
    """`[B, H, W]` in rows of four, a pixel apart; blank where the last row is not full."""
    framed = np.pad(images, ((0, -len(images) % 4), (1, 1), (1, 1)))
    rows = [np.concatenate(list(row), axis=1) for row in framed.reshape(-1, 4, *framed.shape[1:])]
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="pipeline folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, help="folder for digits.json and the pictures")
    options = parser.parse_args()
    if not (options.assets / "model_index.json").is_file():
        parser.error(f"{options.assets} is not a pipeline folder; examples/train_digits.py makes one")
    disable_progress_bar()
    rows = []
    print(f"{'steps':>5}  {'sampler':<27} {'rounds':>6} {'evaluations':>11} {'seconds':>7} {'difference':>10}")
    for steps in options.steps:
        outcomes = compare(options.assets, steps, options.samples)
        for it in outcomes:
            print(
                f"{steps:>5}  {it.sampler:<27} {it.rounds:>6} {it.evaluations:>11} {it.seconds:>7.2f} "
                f"{it.difference:>10.1e}"
            )
            told = ("sampler", "rounds", "evaluations", "seconds", "difference")
            rows.append({"steps": steps, "samples": options.samples, **{name: getattr(it, name) for name in told}})
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            draw_samples(outcomes, options.out / f"samples-{steps}.png")
            reports = {it.sampler: it.report for it in outcomes if it.report is not None}
            plot(reports.values(), options.out / f"convergence-{steps}.png", reports)
    if options.out is not None:
        (options.out / "digits.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
