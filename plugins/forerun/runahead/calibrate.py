"""A chain's model measured on the engines themselves, over the API that they serve.

1. Prefills, by all engines at once as in a chain: prompts of several lengths, with and without a cached beginning.
2. The same on one engine while the others rest: what the others cost it (they share memory, or a socket).
3. Chains whose time tells most of the link: nearly all tokens on the engines before, and an even split.

Source: KV-Runahead, arXiv 2405.05329, section 4.2: the table is made from measured prefills.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.optimize import least_squares

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Compute, Link, fit_cost
from forerun.runahead.engine_client import EngineClient, Prompt, chain_parts
from forerun.runahead.partition import search
from forerun.runahead.shape import Shape

__all__ = ["Calibration", "Run", "calibrate", "fit_chain", "time_chain"]


@dataclass(frozen=True)
class Run:
    """One measured chain."""

    contexts: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the model of the chain that follows.

    Args:
        chain: Cost, link and shape.
        crowding: How much longer a prefill takes while all engines compute (1: not at all).
        computes: The prefills that the cost was fitted to.
        runs: The chains that the link was fitted to.
        error: The largest relative error of the model over `runs`.
    """

    chain: Chain
    crowding: float
    computes: tuple[Compute, ...]
    runs: tuple[Run, ...]
    error: float


def calibrate(
    engines: Sequence[EngineClient],
    shape: Shape,
    lengths: Sequence[int],
    *,
    block: int,
    vocabulary: int,
    caches: bool,
    repeats: int = 3,
    told: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measures engines that do nothing else.

    Args:
        engines: R, in the order of the chain; one: nothing is known of a link, and its time is taken as 0.
        shape: Of the model.
        lengths: Tokens of the prompts to measure; two different ones at least.
        block: Contexts begin at multiples of so many tokens.
        vocabulary: Token ids are drawn below it.
        caches: The engines keep prefixes: prefills with a cached beginning can be measured too.
        repeats: Of every measurement; the median counts.
        told: Is given a line a measurement.

    Raises:
        ValueError: There are too few lengths, or one has no two blocks.
        RuntimeError: An engine failed to answer, or not in time.
    """
    ordered = sorted(set(lengths))
    if len(ordered) < 2 or ordered[0] < 2 * block or repeats < 1:
        raise ValueError(
            f"lengths are {ordered} and repeats {repeats}; expected two lengths of {2 * block} or more, and 1"
        )
    prompts = Prompt(vocabulary)
    for engine in engines:
        engine.prefill(prompts(2 * block))  # the first request is slow
    pairs = [(n, 0) for n in ordered]
    pairs += [(n - past, past) for n in ordered if caches and (past := n // 2 // block * block)]
    computes = []
    for n, past in pairs:
        seconds = statistics.median(_together(engines, prompts, n, past) for _ in range(repeats))
        computes.append(Compute(n, past, seconds))
        told(f"{n} tokens after {past}: {seconds:.3f} s")
    longest = ordered[-1]
    alone = statistics.median(_together(engines[:1], prompts, longest, 0) for _ in range(repeats))
    crowding = max(1.0, next(c.seconds for c in computes if (c.tokens, c.past) == (longest, 0)) / alone)
    told(f"{longest} tokens, one engine alone: {alone:.3f} s")
    chain = Chain(fit_cost(computes), Link(np.inf), shape.layers, shape.kv_bytes, shape.before)
    runs = []
    for contexts in _telling(chain, ordered, len(engines), block):
        seconds = statistics.median(time_chain(engines, prompts(sum(contexts)), contexts) for _ in range(repeats))
        runs.append(Run(contexts, seconds))
        told(f"chain {'+'.join(map(str, contexts))}: {seconds:.3f} s")
    chain, error = fit_chain(chain, runs)
    return Calibration(chain, crowding, tuple(computes), tuple(runs), error)


def time_chain(engines: Sequence[EngineClient], tokens: Sequence[int], contexts: Sequence[int]) -> float:
    """Seconds until the last engine of a chain has the first token.

    Raises:
        RuntimeError: An engine failed to answer, or not in time.
    """
    parts = chain_parts(os.urandom(16), contexts, [engine.address for engine in engines])
    with ThreadPoolExecutor(len(parts)) as pool:
        began = time.monotonic()
        asked = [
            pool.submit(engine.prefill, tokens[: part["end"]], part)
            for engine, part in zip(engines, parts, strict=False)
        ]
        asked[-1].result()
        took = time.monotonic() - began
        for one in asked:
            one.result()
    return took


def fit_chain(chain: Chain, runs: Sequence[Run]) -> tuple[Chain, float]:
    """The chain with the link whose relative errors over measured runs are least, and the largest of them.

    A link that hides behind computation shows no bandwidth, and needs none: any large one fits alike.
    """
    if not runs:
        return chain, 0.0

    def linked(logs: Sequence[float]) -> Chain:
        return replace(chain, link=Link(*(float(np.exp(log)) for log in logs)))

    def errors(logs: Sequence[float]) -> list[float]:
        model = linked(logs)
        return [float(model.ttft(run.contexts)) / run.seconds - 1 for run in runs]

    bounds = (np.log([1e4, 1e-6]), np.log([1e13, 1e2]))
    starts = [np.log([bandwidth, latency]) for bandwidth in (1e7, 1e8, 1e9, 1e11) for latency in (1e-4, 1e-2)]
    fits = [least_squares(errors, start, bounds=bounds, diff_step=1e-3) for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost))
    return linked(best.x), max(abs(error) for error in errors(best.x))


def _together(engines: Sequence[EngineClient], prompts: Prompt, tokens: int, past: int) -> float:
    """The mean time of all engines for prefills that they do at once, each of a prompt of its own."""
    asked = [prompts(past + tokens) for _ in engines]
    with ThreadPoolExecutor(len(engines)) as pool:
        if past:
            list(pool.map(lambda engine, prompt: engine.prefill(prompt[:past]), engines, asked))
        took: list[float] = list(pool.map(lambda engine, prompt: engine.prefill(prompt), engines, asked))
    return sum(took) / len(took)


def _telling(chain: Chain, lengths: Sequence[int], engines: int, block: int) -> list[tuple[int, ...]]:
    """Splits to measure."""
    found = set()
    for length in lengths if engines > 1 else ():
        blocks = -(-length // block)
        for count in {2, min(engines, blocks)}:
            last = (length - (count - 1) * block) // block * block
            found.add((last, *[block] * (count - 2), length - last - (count - 2) * block))
            ends = [round(i * blocks / count) * block for i in range(count)]
            found.add(tuple(b - a for a, b in pairwise([*ends, length])))
            found.add(search(chain, length, count, fewest=count, block=block).contexts)
    return sorted((split for split in found if min(split) > 0), key=lambda split: (sum(split), len(split), split))
