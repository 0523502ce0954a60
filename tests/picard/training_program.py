"""Trains a small PCM into a folder; `test_training.py` kills it on the way, and runs two of it as one.

python training_program.py OUT TURNS [CACHE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
from sequences import Net

from forerun.picard.consistency import Consistency
from forerun.picard.diffusers_training import LoopSource
from forerun.picard.training import Training, train

SHAPE = (3, 4, 4)
CHOICES = {"steps": 6, "rank": 4, "samples": 4, "updates": 4, "batch": 16, "held_out": 4, "measure_every": 2}


def source() -> LoopSource:
    return LoopSource(Net(), diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False), SHAPE)


def run(out: Path, turns: int, **more: object) -> Consistency:
    def progress(turn: int, loss: float, measured: dict[str, float]) -> None:
        print(turn, loss, flush=True)

    return train(source(), out, Training(**{**CHOICES, "turns": turns}), progress=progress, **more)


if __name__ == "__main__":
    made = run(Path(sys.argv[1]), int(sys.argv[2]), cache=Path(sys.argv[3]) if sys.argv[3:] else None)
    print("weights", sum(float(up.double().sum() + down.double().sum()) for down, up in made.change.layers.values()))
