"""What the DLRM examples train on: batches of a click log, each rank its own share; synthetic logs.

`criteo.py` and `movielens.py` read real ones, `train_dlrm.py` trains on all of them. Nothing here needs a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.synthetic import Ids

__all__ = ["Batch", "ClickLog", "Ragged", "Share", "SyntheticLog", "Table", "mixed"]


class Table(NamedTuple):
    """An embedding table and how it is looked up in."""

    name: str
    rows: int
    pooling: float  # lookups per sample, on average


class Share(NamedTuple):
    """Whose part of every batch is read."""

    rank: int
    ranks: int


class Batch(NamedTuple):
    """B samples."""

    dense: NDArray[np.float32]  # [B, columns]
    ids: NDArray[np.int64]  # [lookups] rows of the tables: by table, then by sample
    lengths: NDArray[np.int32]  # [F, B] lookups of each table and sample
    labels: NDArray[np.float32]  # [B] 1 for a click


class ClickLog(Protocol):
    """A source of batches; every rank is given as many as any other."""

    @property
    def tables(self) -> Sequence[Table]: ...

    @property
    def columns(self) -> int:
        """Dense features of a sample."""
        ...

    def training(self, share: Share, size: int) -> Iterator[Batch]:
        """Endless batches of `size` samples for one rank."""
        ...

    def held_out(self, share: Share, size: int) -> Iterator[Batch]:
        """The same of what is never trained on, once; what fills no batch of all ranks is left out."""
        ...


class Ragged(NamedTuple):
    """A list of ids for each sample."""

    values: NDArray[np.int64]  # [lookups]
    offsets: NDArray[np.int64]  # [samples + 1] where each list begins

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        values = np.array([each for some in lists for each in some], dtype=np.int64)
        return cls(values, np.cumsum([0, *map(len, lists)], dtype=np.int64))

    def take(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of some samples, one after the other, and how many each has."""
        lengths = self.offsets[samples + 1] - self.offsets[samples]
        begins = np.repeat(self.offsets[samples] - (np.cumsum(lengths) - lengths), lengths)
        return self.values[begins + np.arange(lengths.sum())], lengths


def mixed(values: NDArray[np.int64], salt: int) -> NDArray[np.uint64]:
    """64 bits of each value that look random, the same in every process.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014 (splitmix64).
    """
    bits = values.astype(np.uint64) + np.uint64(salt % 2**32) * np.uint64(2**32)
    bits += np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class SyntheticLog:
    """Clicks that a hidden model draws: every id has an effect, and so has every dense feature.

    Args:
        tables: Each sample looks up `pooling` ids in each, a whole number.
        columns: Dense features of a sample.
        source: Makes what draws a table's ids; called for each rank and table.
        held_out: Batches that are held out.

    Raises:
        ValueError: A pooling factor that is not a whole number above 0.
    """

    def __init__(
        self, tables: Sequence[Table], columns: int, source: Callable[[Table], Ids], held_out: int = 10
    ) -> None:
        for table in tables:
            if table.pooling != round(table.pooling) or table.pooling < 1:
                raise ValueError(f"table {table.name!r}: pooling is {table.pooling}; give a whole number above 0")
        self.tables, self.columns = tuple(tables), columns
        self._source, self._held_out = source, held_out

    def training(self, share: Share, size: int) -> Iterator[Batch]:
        return self._batches(np.random.default_rng([0, *share]), size)

    def held_out(self, share: Share, size: int) -> Iterator[Batch]:
        batches = self._batches(np.random.default_rng([1, *share]), size)
        return (next(batches) for _ in range(self._held_out))

    def _batches(self, random: np.random.Generator, size: int) -> Iterator[Batch]:
        sources = [self._source(table) for table in self.tables]
        while True:
            dense = random.normal(size=(size, self.columns)).astype(np.float32)
            effect = dense[:, 0].astype(np.float64)
            drawn = []
            for place, (table, source) in enumerate(zip(self.tables, sources, strict=True)):
                ids = source.draw(size * round(table.pooling), random)
                effect += _effects(ids, place).reshape(size, -1).mean(1)
                drawn.append(ids)
            lengths = np.repeat([[round(table.pooling)] for table in self.tables], size, axis=1).astype(np.int32)
            clicks = random.random(size) < 1 / (1 + np.exp(1 - effect))
            yield Batch(dense, np.concatenate(drawn), lengths, clicks.astype(np.float32))


def _effects(ids: NDArray[np.int64], salt: int) -> NDArray[np.float64]:
    """Of each id, in -1 to 1."""
    return mixed(ids, salt) / 2.0**63 - 1.0
