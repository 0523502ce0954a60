"""The state of a training of a Picard Consistency Model, turn by turn; `training.py` runs it."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from forerun._files import write_whole
from forerun.picard.adapted import Adapted, AdaptedLora, AdaptedWeights
from forerun.picard.change import Change
from forerun.picard.consistency import Base, Card, Consistency
from forerun.picard.levels import NoiseLevels
from forerun.picard.lora import Lora
from forerun.picard.objective import Objective, PointObjective, Rows, rows_of
from forerun.picard.sweep_objective import SweepObjective
from forerun.picard.switch import Switch
from forerun.picard.training_choices import Source, Training
from forerun.picard.trajectories import Trajectory, cached, first_tensor
from forerun.picard.weights import Weights

__all__ = ["CHECKPOINT", "Trainer"]

CHECKPOINT = "checkpoint.pt"
_HELD_OUT = 1_000_000_000  # seeds from here on are never trained on


class Trainer:
    """The state of a training; what it does to the module is `undone`."""

    def __init__(
        self, source: Source, out: Path, training: Training, cache: Path | None, undone: contextlib.ExitStack
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision, cpu=next(source.module.parameters()).device.type == "cpu"
        )
        self._source, self._out, self._training = source, out, training
        self._fingerprint = source.fingerprint()
        self._cache = None if cache is None else cache / self._fingerprint
        self._levels, self._slope = source.levels(training.steps, training.data_variance)
        for parameter in source.module.parameters():
            if parameter.requires_grad:
                undone.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        if training.gradient_checkpointing:
            source.checkpoint_gradients(True)
            undone.callback(source.checkpoint_gradients, False)
        self._adapted = self._adapt()
        undone.callback(self._adapted.release)
        self._optimizer = torch.optim.Adam(self._adapted.parameters(), training.learning_rate)
        self._ema = {name: value.detach().clone() for name, value in self._adapted.named_parameters()}
        self._switch = Switch((0.0,) * training.ages, watch=False)
        self._likely = torch.ones(training.ages, training.steps)
        self._history: list[dict[str, float]] = []
        self._updates = 0
        self._base = Base.of(source.module, source.name)
        self._plain_rounds = self._rounds(None)
        self.turn = self._resume()
        self._model, self._stepper = self.accelerator.prepare(self._adapted, self._optimizer)

    def run_turn(self, turn: int) -> float:
        """New trajectories and the updates on them; the mean loss."""
        training = self._training
        number = turn if training.pool is None else turn % training.pool
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        first = (number * count + process) * training.samples
        rows, finished = self._rows(list(range(first, first + training.samples)))
        generator = torch.Generator().manual_seed(training.seed + turn)
        objective, losses = self._objective(finished), []
        for _ in range(training.updates):
            chosen = rows[objective.pick(rows, generator)]
            losses.append(self._update(chosen, finished, objective))
        return sum(losses) / len(losses)

    def measure(self) -> dict[str, float]:
        """Errors and rounds on the held-out noise; where the PCM is better than the base becomes the switch."""
        rows, finished = self._rows(self._held_out_seeds())
        objective = self._objective(finished)
        base, pcm = (
            objective.table(self._answers(rows, finished, change), rows) for change in (None, self._averaged())
        )
        if base.shape == self._likely.shape:
            self._likely = base.sqrt() / base.sqrt().mean() + 0.05
        self._switch = _best_switch(base, pcm, self._levels)
        measured = {
            "base_error": float(base.mean()),
            "error": float(pcm.mean()),
            "rounds": float(self._rounds(self.consistency())),
            "rounds_without": float(self._plain_rounds),
        }
        self._history.append({"updates": self._updates, **measured})
        return measured

    def consistency(self) -> Consistency:
        """The PCM as it stands."""
        source, training = self._source, self._training
        card = Card(
            base=self._base,
            scheduler=source.scheduler,
            scheduler_config=source.scheduler_config,
            steps=training.steps,
            switch=Switch(self._switch.from_signal),
            rank=None if training.full else training.rank,
            data_variance=training.data_variance,
            component=source.component,
            training={**asdict(training), "history": self._history},
        )
        return Consistency(card, self._averaged())

    def checkpoint(self, turn: int) -> None:
        """Writes all that later turns depend on."""
        if not self.accelerator.is_main_process:
            return
        content = io.BytesIO()
        state = {
            "training": self._identity(),
            "turn": turn,
            "updates": self._updates,
            "parameters": self._adapted.state_dict(),
            "average": self._ema,
            "optimizer": self._optimizer.state_dict(),
            "likely": self._likely,
            "switch": list(self._switch.from_signal),
            "history": self._history,
        }
        torch.save(state, content)
        write_whole(self._out / CHECKPOINT, content.getvalue())

    def _adapt(self) -> Adapted:
        source, training = self._source, self._training
        if training.full:
            return AdaptedWeights(source.module, source.config)
        return AdaptedLora(source.module, training.rank, torch.Generator().manual_seed(training.seed))

    def _resume(self) -> int:
        """Goes back to the checkpoint, if there is one; the turn to go on with."""
        path = self._out / CHECKPOINT
        if not path.is_file():
            return 0
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["training"] != self._identity():
            raise ValueError(
                f"{path} is of another training ({state['training']}, this one: {self._identity()}); go on with its "
                "model and choices, or give another folder"
            )
        self._adapted.load_state_dict(state["parameters"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self._ema[name].copy_(value)
        self._updates, self._likely, self._history = state["updates"], state["likely"], state["history"]
        self._switch = Switch(tuple(state["switch"]), watch=False)
        turn: int = state["turn"]
        return turn

    def _identity(self) -> str:
        return json.dumps({"source": self._fingerprint, **asdict(self._training)})

    def _rows(self, seeds: list[int]) -> tuple[Rows, list[Trajectory]]:
        steps, ages = self._training.steps, self._training.ages
        with torch.no_grad():
            finished = self._finished(seeds)
            asked = self._source.asked(steps, seeds, self.consistency(), ages)
        return rows_of(finished, asked, self._slope), finished

    def _finished(self, seeds: list[int]) -> list[Trajectory]:
        def make() -> list[Trajectory]:
            return self._source.finished(self._training.steps, seeds)

        if self._cache is None:
            return make()
        return cached(self._cache / f"{self._training.steps}-{seeds[0]}-{len(seeds)}", make)

    def _objective(self, finished: list[Trajectory]) -> Objective:
        training = self._training
        if training.objective == "points":
            return PointObjective(self._likely, training.batch)
        sweeps = max(1, training.batch // training.steps)
        return SweepObjective(self._source.solver(training.steps), self._slope, finished, sweeps)

    def _update(self, rows: Rows, finished: list[Trajectory], objective: Objective) -> float:
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * self._rate()
        self._stepper.zero_grad()
        with self._adapted.on_all(len(rows)):
            with self.accelerator.autocast():
                answers = self._ask(self._model, rows, finished)
                loss = objective.loss(answers, rows)
            self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self._adapted.parameters(), 1.0)
        self._stepper.step()
        decay = min(self._training.ema, (1 + self._updates) / (10 + self._updates))
        with torch.no_grad():
            for name, value in self._adapted.named_parameters():
                self._ema[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    def _rate(self) -> float:
        """Of the learning rate: a warm-up over a fiftieth of the training, then a cosine."""
        whole = self._training.turns * self._training.updates
        return min(1.0, 50 * self._updates / whole) * (0.51 + 0.49 * math.cos(math.pi * self._updates / whole))

    def _ask(self, model: Callable[..., Any], rows: Rows, finished: list[Trajectory]) -> Tensor:
        """`[N, ...]` the model's answers at rows, each under its own conditioning."""
        device = next(self._source.module.parameters()).device
        times = finished[0].times[rows.points].to(device)
        given = {self._source.sample_name: rows.samples.to(device), self._source.time_name: times}
        others = {name: self._conditioning(name, rows, finished, device) for name in finished[0].others}
        return first_tensor(model(**given, **others))

    def _conditioning(self, name: str, rows: Rows, finished: list[Trajectory], device: torch.device) -> Any:
        values = [trajectory.others[name] for trajectory in finished]
        if name in self._source.unbatched:
            return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), values[0])
        count = finished[0].inputs.shape[1]
        return pytree.tree_map(lambda *leaves: _gathered(leaves, rows.owners, count, device), *values)

    @torch.no_grad()
    def _answers(self, rows: Rows, finished: list[Trajectory], change: Change | None) -> Tensor:
        """`[N, ...]` of the base model, or of the change, on the CPU."""
        module, found = self._source.module, []
        device = next(module.parameters()).device
        with contextlib.ExitStack() as stack:
            ours = None if change is None else change.on(module)
            if ours is not None:
                stack.callback(ours.remove)
            for start in range(0, len(rows), self._training.batch):
                part = rows[torch.arange(start, min(start + self._training.batch, len(rows)))]
                ask = partial(self._ask, module, part, finished)
                answers: Tensor = ask() if ours is None else ours.answer(ask, torch.ones(len(part)), device)
                found.append(answers.cpu())
        return torch.cat(found)

    def _averaged(self) -> Lora | Weights:
        return self._adapted.change(self._ema)

    def _rounds(self, pcm: Consistency | None) -> int:
        training = self._training
        return self._source.rounds(training.steps, self._held_out_seeds(), pcm, training.data_variance)

    def _held_out_seeds(self) -> list[int]:
        return list(range(_HELD_OUT, _HELD_OUT + self._training.held_out))


def _best_switch(base: Tensor, pcm: Tensor, levels: NoiseLevels) -> Switch:
    """For every age, the noise below which the PCM answers better than the base; `[ages, T or 1]` errors."""
    signal = levels.alpha / levels.sigma
    found = []
    for gain in base - pcm:
        below = gain.flip(0).cumsum(0).flip(0)  # of answering from a point on
        start = int(below.argmax())
        if below[start] <= 0:
            break
        found.append(float(signal[start]) * 0.999)
    return Switch(tuple(found) or (1e9,), watch=False)


def _gathered(values: Sequence[Any], owners: Tensor, rows: int, device: torch.device) -> Any:
    """An argument for rows that belong to different trajectories."""
    if not isinstance(values[0], Tensor):
        return values[0]
    if values[0].ndim == 0 or values[0].shape[0] == 1 != rows:
        return values[0].to(device)
    if values[0].shape[0] != rows:
        raise ValueError(f"an argument of the model has {values[0].shape[0]} rows where its samples have {rows}")
    found: Tensor = torch.stack(list(values)).to(device)[owners[:, 0].to(device), owners[:, 1].to(device)]
    return found
