"""Runs a training from its settings, and shows how it goes: behind `forerun picard train`."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forerun.picard.diffusers_training import PipelineSource
from forerun.picard.train_settings import TrainSettings
from forerun.picard.training import Training, train
from forerun_adapters import diffusers as host

__all__ = ["run"]


def run(settings: TrainSettings) -> str:
    """Trains, and returns one line that says what came of it.

    Raises:
        OSError: The pipeline cannot be read, or the result cannot be written.
        TypeError: An unknown choice of training.
        ValueError: A choice out of range, or a pipeline that cannot be trained.
    """
    training = Training(**settings.training)
    source = PipelineSource(host.load_pipeline(settings.pipeline, _device(settings.device)), **settings.call)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bar:
        task = bar.add_task("", total=training.turns)
        held_out = ""

        def show(turn: int, loss: float, measured: dict[str, float]) -> None:
            nonlocal held_out
            if measured:
                held_out = f", held out: {measured['rounds']:.0f} rounds, {measured['rounds_without']:.0f} without"
            bar.update(task, completed=turn, description=f"loss {loss:.4f}{held_out}")

        cache = None if settings.cache is None else Path(settings.cache)
        pcm = train(source, Path(settings.out), training, cache=cache, progress=show)
    last = pcm.card.training["history"][-1]
    return (
        f"{settings.out}: {last['rounds']:.0f} rounds on noise not trained on, {last['rounds_without']:.0f} without; "
        f"mean squared error {last['error']:.4f}, the base model's {last['base_error']:.4f}"
    )


def _device(asked: str) -> str:
    """Where this process is to have the pipeline: of several that accelerate started, each has its own device."""
    from accelerate import PartialState

    state = PartialState(cpu=asked == "cpu")  # before anything is loaded: "cuda" is the process's own from here on
    return asked if state.num_processes == 1 else str(state.device)
