"""What a split is planned for, and when every engine does what: the recurrence of a chain.

Per layer an engine projects queries, keys and values of its own context (ready), gets the keys and values of all tokens
before (arrived), sends all of them on (started), attends, and does the rest of the layer (finished).

Source: KV-Runahead, arXiv 2405.05329, section 4, with a link that carries one transfer after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forerun.runahead.cost import Cost, Link

__all__ = ["Chain", "Timeline", "check_contexts"]

Array = NDArray[np.float64]


class Timeline(NamedTuple):
    """Moments (s) since the request came, `[L, R, ...]`: layers, engines, then the axes of the splits asked for."""

    ready: Array  # the own context's keys and values are there
    arrived: Array  # all tokens' before; 0 for the first engine
    started: Array  # attention begins: the later of both
    attended: Array
    finished: Array  # the layer is done

    @property
    def ttft(self) -> Array:
        """`[...]` seconds to the first token, which the last engine gives."""
        return np.asarray(self.finished[-1, -1])

    @property
    def waits(self) -> Array:
        """`[R, ...]` seconds that each engine stood still."""
        return np.asarray((self.started - self.ready).sum(0))


@dataclass(frozen=True)
class Chain:
    """Equal engines in a row, a link from each to the next.

    Args:
        cost: Of a context on one engine.
        link: Between two engines.
        layers: L.
        kv_bytes: Of one token's keys and values in one layer.
        before: Share of the work linear in tokens that comes before the keys and values (the projections).
        early: Send before attention; False: after it.

    Raises:
        ValueError: A number is out of range.
    """

    cost: Cost
    link: Link
    layers: int
    kv_bytes: int
    before: float = 0.25
    early: bool = True

    def __post_init__(self) -> None:
        if self.layers < 1 or self.kv_bytes < 0:
            raise ValueError(f"layers is {self.layers} and kv_bytes {self.kv_bytes}; expected 1 or more and 0 or more")
        if not 0 <= self.before <= 1:
            raise ValueError(f"before is {self.before}; expected a share between 0 and 1")

    def single(self, tokens: int, cached: int = 0) -> float:
        """Seconds to the first token on one engine, so many tokens before them cached."""
        return float(self.cost(tokens, cached))

    def ttft(self, contexts: ArrayLike, cached: int = 0) -> Array:
        """`[...]` seconds to the first token for splits `[..., R]` of numbers of tokens."""
        *_, finished = deque(self._layers(contexts, cached), maxlen=1)[0]
        return np.asarray(finished[-1])

    def timeline(self, contexts: ArrayLike, cached: int = 0) -> Timeline:
        """When every engine does what, for one split `[R]` or many at once `[..., R]`.

        The plain equivalent, for one split::

            for layer in range(L):
                for i, n in enumerate(contexts):
                    ready = finished[i] + projections(n)
                    arrived = max(sent_by[i - 1], link_free[i - 1]) + bytes_before(i) / bandwidth + latency
                    sent_by[i] = started = max(ready, arrived)
                    finished[i] = started + attention(n, tokens_before(i)) + rest(n)

        Args:
            contexts: Tokens of each engine's context.
            cached: Tokens before the first context that every engine holds already: attended to, not sent.
        """
        moments = list(self._layers(contexts, cached))
        return Timeline(*(np.stack(column) for column in zip(*moments, strict=True)))

    def _layers(self, contexts: ArrayLike, cached: int) -> Iterator[tuple[Array, ...]]:
        """A timeline's fields, layer by layer."""
        n = np.moveaxis(np.asarray(contexts, np.float64), -1, 0)
        sent = np.cumsum(n, 0) - n
        linear = self.cost.linear(n) / self.layers
        projections, rest = self.before * linear, (1 - self.before) * linear
        attention = self.cost.attention(n, sent + cached) / self.layers
        carried = sent * (self.kv_bytes / self.link.bandwidth)
        free, finished = np.zeros_like(n), np.zeros_like(n)
        for _ in range(self.layers):
            ready = finished + projections
            arrived, started, attended = np.zeros((3, *n.shape))
            for i in range(len(n)):
                if i:
                    free[i] = np.maximum((started if self.early else attended)[i - 1], free[i]) + carried[i]
                    arrived[i] = free[i] + self.link.latency
                started[i] = np.maximum(ready[i], arrived[i])
                attended[i] = started[i] + attention[i]
            finished = attended + rest
            yield ready, arrived, started, attended, finished


def check_contexts(contexts: Sequence[int], tokens: int | None = None) -> None:
    """Returns if the contexts are a split, of so many tokens where they are given.

    Raises:
        ValueError: There is none, one has no token, or they do not add up.
    """
    if not contexts or min(contexts) < 1:
        raise ValueError(f"contexts are {list(contexts)}; expected at least one, each of 1 token or more")
    if tokens is not None and sum(contexts) != tokens:
        raise ValueError(f"contexts {list(contexts)} add up to {sum(contexts)}; expected {tokens}")
