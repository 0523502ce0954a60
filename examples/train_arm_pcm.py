"""Train the Picard Consistency Models that `control_arm.py` shows: LoRAs of the arm's policy, minutes each on one core.

One for each number of steps: with fewer steps DDIM starts at another noise level and ends at other actions. Needs
gymnasium and mujoco, and the policy's folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from control_arm import ASSETS, PCMS
from diffusion_policy import EXECUTED, HORIZON, ActionUNet, ddim, load
from torch import Tensor
from train_arm import demonstrations

from forerun.picard.diffusers_training import LoopSource
from forerun.picard.switch import Switch
from forerun.picard.training import Training, train

# One age: a second one makes plain iteration faster and the default acceleration slower.
_SHARED = Training(ages=1, learning_rate=4e-4, ema=0.998)
TRAININGS = {
    15: replace(_SHARED, steps=15, turns=150, samples=32, updates=24, measure_every=50),
    100: replace(_SHARED, steps=100, turns=180, samples=16, updates=30, measure_every=30, held_out=8),
}
# Signal to noise from which the PCM answers. The training's own choice weighs errors alike at all points, though those
# at high noise cost more rounds; this one took the fewest rounds on noise and moments that nothing else here uses.
FROM_SIGNAL = {15: 1.2, 100: 1.3}


def source(policy: ActionUNet, episodes: int = 600) -> LoopSource:
    """The policy in stock DDIM, as `act` runs it, on what is seen in so many demonstrations."""
    return LoopSource(policy, ddim(), (HORIZON, len(policy.actions.low)), observations(policy, episodes))


def observations(policy: ActionUNet, episodes: int, after: int = 0) -> Callable[[Sequence[int]], Mapping[str, Tensor]]:
    """The policy's condition `[seeds, O]`: for each seed one of the moments at which it would look at the arm.

    Of so many demonstrations, `after` the first ones.
    """
    seen = policy.observations.normalise(demonstrations(after + episodes)[0][after:, ::EXECUTED]).flatten(0, 1)

    def chosen(seeds: Sequence[int]) -> Mapping[str, Tensor]:
        return {"condition": seen[[int(np.random.default_rng(seed).integers(len(seen))) for seed in seeds]]}

    return chosen


def show(turn: int, loss: float, measured: dict[str, float]) -> None:
    if measured:
        print(f"turn {turn}: loss {loss:.4f}", *(f"{name} {value:.4g}" for name, value in measured.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, choices=TRAININGS, nargs="+", default=list(TRAININGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = source(load(ASSETS))
    for steps in options.steps:
        print(f"{steps} steps, into {PCMS[steps]}")
        pcm = train(base, PCMS[steps], TRAININGS[steps], progress=show)
        replace(pcm, card=replace(pcm.card, switch=Switch((FROM_SIGNAL[steps],)))).save(PCMS[steps])


if __name__ == "__main__":
    main()
