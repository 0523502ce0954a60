"""Training a Picard Consistency Model: fresh trajectories, the very sweeps that will be run, a LoRA on the base model.

A turn makes trajectories from new noise (or takes them from the cache), runs the sweeps that the PCM as it stands would
run from the same noise, and fits the LoRA to what should have been answered there (`objective.py`). Its exponential
moving average is what is run, saved, and measured on noise that is never trained on.

Everything of a turn follows from its number and the checkpoint before it: a training that was killed goes on to the
same result.

Source: arXiv 2503.19731, section 3.2 and appendix (Adam, EMA); iterates of the PCM itself in place of the base model's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Protocol

from forerun.picard.consistency import Consistency, check_folder, files_of
from forerun.picard.trainer import CHECKPOINT, Trainer
from forerun.picard.training_choices import Source, Training

__all__ = ["Progress", "Source", "Training", "train"]


class Progress(Protocol):
    def __call__(self, turn: int, loss: float, measured: dict[str, float]) -> None:
        """Is told of every turn; `measured` is empty but for those that measured."""


def train(
    source: Source,
    out: Path,
    training: Training,
    *,
    cache: Path | None = None,
    progress: Progress = lambda turn, loss, measured: None,
) -> Consistency:
    """Trains a PCM, saves it into `out`, and returns it. Goes on from a checkpoint that is there.

    Args:
        source: The base model in its sampler. Its module is not changed.
        out: Folder of the result, and of the checkpoint until then.
        training: The choices.
        cache: Folder of trajectories to keep, and to take those from that are there.
        progress: Is told how it goes.

    Raises:
        ValueError: The checkpoint in `out` is of another training, or the module cannot be trained as asked.
        FileExistsError: `out` holds a model or a LoRA that is no PCM's.
        OSError: The disk does not take the result; no broken file is left.
    """
    check_folder(out, files_of(whole=training.full))  # now, not when the training is over
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undone:
        trainer = Trainer(source, out, training, cache, undone)
        for turn in range(trainer.turn, training.turns):
            loss = trainer.run_turn(turn)
            last = turn + 1 == training.turns
            measured = trainer.measure() if last or (turn + 1) % training.measure_every == 0 else {}
            if measured:
                trainer.checkpoint(turn + 1)
            progress(turn + 1, loss, measured)
        pcm = trainer.consistency()
    if trainer.accelerator.is_main_process:
        pcm.save(out)
        (out / CHECKPOINT).unlink(missing_ok=True)
    return pcm
