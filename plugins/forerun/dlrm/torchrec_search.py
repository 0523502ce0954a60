"""The core's search as a proposer and a partitioner of torchrec's planner, whose own loop stays as it is.

torchrec's planner asks its proposers for options, has its partitioner lay their shards on ranks, and keeps what its
performance model rates best. Here the first proposal is a placeholder; the partitioner answers it with the core's plan.
Whatever is proposed after it goes to torchrec's own partitioner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forerun.dlrm.torchrec_enumerator import quick_copy
from forerun_adapters import torchrec as host

__all__ = ["CorePartitioner", "CoreProposer", "ProposerWhile"]


class CoreProposer(host.Proposer):  # type: ignore[misc]
    """Proposes, once, each table's smallest option: that is what torchrec's messages call the storage needed.

    Args:
        seen: Called with the options of all tables before anything is proposed.
        proposes: Whether there is a proposal at all.
    """

    def __init__(self, seen: Callable[[Sequence[Any]], None], *, proposes: bool) -> None:
        self._seen = seen
        self._proposes = proposes
        self._options: Sequence[Any] = ()
        self.proposal: list[Any] | None = None

    def load(self, search_space: list[Any], enumerator: Any = None) -> None:
        """Takes the options of all tables."""
        self._options, self.proposal = search_space, None
        self._seen(search_space)

    def propose(self) -> list[Any] | None:
        """The placeholder, then nothing."""
        if not self._proposes or self.proposal is not None:
            return None
        smallest: dict[str, tuple[int, Any]] = {}
        for option in self._options:
            size = sum(sum(host.tiers(shard.storage)) for shard in option.shards)
            if option.fqn not in smallest or size < smallest[option.fqn][0]:
                smallest[option.fqn] = (size, option)
        # torchrec remembers what became of a proposal by its options' hashes: this one is to be like no other.
        self.proposal = [host.unlike_any(option) for _, option in smallest.values()]
        self._options = ()
        return self.proposal

    def feedback(self, *args: Any, **kwargs: Any) -> None:
        """Not needed."""


class CorePartitioner(host.Partitioner):  # type: ignore[misc]
    """Answers the proposer's placeholder with the core's plan, any other proposal with torchrec's partitioner.

    Args:
        proposer: Whose proposal is the placeholder.
        solve: Lays all tables on a topology; returns options with ranks.
        greedy: Answers everything else.
    """

    def __init__(self, proposer: CoreProposer, solve: Callable[[Any], list[Any]], greedy: Any) -> None:
        self._proposer = proposer
        self._solve = solve
        self._greedy = greedy

    def partition(self, proposal: list[Any], storage_constraint: Any, **kwargs: Any) -> list[Any]:
        """Options with ranks on all their shards.

        Raises:
            PlannerError: Nothing fits.
        """
        if proposal is not self._proposer.proposal:
            laid: list[Any] = self._greedy.partition(proposal, storage_constraint, **kwargs)
            return laid
        placed = self._solve(storage_constraint)
        for option in placed:
            option.shards = _Shards(option.shards)
        return placed


class ProposerWhile(host.Proposer):  # type: ignore[misc]
    """A proposer that is asked only while a condition holds, and given the options only once it is asked."""

    def __init__(self, proposer: Any, condition: Callable[[], bool]) -> None:
        self._proposer = proposer
        self._condition = condition
        self._waiting: dict[str, Any] | None = None

    def load(self, search_space: list[Any], enumerator: Any = None) -> None:
        """Kept until `propose`."""
        self._waiting = {"search_space": search_space, "enumerator": enumerator}

    def propose(self) -> list[Any] | None:
        """The proposer's proposal, or nothing."""
        if not self._condition():
            self._waiting = None
            return None
        if self._waiting is not None:
            self._proposer.load(**self._waiting)
            self._waiting = None
        proposal: list[Any] | None = self._proposer.propose()
        return proposal

    def feedback(self, *args: Any, **kwargs: Any) -> None:
        """Passed on."""
        self._proposer.feedback(*args, **kwargs)


class _Shards(list[Any]):
    """Shards of which torchrec's deep copy of the best plan makes a plain list, twenty times sooner."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return [
            host.shard(list(s.size), list(s.offset), quick_copy(s.perf), quick_copy(s.storage), s.rank) for s in self
        ]
