"""Which engines a prompt goes to: a chain where its first token is expected sooner than from any one engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.shape import Shape
from forerun.runahead.table import Table, make_table

__all__ = ["Route", "Router", "Standing", "guess_table"]

_SHORTEST, _LONGEST = 1024, 1 << 17  # tokens of the prompts in a table without measurements
_DECODING = 8  # tokens to prefill that a request which decodes delays a prefill like


@dataclass(frozen=True)
class Standing:
    """An engine that is up, at the moment.

    Args:
        engine: Its number.
        prefill: Tokens that it is asked to prefill and has not yet.
        decoding: Requests that it answers.
        cached: Tokens at the prompt's beginning that its cache holds.
    """

    engine: int
    prefill: int = 0
    decoding: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Route:
    """Engines in the order of the chain, the last one answers; one: no chain.

    Args:
        engines: Their numbers.
        ends: Where each one's context ends.
        ttft: Seconds to the first token, as expected.
        cached: Tokens that they all hold.
    """

    engines: tuple[int, ...]
    ends: tuple[int, ...]
    ttft: float
    cached: int = 0


class Router:
    """Chooses engines by what a table expects of them.

    Args:
        table: Of the model on such engines.
        engines: R, the most that can take part.
        block: Of the engines' caches (tokens).
        least: Tokens of a prompt below which no chain is tried; by default, what the table says.

    Raises:
        ValueError: `least` is below 1.
    """

    def __init__(self, table: Table, engines: int, block: int, least: int | None = None) -> None:
        if least is not None and least < 1:
            raise ValueError(f"the least prompt of a chain is {least}; expected 1 token or more")
        self._table, self._engines = replace(table, block=lcm(block, table.block)), engines
        self._tables = {engines: self._for(engines)} if engines > 1 else {}
        self._told, self.least = least, self._least(self._for(engines)) if least is None else least

    def complete(self) -> None:
        """Searches splits for fewer engines too, for when some are down or busy; no chains of so many before."""
        for count in range(self._engines - 1, 1, -1):
            self._tables[count] = self._for(count)

    def with_table(self, table: Table) -> Router:
        """The same for another table, of the same engines."""
        return Router(table, self._engines, self._table.block, self._told)

    def become(self, other: Router) -> None:
        """Routes as the other does from now on."""
        self._table, self._tables, self.least = other._table, other._tables, other.least

    def route(self, standings: Sequence[Standing], tokens: int, *, alone: bool = False) -> Route:
        """Engines for a prompt of so many tokens, or one engine that answers it alone; of equals the first.

        Raises:
            ValueError: No engine is up, or the prompt is empty.
        """
        if not standings or tokens < 1:
            raise ValueError(f"{len(standings)} engines are up for {tokens} tokens; expected one or more of both")
        standings = [replace(one, cached=min(one.cached, tokens - 1)) for one in standings]
        singles = sorted(standings, key=lambda one: (self._single(one, tokens), one.decoding))
        best = Route((singles[0].engine,), (tokens,), self._single(singles[0], tokens), singles[0].cached)
        if alone or tokens < self.least:
            return best
        last, rest = singles[0], singles[1:]
        for others in (sorted(rest, key=lambda one: -one.cached), sorted(rest, key=self._wait)):
            idle = sum(self._wait(one) <= self._wait(last) for one in others)
            for count in {len(others) + 1, idle + 1} & self._tables.keys():
                chain = self._chain([*others[: count - 1], last], tokens)
                if chain.ttft * (1 + self._table.slack) < best.ttft:
                    best = chain
        return best

    def _chain(self, members: Sequence[Standing], tokens: int) -> Route:
        cached = min(one.cached for one in members) // self._table.block * self._table.block
        split = self._tables[len(members)].split(tokens - cached, cached)
        taking = members[-len(split.contexts) :]
        ends = tuple(cached + end for end in accumulate(split.contexts))
        ttft = max(map(self._wait, taking)) + split.ttft
        return Route(tuple(one.engine for one in taking), ends, ttft, cached)

    def _single(self, one: Standing, tokens: int) -> float:
        return self._wait(one) + self._table.chain.single(tokens - one.cached, one.cached)

    def _wait(self, one: Standing) -> float:
        waiting = one.prefill + _DECODING * one.decoding
        return self._table.chain.single(waiting) if waiting else 0.0

    def _for(self, engines: int) -> Table:
        table = self._table
        if engines in (1, table.engines):
            return table
        lengths = [row.tokens for row in table.rows]
        model, hardware, block, slack = table.model, table.hardware, table.block, table.slack
        return make_table(table.chain, lengths, engines, model=model, hardware=hardware, block=block, slack=slack)

    def _least(self, table: Table) -> int:
        """The shortest prompt found that is split; beyond the longest row: none is."""
        length, longest = 2 * table.block, table.rows[-1].tokens
        while length <= longest and len(table.split(length).contexts) == 1:
            length += max(1, length // (8 * table.block)) * table.block
        return min(length, longest + 1)


def guess_table(config: Mapping[str, object] | None, engines: int, block: int, model: str) -> Table:
    """A table without measurements: engines that compute alike and links that take no time.

    The split follows from the arithmetic of the model's `config.json`; without one that says it, contexts are even. Its
    times mean nothing but against each other.
    """
    try:
        shape = Shape.from_config(config or {})
        told = "not measured: split by the model's arithmetic"
        chain = Chain(shape.cost(1e12), Link(float("inf")), shape.layers, shape.kv_bytes, shape.before)
    except ValueError:
        told = "not measured, the model's sizes are not known: split evenly"
        chain = Chain(Cost(0, 1e-3, 0, 0), Link(float("inf")), layers=64, kv_bytes=0)
    lengths = [length for length in (_SHORTEST << i for i in range(32)) if length <= _LONGEST]
    return make_table(chain, lengths, engines, model=model, hardware=told, block=block)
