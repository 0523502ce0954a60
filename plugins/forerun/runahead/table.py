"""Splits kept: a table per model, hardware and number of engines, a row per prompt length, on disk as JSON.

A prompt between two rows gets shares between theirs (the paper's KVR-P). Measured times of later contexts correct the
cost of one, and with it the rows.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from forerun.files import write_whole
from forerun.runahead.chain import Chain, check_contexts
from forerun.runahead.cost import Compute, Cost, Link, corrected
from forerun.runahead.partition import Split, search

__all__ = ["VERSION", "Row", "Table", "make_table"]

VERSION = 2  # of the file


@dataclass(frozen=True)
class Row:
    """The best split found for one prompt length."""

    tokens: int
    contexts: tuple[int, ...]  # one: no chain

    def __post_init__(self) -> None:
        check_contexts(self.contexts, self.tokens)


@dataclass(frozen=True)
class Table:
    """Splits for the prompts of one model on so many engines of one kind.

    Args:
        model: Name of the model.
        hardware: Of the engines and what joins them.
        engines: R, the most that a row may take.
        chain: The model of the chain that the rows were searched with.
        rows: One or more, by prompt length.
        block: Contexts begin at multiples of so many tokens.
        slack: As `forerun.runahead.partition.search`.
        computes: Measured prefills that the cost was fitted to, or corrected by.

    Raises:
        ValueError: There is no row, two are of one length, or one has more contexts than there are engines.
    """

    model: str
    hardware: str
    engines: int
    chain: Chain
    rows: tuple[Row, ...]
    block: int = 1
    slack: float = 0.01
    computes: tuple[Compute, ...] = ()

    def __post_init__(self) -> None:
        lengths = [row.tokens for row in self.rows]
        if not lengths or any(a >= b for a, b in pairwise(lengths)):
            raise ValueError(f"rows are of {lengths} tokens; expected at least one, each longer than the one before")
        if longest := [row.contexts for row in self.rows if len(row.contexts) > self.engines]:
            raise ValueError(f"a row has contexts {list(longest[0])}; expected at most {self.engines}, one per engine")

    def split(self, tokens: int, cached: int = 0) -> Split:
        """The split of a prompt of so many uncached tokens; one engine where no row's split would be faster.

        Raises:
            ValueError: `tokens` is below 1 or `cached` below 0.
        """
        if tokens < 1 or cached < 0:
            raise ValueError(f"tokens is {tokens} and cached {cached}; expected 1 or more and 0 or more")
        single = self.chain.single(tokens, cached)
        best = Split((tokens,), single, single)
        for shares in self._shares(tokens):
            contexts = _rounded(shares, tokens, self.block)
            ttft = float(self.chain.ttft(contexts, cached))
            if ttft * (1 + self.slack) < best.ttft:
                best = Split(contexts, ttft, single)
        return best

    def refined(self, computes: Iterable[Compute]) -> Table:
        """The table with its cost corrected by measurements, its rows searched anew; the link stays.

        Raises:
            ValueError: Nothing was measured, or a sample is no measurement.
        """
        measured = tuple(computes)
        chain = replace(self.chain, cost=corrected(self.chain.cost, measured))
        rows = _rows(chain, [row.tokens for row in self.rows], self.engines, self.block, self.slack)
        return replace(self, chain=chain, rows=rows, computes=measured)

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON; a file that is there is replaced by a whole one or stays."""
        fields = {"forerun": "runahead table", "version": VERSION, **asdict(self)}
        if fields["chain"]["link"]["bandwidth"] == np.inf:
            fields["chain"]["link"]["bandwidth"] = None  # JSON has no infinity
        write_whole(Path(path), (json.dumps(fields, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is no such table, or one of another version.
        """
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text())
            version = fields.pop("version") if fields.pop("forerun") == "runahead table" else None
            if version != VERSION:
                raise ValueError(f"it is of version {version}; this release reads version {VERSION}")
            chain = fields["chain"]
            link = chain["link"]
            link["bandwidth"] = np.inf if link["bandwidth"] is None else link["bandwidth"]
            fields["chain"] = Chain(**{**chain, "cost": Cost(**chain["cost"]), "link": Link(**link)})
            fields["rows"] = tuple(Row(row["tokens"], tuple(row["contexts"])) for row in fields["rows"])
            fields["computes"] = tuple(Compute(*sample) for sample in fields["computes"])
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table written by forerun runahead: {error}") from error

    def _shares(self, tokens: int) -> list[tuple[float, ...]]:
        """Shares to try: between the neighbouring rows' where both take as many engines, else each neighbour's own."""
        lengths = [row.tokens for row in self.rows]
        after = bisect_left(lengths, tokens)
        near = [self.rows[i] for i in (after - 1, after) if 0 <= i < len(lengths)]
        shares = [np.array(row.contexts) / row.tokens for row in near]
        if len(near) == 2 and len(shares[0]) == len(shares[1]):
            way = (tokens - near[0].tokens) / (near[1].tokens - near[0].tokens)
            shares = [shares[0] * (1 - way) + shares[1] * way]
        return [tuple(map(float, share)) for share in shares]


def make_table(
    chain: Chain,
    lengths: Sequence[int],
    engines: int,
    *,
    model: str,
    hardware: str,
    block: int = 1,
    slack: float = 0.01,
    computes: Iterable[Compute] = (),
) -> Table:
    """A table with the best split found for each prompt length.

    Raises:
        ValueError: As `Table` and `forerun.runahead.partition.search`.
    """
    rows = _rows(chain, sorted(set(lengths)), engines, block, slack)
    return Table(model, hardware, engines, chain, rows, block, slack, tuple(computes))


def _rows(chain: Chain, lengths: Sequence[int], engines: int, block: int, slack: float) -> tuple[Row, ...]:
    return tuple(Row(n, search(chain, n, engines, block=block, slack=slack).contexts) for n in lengths)


def _rounded(shares: Sequence[float], tokens: int, block: int) -> tuple[int, ...]:
    """Contexts near the shares that begin at multiples of a block; a share that rounds to nothing is left out."""
    ends = [round(end * tokens / block) * block for end in accumulate(shares)][:-1]
    bounds = sorted({0, tokens, *(end for end in ends if 0 < end < tokens)})
    return tuple(end - start for start, end in pairwise(bounds))
