"""Which engine computes which tokens of a prompt: the split whose first token comes soonest by the model of the chain.

1. Few splits in all: every one is tried.
2. Else every split of a coarse grid, then around the best and around the compute-optimal one, in ever smaller steps.

Splits of fewer engines, one included, compete: the fewest engines win that come close to the soonest first token.

Source: KV-Runahead, arXiv 2405.05329, section 4.2 (KVR-S, hierarchical grid search).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from forerun.runahead.chain import Chain

__all__ = ["Split", "balanced", "even_cap", "search"]

Units = NDArray[np.int64]
Array = NDArray[np.float64]
_TRIED = 2000  # splits at once
_ASLANT = 256  # random directions that a split is moved in


@dataclass(frozen=True)
class Split:
    """Contexts and what they are expected to take.

    Args:
        contexts: Tokens of each engine's context, in order; one number: no chain.
        ttft: Seconds to the first token.
        single: Seconds to the first token on one engine.
    """

    contexts: tuple[int, ...]
    ttft: float
    single: float

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where each context begins, and where the last one ends."""
        return tuple(accumulate(self.contexts, initial=0))

    @property
    def speedup(self) -> float:
        return self.single / self.ttft


def balanced(ratio: float, engines: int) -> tuple[float, ...]:
    """Shares of a prompt that give every engine the same work, transfers left aside: they fall, the ideal is R times.

    Args:
        ratio: Attention's work over all other work, for the whole prompt on one engine; `inf`: attention alone.
        engines: R.
    """
    if ratio == np.inf:
        ends = [np.sqrt(i / engines) for i in range(engines + 1)]
    elif ratio == 0:
        ends = [i / engines for i in range(engines + 1)]
    else:
        ends = [(np.sqrt(1 + 4 * ratio * (1 + ratio) * i / engines) - 1) / (2 * ratio) for i in range(engines + 1)]
    return tuple(float(end - start) for start, end in pairwise(ends))


def even_cap(ratio: float, engines: int) -> float:
    """The most that an even split can be faster than one engine: its last context has the most work."""
    return engines * (1 + ratio) / (1 + ratio * (2 - 1 / engines))


def search(
    chain: Chain, tokens: int, engines: int, *, fewest: int = 1, block: int = 1, cached: int = 0, slack: float = 0.01
) -> Split:
    """The split of a prompt over at most so many engines; never slower than one engine, by the chain's own model.

    Args:
        chain: The engines and their links.
        tokens: Of the prompt that are not cached.
        engines: R, the most that may take part.
        fewest: The least that shall take part, where the prompt has a block for each.
        block: Contexts begin at multiples of so many tokens.
        cached: Tokens before them that every engine holds.
        slack: Engines are left out as long as the first token comes later by no more than this share of the best.

    Raises:
        ValueError: A number is out of range.
    """
    least = {"tokens": tokens, "engines": engines, "fewest": fewest, "block": block, "cached": cached + 1}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} is {value - (name == 'cached')}; expected {0 if name == 'cached' else 1} or more")
    if fewest > engines or slack < 0:
        raise ValueError(f"fewest is {fewest} and slack {slack}; expected at most {engines} engines and 0 or more")
    single = chain.single(tokens, cached)
    blocks = -(-tokens // block)
    space = _Space(chain, tokens, block, blocks, cached)
    found: dict[int, tuple[tuple[int, ...], float]] = {1: ((tokens,), single)}
    bounds = np.zeros(0, np.int64)
    for count in range(2, min(engines, blocks) + 1):
        bounds = space.best(count, bounds)
        found[count] = tuple(map(int, space.contexts(bounds[None])[0])), float(space.ttft(bounds[None])[0])
    allowed = {count: split for count, split in found.items() if count >= min(fewest, max(found))}
    soonest = min(ttft for _, ttft in allowed.values())
    contexts, ttft = next(split for _, split in sorted(allowed.items()) if split[1] <= soonest * (1 + slack))
    return Split(contexts, ttft, single)


@dataclass(frozen=True)
class _Space:
    """Splits of a prompt as rising inner boundaries `[K, R - 1]`, in blocks."""

    chain: Chain
    tokens: int
    block: int
    blocks: int
    cached: int

    def contexts(self, bounds: Units) -> Units:
        """`[K, R]` tokens."""
        contexts: Units = np.diff(bounds * self.block, axis=-1, prepend=0, append=self.tokens)
        return contexts

    def ttft(self, bounds: Units) -> Array:
        """`[K]`."""
        return self.chain.ttft(self.contexts(bounds), self.cached)

    def best(self, engines: int, fewer: Units) -> Units:
        """`[R - 1]`; `fewer` is the best of an engine less."""
        inner = engines - 1
        if comb(self.blocks - 1, inner) <= _TRIED:
            return self._pick(np.array(list(combinations(range(1, self.blocks), inner))))
        cells = next(m for m in range(min(self.blocks, _TRIED + 1), inner, -1) if comb(m - 1, inner) <= _TRIED)
        grid = np.arange(1, cells) * self.blocks // cells
        coarse = self._pick(np.array(list(combinations(grid.tolist(), inner))))
        starts = [coarse, self._compute_optimal(engines)]
        if len(fewer) == 0 or fewer[0] > 1:
            starts.append(np.array([1, *fewer]))  # one more engine, with one block
        return self._pick(np.stack([self._refined(start) for start in starts]))

    def _compute_optimal(self, engines: int) -> Units:
        linear, attention = self.chain.cost.linear(self.tokens), self.chain.cost.attention(self.tokens, self.cached)
        ratio = float(attention / linear) if linear > 0 else np.inf
        ends = np.cumsum(balanced(ratio, engines))[:-1]
        # A context of a block at least, at both ends.
        bounds = np.maximum.accumulate(np.rint(ends * self.blocks).astype(np.int64) - np.arange(engines - 1))
        clipped: Units = np.clip(bounds, 1, self.blocks - engines + 1) + np.arange(engines - 1)
        return clipped

    def _refined(self, bounds: Units) -> Units:
        moves, step = _moves(len(bounds)), self.blocks // 8
        best = float(self.ttft(bounds[None])[0])
        while step:
            near = bounds + np.rint(moves * step).astype(np.int64)
            near = near[(np.diff(near, axis=1, prepend=0, append=self.blocks) >= 1).all(1)]
            times = self.ttft(near)
            if len(near) and times.min() < best * (1 - 1e-12):
                bounds, best = near[times.argmin()], float(times.min())
            else:
                step //= 2
        return bounds

    def _pick(self, bounds: Units) -> Units:
        picked: Units = bounds[int(self.ttft(bounds).argmin())]
        return picked


def _moves(inner: int) -> Array:
    """`[M, inner]` directions: each boundary alone or with its neighbours by a step, and all at once at random.

    The best splits lie on edges where several engines are late alike, which only moves of many boundaries follow.
    """
    ends = combinations(range(inner + 1), 2)
    runs = np.array([[float(first <= i < last) for i in range(inner)] for first, last in ends])
    aslant = np.random.default_rng(0).normal(0, 2, (_ASLANT, inner))
    return np.concatenate([runs, -runs, aslant])
