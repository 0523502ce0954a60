"""Drive a simulated two-link arm by a diffusion policy, its actions sampled one step after the other and in parallel.

    python examples/control_arm.py --out build/arm.json

Every sampler runs the same episodes of gymnasium's Reacher-v5 (MuJoCo) from the same noise. Prints a table: success,
return, rounds and latency of an action chunk, and the largest difference to the chunk that stock DDIM makes of the same
observation and noise. A Picard Consistency Model (PCM) takes part where one was trained for the steps. Approximate rows
end after two rounds, wherever their trajectory is then; "slope only" is a PCM that changes nothing. Needs gymnasium and
mujoco, no display.

The policy's actions are the joints' speeds, which a servo holds at every control step: between two looks at the arm, a
policy that gave torques would have its small errors summed twice.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from diffusion_policy import EXECUTED, ActionUNet, act, ddim, load
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from forerun.picard.consistency import Base, Consistency
from forerun.picard.diffusers import parallel
from forerun.picard.lora import Lora

ASSETS = Path(__file__).parent / "assets" / "arm"
PCMS = {15: ASSETS / "pcm", 100: ASSETS / "pcm-100"}  # by the steps that each is for; train_arm_pcm.py makes them
# Of the policy's actions (in [-1, 1]) given what it sees; forerun's default is that of images. No training needed.
DATA_VARIANCE = 0.01
MOTOR = 200.0  # N m, a motor's largest torque; both joints' inertia is about 1 kg m2, their damping 1 N m s
SERVO = 15.0  # N m for each rad/s that a joint is off its speed
SETTLED = 10  # control steps at the end of an episode (50 of 20 ms) that count for success
REACHED = 0.02  # m, mean distance of fingertip and target over those steps
# Of an observation, what the policy is shown: angles, target, fingertip. From the joints' speeds it would learn to go
# on as it does, and halt beside the target (causal confusion in imitation learning, arXiv 1905.11979).
SHOWN = [0, 1, 2, 3, 4, 5, 8, 9]
FIRST_SEED = 100_000  # of the episodes here, far from those of the demonstrations

Chooser = Callable[[np.ndarray], np.ndarray]  # an observation [10] to the next control steps' speeds [n, 2], rad/s


@dataclass(frozen=True)
class Episode:
    """One try at a target."""

    reward: float  # summed over the episode: minus distance (m) and minus squared torque, as Reacher-v5 has it
    distance: float  # m, mean of the last `SETTLED` control steps

    @property
    def success(self) -> bool:
        return self.distance < REACHED


def run_episode(arm: gymnasium.Env[Any, Any], choose: Chooser, seed: int) -> Episode:
    """Moves the arm until the environment's time is up; `choose` is asked again when its speeds are used up."""
    observation, _ = arm.reset(seed=seed)
    rewards, distances, over = [], [], False
    while not over:
        for speeds in choose(observation):
            observation, reward, _, over, _ = arm.step(servo(observation, speeds))
            rewards.append(float(reward))
            distances.append(float(np.linalg.norm(observation[8:10])))  # from the target to the fingertip
            if over:
                break
    return Episode(sum(rewards), float(np.mean(distances[-SETTLED:])))


def servo(observation: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    """Torques `[2]` in [-1, 1] that bring the joints to `speeds` (rad/s) and make up for their damping."""
    turning = observation[6:8]  # rad/s
    return np.clip((SERVO * (speeds - turning) + turning) / MOTOR, -1, 1)


@dataclass(frozen=True)
class Sampler:
    """A way to sample the policy's actions."""

    name: str
    model: torch.nn.Module
    scheduler: Any


def ways(pcm: Consistency | None) -> dict[str, dict[str, Any]]:
    """Options of `parallel` by the name of their row; those with a PCM where there is one."""
    plain: dict[str, Any] = {"acceleration": "none"}
    early = {"exact": False, "sweeps": 2}
    found = {
        "plain Picard iteration": plain,
        "plain + PCM": plain | {"pcm": pcm},
        "forerun's default": {},
        "default + PCM": {"pcm": pcm},
        "default, data_variance fitted": {"data_variance": DATA_VARIANCE},
        "approximate: plain": plain | early,
        "approximate: plain, slope only": plain | early | {"pcm": pcm and slope_only(pcm)},
        "approximate: plain + PCM": plain | early | {"pcm": pcm},
        "approximate: default": early,
        "approximate: default + PCM": early | {"pcm": pcm},
    }
    return {name: options for name, options in found.items() if pcm is not None or "pcm" not in options}


def slope_only(pcm: Consistency) -> Consistency:
    """The PCM with a LoRA that changes nothing: its sweeps carry the policy's own answers along the same slope.

    What a sampler with it gains is not the training's.
    """
    assert isinstance(pcm.change, Lora)
    return replace(pcm, change=replace(pcm.change, scale=0.0))


def samplers(policy: ActionUNet, pcm: Consistency | None) -> Iterable[Sampler]:
    """The table's rows, stock DDIM first; each has a copy of the policy, as `parallel` hooks what it is given."""
    yield Sampler("diffusers DDIM, sequential", copy.deepcopy(policy), ddim())
    for name, options in ways(pcm).items():
        model = copy.deepcopy(policy)
        yield Sampler(name, model, parallel(model, ddim(), check_cost=False, **options))


def trained_pcm(policy: ActionUNet, steps: int) -> Consistency | None:
    """The PCM for that many steps, if there is one and it is this policy's."""
    folder = PCMS.get(steps)
    if folder is None or not folder.is_dir():
        return None
    pcm = Consistency.load(folder)
    return pcm if pcm.card.base.same(Base.of(policy, "")) else None


@dataclass(frozen=True)
class Chunk:
    """One call of the sampler."""

    rounds: int  # model calls one after the other
    evaluations: int  # points the model was asked at
    seconds: float
    difference: float  # rad/s, the largest of the chunk to stock DDIM's actions


class Controller:
    """A `Chooser` that samples its actions, and notes what each chunk took.

    Args:
        sampler: What it samples with.
        steps: Of the sampler.
        stock: What the actions are compared with; None for no comparison.
    """

    def __init__(self, sampler: Sampler, steps: int, stock: Sampler | None = None) -> None:
        self.chunks: list[Chunk] = []
        self._sampler, self._stock, self._steps = sampler, stock, steps
        self._noise = torch.Generator()

    def begin_episode(self, seed: int) -> None:
        self._noise.manual_seed(seed)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        condition = torch.tensor(observation[SHOWN], dtype=torch.float32)[None]
        before = self._noise.get_state()
        start = time.perf_counter()
        actions = self._sample(self._sampler, condition)
        seconds = time.perf_counter() - start
        difference = 0.0
        if self._stock is not None:
            self._noise.set_state(before)
            difference = float((actions - self._sample(self._stock, condition)).abs().max())
        report = getattr(self._sampler.scheduler, "report", None)
        rounds, evaluations = (self._steps, self._steps) if report is None else (report.rounds, report.evaluations)
        self.chunks.append(Chunk(rounds, evaluations, seconds, difference))
        return actions[0, :EXECUTED].numpy()

    def _sample(self, sampler: Sampler, condition: Tensor) -> Tensor:
        return act(sampler.model, sampler.scheduler, condition, self._noise, self._steps)


@dataclass(frozen=True)
class Row:
    """What one sampler did in all episodes."""

    sampler: str
    steps: int
    episodes: int
    success: float  # share of the episodes
    success_low: float  # 95% Wilson interval
    success_high: float
    reward: float  # mean of an episode's return
    rounds: float  # mean of a chunk
    evaluations: float  # mean of a chunk
    latency: float  # s a chunk, mean
    latency_p95: float  # s a chunk
    difference: float  # rad/s, the largest of all chunks


def measure(policy: ActionUNet, steps: int, episodes: int) -> list[Row]:
    """All samplers at that many steps, on the same episodes."""
    rows = []
    stock: Sampler | None = None
    for sampler in samplers(policy, trained_pcm(policy, steps)):
        controller = Controller(sampler, steps, stock)
        stock = stock or sampler
        tries = list(play(controller, episodes, f"{sampler.name}, {steps} steps"))
        low, high = wilson(sum(it.success for it in tries), episodes)
        seconds = [chunk.seconds for chunk in controller.chunks]
        rows.append(
            Row(
                sampler=sampler.name,
                steps=steps,
                episodes=episodes,
                success=float(np.mean([it.success for it in tries])),
                success_low=low,
                success_high=high,
                reward=float(np.mean([it.reward for it in tries])),
                rounds=float(np.mean([chunk.rounds for chunk in controller.chunks])),
                evaluations=float(np.mean([chunk.evaluations for chunk in controller.chunks])),
                latency=float(np.mean(seconds)),
                latency_p95=float(np.percentile(seconds, 95)),
                difference=max(chunk.difference for chunk in controller.chunks),
            )
        )
    return rows


def play(controller: Controller, episodes: int, title: str) -> Iterable[Episode]:
    with gymnasium.make("Reacher-v5") as arm:
        controller(arm.reset(seed=0)[0])  # warms up
        controller.chunks.clear()
        for seed in track(range(FIRST_SEED, FIRST_SEED + episodes), description=title, transient=True):
            controller.begin_episode(seed)
            yield run_episode(arm, controller, seed)


def wilson(successes: int, tries: int) -> tuple[float, float]:
    """The 95% confidence interval of a share (Wilson, 1927)."""
    z, share = 1.959964, successes / tries
    centre = share + z * z / (2 * tries)
    half = z * math.sqrt(share * (1 - share) / tries + z * z / (4 * tries * tries))
    return (centre - half) / (1 + z * z / tries), (centre + half) / (1 + z * z / tries)


def table(rows: list[Row]) -> Table:
    made = Table("steps", "sampler")
    for name in ("success (95%)", "return", "rounds", "evaluations", "ms a chunk (p95)", "rad/s off"):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            str(row.steps),
            row.sampler,
            f"{row.success:.0%} ({row.success_low:.0%}-{row.success_high:.0%})",
            f"{row.reward:.2f}",
            f"{row.rounds:.1f}",
            f"{row.evaluations:.0f}",
            f"{row.latency * 1e3:.1f} ({row.latency_p95 * 1e3:.1f})",
            f"{row.difference:.1e}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="policy folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 100])
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    options = parser.parse_args()
    if not (options.assets / "config.json").is_file():
        parser.error(f"{options.assets} is not a policy folder; examples/train_arm.py makes one")
    torch.set_num_threads(1)
    policy = load(options.assets)
    rows = [row for steps in options.steps for row in measure(policy, steps, options.episodes)]
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        hosts = ("torch", "diffusers", "gymnasium", "mujoco")
        setting = {"processor": platform.machine(), "threads": 1, **{name: version(name) for name in hosts}}
        told = {"setting": setting, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
