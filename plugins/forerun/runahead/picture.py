"""A split explained: what each engine gets, waits for and sends, and the chain's timeline drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as Rows
from rich.text import Text

from forerun.runahead.chain import Chain, Timeline
from forerun.runahead.partition import Split
from forerun.runahead.traffic import all_gather, hops

__all__ = ["draw", "explain"]

_WAITS, _LINEAR, _ATTENDS = "·", "▒", "█"


def explain(chain: Chain, split: Split, *, cached: int = 0, width: int = 72) -> RenderableType:
    """A row for each engine and the timeline, for `rich.print`."""
    times = chain.timeline(split.contexts, cached)
    engines = len(split.contexts)
    token_bytes = chain.kv_bytes * chain.layers
    sent = [*hops(split.contexts, token_bytes), 0]
    rows = Rows("engine", "from", "to", "tokens", "share", "sends (MB)", "waits", "done")
    for i, (start, end) in enumerate(zip(split.bounds, split.bounds[1:], strict=False)):
        rows.add_row(
            str(i + 1),
            str(cached + start),
            str(cached + end),
            str(end - start),
            f"{(end - start) / split.bounds[-1]:.1%}",
            f"{sent[i] / 1e6:.1f}",
            _seconds(float(times.waits[i])),
            _seconds(float(times.finished[-1, i])),
        )
    parts: list[RenderableType] = [_summary(split, sum(sent), token_bytes), rows]
    parts += [Text(f"{i + 1:>3} {_bar(times, i, width)}") for i in range(engines)]
    last = f"{_seconds(float(times.finished[-1].max())):>{width - 2}}"
    parts += [Text(f"    0 {last}"), Text(f"    {_WAITS} waits  {_LINEAR} all but attention  {_ATTENDS} attention")]
    return Group(*parts)


def draw(chain: Chain, split: Split, path: str | Path, *, cached: int = 0) -> None:
    """Draws the timeline into a picture file: a bar for every engine, its layers side by side.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'forerun[vllm]'") from error
    times = chain.timeline(split.contexts, cached)
    engines = len(split.contexts)
    figure = Figure(figsize=(9, 1.2 + 0.5 * engines), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds since the request", ylabel="engine")
    for i in range(engines):
        ready, started, attended, finished = (
            np.asarray(moments[:, i]) for moments in (times.ready, times.started, times.attended, times.finished)
        )
        begun = np.concatenate([[0.0], finished[:-1]])
        for label, colour, start, end in (
            ("projections", "#8fb3d9", begun, ready),
            ("waits", "#e6e6e6", ready, started),
            ("attention", "#c44e52", started, attended),
            ("rest of the layer", "#4c72b0", attended, finished),
        ):
            spans = list(zip(start.tolist(), (end - start).tolist(), strict=True))
            axes.broken_barh(spans, (i + 0.6, 0.8), facecolors=colour, label=label if i == 0 else None)
    axes.axvline(split.ttft, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(1, engines + 1))
    axes.invert_yaxis()
    axes.set_title(f"first token after {_seconds(split.ttft)}; on one engine {_seconds(split.single)}")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(Path(path), dpi=120)


def _summary(split: Split, sent: int, token_bytes: int) -> str:
    tokens, engines = split.bounds[-1], len(split.contexts)
    if engines == 1:
        return f"{tokens} tokens on one engine: first token after {_seconds(split.single)}; a chain would gain nothing"
    gathered = all_gather(tokens, engines, token_bytes)
    return (
        f"{tokens} tokens over {engines} engines: first token after {_seconds(split.ttft)}, {split.speedup:.2f} times "
        f"sooner than on one ({_seconds(split.single)}); {sent / 1e6:.1f} MB sent ({gathered / 1e6:.1f} by all-gather)"
    )


def _bar(times: Timeline, engine: int, width: int) -> str:
    """What the engine does most of in each of the equal spans up to the last moment of all."""
    begun = np.concatenate([[0.0], times.finished[:-1, engine]])
    spans = (
        (_LINEAR, begun, times.ready[:, engine]),
        (_WAITS, times.ready[:, engine], times.started[:, engine]),
        (_ATTENDS, times.started[:, engine], times.attended[:, engine]),
        (_LINEAR, times.attended[:, engine], times.finished[:, engine]),
    )
    edges = np.linspace(0, float(times.finished[-1].max()), width + 1)
    spent = dict.fromkeys((" ", _WAITS, _LINEAR, _ATTENDS), np.zeros(width))
    for kind, start, end in spans:
        inside = np.minimum(end[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
        spent[kind] = spent[kind] + np.maximum(inside, 0).sum(0)
    busy = sum(spent.values(), np.zeros(width))
    spent[" "] = np.diff(edges) - busy
    kinds = list(spent)
    return "".join(kinds[i] for i in np.argmax(np.stack(list(spent.values())), 0))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
