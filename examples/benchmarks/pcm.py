"""Picard Consistency Models on the digits model and the arm's policy: rounds, quality after few sweeps, closed loop.

Each way to sample with a PCM stands beside the same one without, and beside one whose PCM changes nothing ("slope
only"). Three parts: "rounds" runs every way until it has converged, "quality" looks at the sample after 1, 2, 3, …
sweeps, whatever it is then, "control" drives the arm (on the CPU whatever the device). Writes
`results/pcm.json` (`pcm-cuda.json` with `--device cuda`) and a picture beside it. Parts and cases that are not named
keep what an earlier run wrote; the file says of each which run that was.

    python examples/benchmarks/pcm.py [--parts rounds,quality,control] [--cases digits-50,arm-15] [--seeds 32]

Source: Picard Consistency Model for Fast Parallel Sampling of Diffusion Models, arXiv 2503.19731.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pcm_quality
import pcm_rounds
import torch
from frechet import FEATURES, DigitFeatures
from measurement import provenance
from pcm_cases import ASSETS, PCMS, Case
from pcm_report import comparison_table, draw, quality_table, rounds_table
from rich.console import Console
from rich.progress import Progress

_HERE = Path(__file__).parent
_PARTS = ("rounds", "quality", "control")
_CONTROLLED = (15, 100)  # N of the arm's sampler

Cell = tuple[str, int]  # a case's name and N


class Results(NamedTuple):
    """What has been measured, in this run and in those before.

    `runs` says of each part and case ("rounds digits-50", "control") where it was measured: hardware, versions, command
    and commit.
    """

    rounds: list[pcm_rounds.Row]
    quality: list[pcm_quality.Row]
    control: list[dict[str, Any]]  # rows of examples/control_arm.py
    classifier: dict[str, float]  # that the Fréchet distance takes features of
    runs: dict[str, dict[str, Any]]

    @classmethod
    def before(cls, path: Path) -> Results:
        """An earlier run's; empty where there was none."""
        if not path.is_file():
            return cls([], [], [], {}, {})
        found = json.loads(path.read_text())
        rounds = [pcm_rounds.Row(**row) for row in found["measured"]]
        quality = [pcm_quality.Row(**row) for row in found["quality"]]
        return cls(rounds, quality, found["control"], found["classifier"], found["runs"])

    def without(self, parts: list[str], cells: dict[str, list[Cell]]) -> Results:
        """What stays when these parts are measured again."""
        return self._replace(
            rounds=[row for row in self.rounds if (row.case, row.steps) not in cells["rounds"]],
            quality=[row for row in self.quality if (row.case, row.steps) not in cells["quality"]],
            control=[] if "control" in parts else self.control,
        )

    def as_json(self, run: dict[str, Any]) -> str:
        """The file's text: the last run, where each part comes from, comparisons, then every row."""
        content = {
            **run,
            "runs": dict(sorted(self.runs.items())),
            "rows": [*pcm_rounds.compared(self.rounds), *pcm_quality.compared(self.quality)],
            "measured": [row._asdict() for row in self.rounds],
            "quality": [row._asdict() for row in self.quality],
            "classifier": self.classifier,
            "control": self.control,
        }
        return json.dumps(content, indent=1) + "\n"


def control(episodes: int) -> list[dict[str, Any]]:
    """The arm's closed loop, by every sampler that `control_arm.py` has."""
    import control_arm  # needs a simulator

    policy = control_arm.load(ASSETS / "arm")
    return [asdict(row) for steps in _CONTROLLED for row in control_arm.measure(policy, steps, episodes)]


def control_table(rows: list[dict[str, Any]]) -> Any:
    import control_arm

    return control_arm.table([control_arm.Row(**row) for row in rows])


def in_order(rows: list[Any]) -> list[Any]:
    """By case, whichever run measured it; the order of rules, ways and sweeps stays."""
    cells = list(PCMS)
    return sorted(rows, key=lambda row: cells.index((row.case, row.steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", default=",".join(_PARTS))
    parser.add_argument("--cases", default=",".join(f"{name}-{steps}" for name, steps in PCMS))
    parser.add_argument("--steps", default="50", help="of the digits in the part on quality (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=32, help="of the part on rounds (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="of the part on quality (default: %(default)s)")
    parser.add_argument("--sweeps", type=int, default=12, help="most in the part on quality (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=50, help="of the arm, 0 for none (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    parts, cases = options.parts.split(","), [_cell(name) for name in options.cases.split(",")]
    if unknown := [
        *(set(parts) - set(_PARTS)),
        *(f"{name}-{steps}" for name, steps in cases if (name, steps) not in PCMS),
    ]:
        parser.error(f"there is no {', '.join(unknown)}; parts: {', '.join(_PARTS)}; cases: {_names(PCMS)}")
    shown = [it for it in cases if it[0] != "digits" or str(it[1]) in options.steps.split(",")]
    cells = {"rounds": cases if "rounds" in parts else [], "quality": shown if "quality" in parts else []}
    missing = [
        it for it in dict.fromkeys(cells["rounds"] + cells["quality"]) if not (PCMS[it] / "picard.json").is_file()
    ]
    if missing:
        folders = ", ".join(str(PCMS[it]) for it in missing)
        parser.error(
            f"no Picard Consistency Model for {_names(missing)}: train one into {folders} (forerun picard train)"
        )
    torch.set_num_threads(1)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("pcm.json" if device.type == "cpu" else f"pcm-{device.type}.json")
    command = " ".join(["python examples/benchmarks/pcm.py", *sys.argv[1:]])
    run = provenance(device, ("torch", "diffusers", "scikit-learn"), command)
    results = Results.before(path).without(parts if options.episodes else [], cells)
    console = Console(width=None if sys.stdout.isatty() else 130)

    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(cells["rounds"]) * len(pcm_rounds.RULES) + len(cells["quality"]))
        for it in cells["rounds"]:
            case = Case.of(*it, device)
            for rule in pcm_rounds.RULES:
                progress.update(task, description=f"{case}, {rule}")
                results.rounds.extend(pcm_rounds.measure(case, rule, options.seeds))
                progress.advance(task)
            results.runs[f"rounds {it[0]}-{it[1]}"] = run
            path.write_text(results.as_json(run))
        for it in cells["quality"]:
            case = Case.of(*it, device)
            progress.update(task, description=f"{case}, quality")
            features = DigitFeatures.trained() if case.name == "digits" else None
            if features is not None:
                results.classifier.update(features=FEATURES, held_out_accuracy=features.accuracy)
            console.print(f"{case}: {pcm_quality.check(case):.0e} off what exact=False gives")
            results.quality.extend(pcm_quality.measure(case, options.samples, options.sweeps, features))
            results.runs[f"quality {it[0]}-{it[1]}"] = run
            path.write_text(results.as_json(run))
            progress.advance(task)
    if "control" in parts and options.episodes:
        results.control.extend(control(options.episodes))
        results.runs["control"] = run | {"device": "cpu"}
        console.print(control_table(results.control))
    results = results._replace(rounds=in_order(results.rounds), quality=in_order(results.quality))
    path.write_text(results.as_json(run))
    draw(results.rounds, results.quality, path.with_suffix(".png"))
    if results.rounds:
        console.print(rounds_table(results.rounds))
    if results.quality:
        console.print(quality_table(results.quality, "distance"), quality_table(results.quality, "error"))
        console.print(f"classifier: {results.classifier}")
    console.print(comparison_table([*pcm_rounds.compared(results.rounds), *pcm_quality.compared(results.quality)]))


def _cell(name: str) -> Cell:
    case, _, steps = name.rpartition("-")
    return case, int(steps) if steps.isdecimal() else 0


def _names(cells: Any) -> str:
    return ", ".join(f"{name}-{steps}" for name, steps in cells)


if __name__ == "__main__":
    main()
