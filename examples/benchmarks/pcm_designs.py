"""Designs of the arm's Picard Consistency Model: each trained from fresh, its rounds measured while it trains.

The arm misses the paper's gains; here is everything that was tried, each as a curve over its training: the mean rounds
until the papers' rule (0.1 of the noise), by plain iteration and by the default acceleration, on noise and moments that
no training sees. A curve begins with the change that changes nothing. At its end follow the certified rounds, and those
at an episode's first moment, which is what `pcm.py` measures.

    python examples/benchmarks/pcm_designs.py [--parts references-any,designs] [--designs NAMES]

Needs gymnasium and mujoco; on one thread. A training that was killed goes on from its folder in `--work`, a finished
one there is only measured again. Writes `results/pcm-designs.json` and a picture beside it; what is not named keeps
what an earlier run wrote.

Source: Picard Consistency Model for Fast Parallel Sampling of Diffusion Models, arXiv 2503.19731.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measurement import provenance
from pcm_cases import FIRST_SEED, Case
from pcm_designs_report import draw, reached, table
from pcm_designs_rounds import PAPER, TRAINED_ON, Point, Reference, cases, references, rounds
from rich.console import Console

from forerun.picard.switch import Switch
from forerun.picard.trainer import Trainer
from forerun.picard.training import Training

sys.path.append(str(Path(__file__).parents[1]))  # the examples

from control_arm import ASSETS
from diffusion_policy import load
from train_arm_pcm import FROM_SIGNAL, TRAININGS, source

__all__ = ["DESIGNS", "Design", "Results", "curve"]

_HERE = Path(__file__).parent
_PARTS = ("references-any", "references-first", "designs")


@dataclass(frozen=True)
class Design:
    """A training of the arm's PCM, and the switches that it is run under.

    Args:
        name: What sets it apart; with N, its key.
        training: Its choices.
        switches: Signal to noise from which the PCM answers; None: where the training found it better than the base.
    """

    name: str
    training: Training
    switches: tuple[float | None, ...] = (None,)

    @property
    def key(self) -> str:
        return f"{self.name.replace(' ', '-')}-{self.training.steps}"


def _design(name: str, steps: int, turns: int, **changes: Any) -> Design:
    return Design(name, replace(TRAININGS[steps], turns=turns, **changes), (None, FROM_SIGNAL[steps]))


# The most telling first. All others of an N differ from the shipped one in one thing, in turns and in measurements.
DESIGNS = (
    _design("one age", 15, 150, measure_every=25),
    _design("two ages", 15, 30, measure_every=10, ages=2),
    _design("variance 0.01", 15, 30, measure_every=10, data_variance=0.01),
    _design("paper objective", 15, 30, measure_every=10, objective="sweep"),
    _design("full fine-tune", 15, 30, measure_every=10, full=True),
    _design("one age", 100, 120, measure_every=20),
    _design("variance 0.01", 100, 30, measure_every=15, data_variance=0.01),
    _design("variance 0.05", 15, 30, measure_every=10, data_variance=0.05),
    _design("variance 0.003", 15, 30, measure_every=10, data_variance=0.003),
    _design("variance 0.05", 100, 30, measure_every=15, data_variance=0.05),
    _design("one age longer", 15, 350, measure_every=50),
)


class Results(NamedTuple):
    """What has been measured, in this run and in those before.

    `runs` says of each design (by its key) and of the references ("references 15 any") which run measured it;
    `trainings` what each design was trained with, and how far.
    """

    points: list[Point]
    references: list[Reference]
    trainings: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]

    @classmethod
    def before(cls, path: Path) -> Results:
        """An earlier run's; empty where there was none."""
        if not path.is_file():
            return cls([], [], {}, {})
        found = json.loads(path.read_text())
        points = [Point(**row) for row in found["measured"]]
        return cls(points, [Reference(**row) for row in found["references"]], found["trainings"], found["runs"])

    def with_design(self, design: Design, points: list[Point], run: dict[str, Any]) -> Results:
        """The design's own points in the place of earlier ones; the others stay."""
        last = points[-1]
        told = {"turns": last.turn, "seconds": last.seconds, "training": asdict(design.training)}
        return Results(
            points=[point for point in self.points if point.design != design.key] + points,
            references=self.references,
            trainings={**self.trainings, design.key: told},
            runs={**self.runs, design.key: run},
        )

    def with_references(self, found: list[Reference], run: dict[str, Any]) -> Results:
        """Those of one N and kind of moments, in the place of earlier ones."""
        steps, moments = found[0][:2]
        others = [row for row in self.references if row[:2] != (steps, moments)]
        return self._replace(references=others + found, runs={**self.runs, f"references {steps} {moments}": run})

    def as_json(self, run: dict[str, Any]) -> str:
        """The file's text: the last run, where each part comes from, the best of all designs, then every row."""
        content = {
            **run,
            "runs": dict(sorted(self.runs.items())),
            "rows": reached(self.points, self.references),
            "references": [row._asdict() for row in self.references],
            "trainings": self.trainings,
            "measured": [point._asdict() for point in self.points],
        }
        return json.dumps(content, indent=1) + "\n"


def curve(
    design: Design, arms: dict[str, Case], seeds: range, work: Path, episodes: int = TRAINED_ON
) -> Iterator[list[Point]]:
    """Trains, and yields after every measurement all points until then; the last list has all rules and moments.

    Args:
        design: What to train.
        arms: What to measure on, by the moments.
        seeds: Of the pairs of noise and moment, one each.
        work: Folder of the checkpoint and of what was measured until it.
        episodes: That training takes moments from.
    """
    training, path = design.training, work / "curve.json"
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undone:
        trainer = Trainer(source(load(ASSETS), episodes), work, training, None, undone)

        def measured(turn: int, seconds: float, moments: str = "any", rule: str = PAPER) -> list[Point]:
            found = []
            for signal in design.switches:
                pcm = trainer.consistency()
                if signal is not None:
                    pcm = replace(pcm, card=replace(pcm.card, switch=Switch((signal,) * training.ages)))
                plain, accelerated = (rounds(arms[moments], seeds, rule, way, pcm) for way in ("none", "secant"))
                switch = "trained" if signal is None else f"from signal {signal}"
                told = (design.key, training.steps, switch, moments, rule, turn, seconds)
                found.append(Point(*told, plain, accelerated))
            return found

        points = [Point(**row) for row in json.loads(path.read_text())] if trainer.turn else measured(0, 0.0)
        points = [point for point in points if point.turn <= trainer.turn]
        seconds = points[-1].seconds
        for turn in range(trainer.turn, training.turns):
            seconds += _processor_seconds(lambda turn=turn: trainer.run_turn(turn))
            if turn + 1 == training.turns or (turn + 1) % training.measure_every == 0:
                trainer.measure()  # the switch, and which rows are learned from next
                points += measured(turn + 1, seconds)
                path.write_text(json.dumps([point._asdict() for point in points]))
                trainer.checkpoint(turn + 1)
                yield list(points)
        for moments, rule in (("any", "relative 1e-2"), ("any", "relative 1e-3"), ("first", PAPER)):
            points += measured(training.turns, seconds, moments, rule)
        yield list(points)


def _processor_seconds(work: Callable[[], Any]) -> float:
    """Of this process, which other work on the machine does not lengthen."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS))
    parser.add_argument("--designs", default=",".join(design.key for design in DESIGNS))
    parser.add_argument("--pairs", type=int, default=32, help="of noise and moment (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/pcm-designs"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    parts, named = options.parts.split(","), options.designs.split(",")
    if unknown := [*(set(parts) - set(_PARTS)), *(set(named) - {design.key for design in DESIGNS})]:
        names = ", ".join(design.key for design in DESIGNS)
        parser.error(f"there is no {', '.join(unknown)}; parts: {', '.join(_PARTS)}; designs: {names}")
    torch.set_num_threads(1)
    designs = [design for design in DESIGNS if design.key in named]
    arms = {steps: cases(steps) for steps in sorted({design.training.steps for design in designs})}
    path, console = options.out / "pcm-designs.json", Console(width=None if sys.stdout.isatty() else 130)
    command = " ".join(["python examples/benchmarks/pcm_designs.py", *sys.argv[1:]])
    run = {**provenance(torch.device("cpu"), ("torch", "diffusers"), command), "pairs": options.pairs}
    options.out.mkdir(parents=True, exist_ok=True)
    results, seeds = Results.before(path), range(FIRST_SEED, FIRST_SEED + options.pairs)
    for steps, moments in itertools.product(arms, ("any", "first")):
        if f"references-{moments}" in parts:
            print(f"N={steps}: references, {moments} moments", flush=True)
            results = results.with_references(references(arms[steps][moments], moments, seeds), run)
            path.write_text(results.as_json(run))
    for design in designs if "designs" in parts else ():
        for points in curve(design, arms[design.training.steps], seeds, options.work / design.key):
            results = results.with_design(design, points, run)
            path.write_text(results.as_json(run))
            print(*points[-len(design.switches) :], sep="\n", flush=True)
    results = results._replace(points=in_order(results.points))
    path.write_text(results.as_json(run))
    draw(results.points, results.references, path.with_suffix(".png"))
    console.print(table(results.points, results.references))


def in_order(points: list[Point]) -> list[Point]:
    """By design, whichever run measured it."""
    keys = [design.key for design in DESIGNS]
    return sorted(points, key=lambda point: keys.index(point.design))


if __name__ == "__main__":
    main()
