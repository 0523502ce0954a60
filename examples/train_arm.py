"""Train the diffusion policy that `control_arm.py` runs: behaviour cloning of a scripted expert, minutes on one core.

The expert moves gymnasium's Reacher-v5 to its target by inverse kinematics. Two postures of the arm reach any target,
elbow to the left or to the right, and the expert picks one at random: an average of its demonstrations reaches none.

Writes a policy folder (`--out`, default `examples/assets/arm`) and in it `training.json`: the loss on demonstrations
held out of the training, and how often the expert and the policy reach their target. Needs gymnasium and mujoco.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from control_arm import ASSETS, FIRST_SEED, SHOWN, Controller, Sampler, play, run_episode, servo
from diffusers import DDIMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from diffusion_policy import HORIZON, ActionUNet, Limits, ddim, load, save
from rich.progress import track
from torch import Tensor

LINKS = (0.1, 0.11)  # m, shoulder to elbow and elbow to fingertip
STRETCH = 2.95  # rad, the most that the expert bends the elbow; the joint stops at 3
LASTING = 50  # control steps of an episode


class Expert:
    """Brings the fingertip to the target with one posture: smooth, and the same speeds from the same state.

    Args:
        elbow: 1 or -1, the sign of the elbow's angle.
    """

    def __init__(self, elbow: int) -> None:
        self._elbow = elbow

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """The joints' speeds `[1, 2]` (rad/s) for one control step."""
        angles = np.arctan2(observation[2:4], observation[:2])  # rad
        error = self._posture(*observation[4:6]) - angles
        error[0] = (error[0] + np.pi) % (2 * np.pi) - np.pi  # the shoulder turns the shorter way
        return 7 * np.tanh(error[None] * 6 / 7)  # 6 times the error, at most 7

    def _posture(self, x: float, y: float) -> np.ndarray:
        """The joints' angles `[2]` (rad) that put the fingertip at a point (m)."""
        near, far = LINKS
        bend = np.arccos(np.clip((x * x + y * y - near * near - far * far) / (2 * near * far), -1, 1))
        elbow = self._elbow * min(bend, STRETCH)
        shoulder = np.arctan2(y, x) - np.arctan2(far * np.sin(elbow), near + far * np.cos(elbow))
        return np.array([shoulder, elbow])


def demonstrations(episodes: int) -> tuple[Tensor, Tensor]:
    """What the policy is shown `[episodes, 50, 8]` and the expert did from then on `[episodes, 50, H, 2]`.

    Half of the episodes start where a knock has left the arm, so that the policy sees how its own errors are put right.
    """
    generator = np.random.default_rng(0)
    seen, done = np.empty((episodes, LASTING, len(SHOWN))), np.empty((episodes, LASTING + HORIZON, 2))
    with gymnasium.make("Reacher-v5", max_episode_steps=2 * LASTING + HORIZON) as arm:
        for episode in track(range(episodes), description="demonstrations"):
            observation, _ = arm.reset(seed=episode)
            expert = Expert(generator.choice((-1, 1)))
            if episode % 2:
                for _ in range(generator.integers(LASTING)):
                    observation = arm.step(servo(observation, expert(observation)[0]))[0]
                observation = _knock(arm, generator)
            for step in range(LASTING + HORIZON):
                if step < LASTING:
                    seen[episode, step] = observation[SHOWN]
                done[episode, step] = expert(observation)[0]
                observation = arm.step(servo(observation, done[episode, step]))[0]
    ahead = np.arange(LASTING)[:, None] + np.arange(HORIZON)
    return torch.tensor(seen, dtype=torch.float32), torch.tensor(done[:, ahead], dtype=torch.float32)


def _knock(arm: gymnasium.Env, generator: np.random.Generator) -> np.ndarray:
    """Moves the joints by some 0.3 rad and 1 rad/s; the observation after it."""
    simulator = arm.unwrapped
    angles, speeds = simulator.data.qpos.copy(), simulator.data.qvel.copy()
    angles[:2] += generator.normal(0, 0.3, 2)
    angles[1] = np.clip(angles[1], -STRETCH, STRETCH)
    speeds[:2] += generator.normal(0, 1, 2)
    simulator.set_state(angles, speeds)
    return simulator._get_obs()


def noise_loss(
    model: ActionUNet, scheduler: DDIMScheduler, seen: Tensor, done: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted noise at uniform timesteps, for normalised `[B, O]` and `[B, H, A]`."""
    noise = torch.randn(done.shape, generator=generator)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(done),), generator=generator)
    predicted = model(scheduler.add_noise(done, noise, timesteps), timesteps, seen)
    return torch.nn.functional.mse_loss(predicted, noise)


@torch.no_grad()
def held_out_loss(model: ActionUNet, scheduler: DDIMScheduler, seen: Tensor, done: Tensor) -> float:
    return float(noise_loss(model.eval(), scheduler, seen, done, torch.Generator().manual_seed(1)))


def train(steps: int, batch: int, episodes: int, tries: int, out: Path) -> dict[str, float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    seen, done = demonstrations(episodes)
    model, scheduler = ActionUNet(Limits.of(seen), Limits.of(done)), ddim()
    held_out = episodes // 20  # whole episodes: their windows overlap
    seen, done = model.observations.normalise(seen), model.actions.normalise(done)
    checked = seen[:held_out].flatten(0, 1), done[:held_out].flatten(0, 1)
    seen, done = seen[held_out:].flatten(0, 1), done[held_out:].flatten(0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-6)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    start, losses = time.perf_counter(), []
    for _ in track(range(steps), description="training"):
        rows = torch.randint(0, len(seen), (batch,), generator=generator)
        loss = noise_loss(model, scheduler, seen[rows], done[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - start
    ema.copy_to(model.parameters())
    save(model, out)
    model = load(out)  # as it is used: in half precision on disk
    result = {
        "demonstrations": episodes,
        "steps": steps,
        "batch": batch,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_loss": round(float(np.mean(losses[-100:])), 5),
        "held_out_loss": round(held_out_loss(model, scheduler, *checked), 5),
        "tries": tries,
        "expert_success": expert_success(tries),
        "policy_success": policy_success(model, 15, tries),
    }
    (out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def expert_success(tries: int) -> float:
    """The share of episodes, those of `control_arm.py`, in which the expert reaches its target."""
    generator = np.random.default_rng(1)
    with gymnasium.make("Reacher-v5") as arm:
        seeds = range(FIRST_SEED, FIRST_SEED + tries)
        return float(np.mean([run_episode(arm, Expert(generator.choice((-1, 1))), seed).success for seed in seeds]))


def policy_success(model: ActionUNet, steps: int, tries: int) -> float:
    """The same for the policy, sampled by stock DDIM in so many steps."""
    controller = Controller(Sampler("diffusers DDIM, sequential", model, ddim()), steps)
    return float(np.mean([it.success for it in play(controller, tries, "the policy's episodes")]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--demonstrations", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=50, help="episodes for the success rates")
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(train(options.steps, options.batch, options.demonstrations, options.tries, options.out)))
