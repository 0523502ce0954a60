"""What a context costs to prefill, and a link to cross: fitted from measured times, or counted from a model's shape.

Notation: fixed: c, per_token: g, per_past: b, per_pair: a; a context of n tokens with P before it takes
t(n, P) = c + g n + b P + a (2 P n + n^2) seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

__all__ = ["Compute", "Cost", "Link", "corrected", "fit_cost"]

Array = NDArray[np.float64]

_HELD = 0.1  # of a measurement's weight


class Compute(NamedTuple):
    """One measured prefill of an engine on its own."""

    tokens: int  # computed
    past: int  # before them, in the cache already
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Seconds that an engine takes for a context, all layers together; waiting is not in it.

    Args:
        fixed: Of every context (s).
        per_token: Of every token computed: what does not depend on other tokens (s).
        per_past: Of every token before the context: reading its keys and values (s).
        per_pair: Attention, per unit of (tokens before and in the context)^2 - (tokens before it)^2 (s).

    Raises:
        ValueError: A coefficient is negative or not finite, or all are 0.
    """

    fixed: float
    per_token: float
    per_past: float
    per_pair: float

    def __post_init__(self) -> None:
        _check(self)
        if not any(getattr(self, field.name) for field in fields(self)):
            raise ValueError("every coefficient of the cost is 0; expected at least one above 0")

    def linear(self, tokens: ArrayLike) -> Array:
        """Seconds of what does not look at other tokens."""
        return self.fixed + self.per_token * np.asarray(tokens, np.float64)

    def attention(self, tokens: ArrayLike, past: ArrayLike) -> Array:
        """Seconds of attention."""
        n, before = np.asarray(tokens, np.float64), np.asarray(past, np.float64)
        return self.per_past * before + self.per_pair * (2 * before * n + n * n)

    def __call__(self, tokens: ArrayLike, past: ArrayLike = 0) -> Array:
        """Seconds of contexts of so many tokens with so many before them."""
        return self.linear(tokens) + self.attention(tokens, past)


@dataclass(frozen=True)
class Link:
    """What carries keys and values to the next engine.

    Args:
        bandwidth: Bytes a second; `math.inf` for a link that takes no time.
        latency: Seconds from the last byte's departure to its use.

    Raises:
        ValueError: The bandwidth is not above 0, or the latency is negative or not finite.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth is {self.bandwidth}; expected bytes a second, above 0")
        if not (math.isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"latency is {self.latency}; expected seconds, 0 or more")


def fit_cost(measured: Sequence[Compute]) -> Cost:
    """The cost with non-negative coefficients whose relative errors' squares are least.

    Relative, as a calibration's prompts differ in length a hundredfold and the short ones must count.

    Raises:
        ValueError: Nothing was measured, or a sample is no measurement.
    """
    n, past, seconds = _columns(measured, "tokens, past, seconds")
    terms = np.stack([np.ones_like(n), n, past, 2 * past * n + n * n], 1)
    return Cost(*map(float, _fit(terms, seconds)))


def corrected(cost: Cost, measured: Sequence[Compute]) -> Cost:
    """The cost with its linear part scaled and its attention scaled, by factors that fit later measurements.

    Two factors, held weakly near the one by which all times are off: where contexts of one length alone were measured,
    which cannot tell the two apart, both are that.

    Raises:
        ValueError: Nothing was measured, or a sample is no measurement.
    """
    n, past, seconds = _columns(measured, "tokens, past, seconds")
    parts = np.stack([cost.linear(n), cost.attention(n, past)], 1) / seconds[:, None]
    off = float(np.median(1 / parts.sum(1)))
    wanted = np.append(np.ones(len(n)), [_HELD, _HELD])
    linear, attention = map(float, off * nnls(np.vstack([off * parts, _HELD * np.eye(2)]), wanted)[0])
    return Cost(cost.fixed * linear, cost.per_token * linear, cost.per_past * attention, cost.per_pair * attention)


def _fit(terms: Array, seconds: Array) -> Array:
    weighted = terms / seconds[:, None]
    # Unscaled, the coefficient of pairs is lost to rounding.
    scale = np.maximum(np.abs(weighted).max(0), np.finfo(np.float64).tiny)
    found: Array = nnls(weighted / scale, np.ones_like(seconds))[0]
    # A term that no sample has says nothing about its coefficient.
    return np.where(terms.any(0), found / scale, 0.0)


def _columns(measured: Sequence[tuple[Any, ...]], what: str) -> list[Array]:
    table = np.asarray(measured, np.float64)
    if table.size == 0:
        raise ValueError("no measurement was given; a fit needs at least one")
    wrong = ~np.isfinite(table).all(1) | (table < 0).any(1) | (table[:, -1] <= 0) | (table[:, 0] < 1)
    if wrong.any():
        sample = tuple(table[int(np.argmax(wrong))].tolist())
        raise ValueError(f"{sample} is no measurement of ({what}); expected finite numbers, seconds above 0")
    return list(table.T)


def _check(cost: Cost) -> None:
    for field in fields(cost):
        value = getattr(cost, field.name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field.name} is {value}; expected seconds, 0 or more")
