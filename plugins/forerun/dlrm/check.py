"""Whether a problem's arrays fit together, and whether a plan keeps to where its options may go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.spread import Spread

if TYPE_CHECKING:
    from forerun.dlrm.problem import Plan, Problem

__all__ = ["check_plan", "check_problem"]


def check_problem(problem: Problem) -> None:
    """Returns if the values are what the problem's docstring says (shapes are already).

    Raises:
        ValueError: They are not.
    """
    if problem.ranks == 0:
        raise ValueError("capacity has no ranks; expected one row per rank")
    for name in ("cost", "base"):
        values = getattr(problem, name)
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{name} has a value that is negative or not finite; expected finite ms >= 0")
    if (problem.memory < 0).any():
        raise ValueError("memory has a negative number of bytes")
    if len(np.unique(problem.host)) != len(problem.hosts):
        raise ValueError(f"ranks of a host must be next to each other; host is {problem.host.tolist()}")
    sizes = {len(ranks) for ranks in problem.hosts}
    for spread in np.unique(problem.spread).tolist():
        if spread not in set(Spread):
            raise ValueError(f"spread has {spread}; expected one of {[int(s) for s in Spread]}")
        counts = set(np.unique(problem.shards[problem.spread == spread]).tolist())
        if spread == Spread.ALL and counts != {problem.ranks}:
            raise ValueError(f"an option on all {problem.ranks} ranks has {max(counts)} or {min(counts)} shards")
        if spread == Spread.HOST and counts - sizes:
            raise ValueError(
                f"an option on one host has {max(counts - sizes)} shards; hosts have {sorted(sizes)} ranks"
            )
        if spread == Spread.HOSTS:
            if len(sizes) > 1:
                raise ValueError(f"options over several hosts need hosts of one size; these have {sorted(sizes)} ranks")
            if wrong := {count for count in counts if count % min(sizes)}:
                raise ValueError(f"an option over hosts of {min(sizes)} ranks has {max(wrong)} shards, no multiple")
        if spread == Spread.APART and max(counts) > problem.ranks:
            raise ValueError(f"an option with shards apart has {max(counts)} shards for {problem.ranks} ranks")
    for name in ("group", "host_group"):
        if (getattr(problem, name) < -1).any():
            raise ValueError(f"{name} has a number below -1")
    grouped = problem.host_group[problem.table] >= 0
    if (grouped & (problem.spread == Spread.HOSTS) & (problem.shards > min(sizes))).any():
        raise ValueError("a table that shares its host with others (host_group) has an option that fills several hosts")
    if (grouped & (problem.spread == Spread.APART) & (problem.shards > max(sizes))).any():
        raise ValueError(f"a table of a host_group has more shards apart than the {max(sizes)} ranks of a host")


def check_plan(problem: Problem, plan: Plan) -> None:
    """Returns if every table has an option of its own, on ranks that it allows, groups together; memory is not asked.

    Raises:
        ValueError: It does not.
    """
    option, ranks = plan.option, plan.ranks
    if option.shape != (problem.tables,) or len(ranks) != problem.tables:
        raise ValueError(f"the plan has {len(option)} options and {len(ranks)} placements for {problem.tables} tables")
    own = (option >= problem.option_start[:-1]) & (option < problem.option_start[1:])
    if not own.all():
        table = int(np.argmin(own))
        raise ValueError(f"table {table} has option {option[table]}, which is not one of its own")
    for table, (chosen, placed) in enumerate(zip(option.tolist(), ranks, strict=True)):
        if wrong := _misplaced(problem, chosen, placed):
            raise ValueError(f"table {table}, option {chosen}: {wrong}; its ranks are {placed.tolist()}")
    _check_groups(problem, plan)


def _misplaced(problem: Problem, option: int, ranks: NDArray[np.int64]) -> str:
    """What is wrong with the ranks of an option's shards, or nothing."""
    spread, count = problem.spread[option], int(problem.shards[option])
    if ranks.shape != (count,):
        return f"{len(ranks)} ranks for {count} shards"
    if ((ranks < 0) | (ranks >= problem.ranks)).any():
        return f"a rank outside 0..{problem.ranks - 1}"
    if spread == Spread.ALL and (ranks != np.arange(problem.ranks)).any():
        return "not on all ranks in order"
    if spread == Spread.APART and len(np.unique(ranks)) != count:
        return "two shards on one rank"
    host = problem.host_index[ranks]
    if spread == Spread.WITHIN and (host != host[0]).any():
        return "not on one host"
    if spread == Spread.HOST and not np.array_equal(ranks, problem.hosts[host[0]]):
        return "not in order on the ranks of one host"
    if spread == Spread.HOSTS:
        size = len(problem.hosts[0])
        filled = host[::size]
        if not np.array_equal(ranks, np.concatenate([problem.hosts[h] for h in filled])):
            return "not in order on the ranks of whole hosts"
        used = np.bincount(filled, minlength=len(problem.hosts))
        # More shards than ranks go around the hosts: each is used as often as any other, or once more.
        if used.max() > -(-len(filled) // len(problem.hosts)) or used.min() < len(filled) // len(problem.hosts):
            return "a host used again before all others"
    return ""


def _check_groups(problem: Problem, plan: Plan) -> None:
    for group in np.unique(problem.group[problem.group >= 0]).tolist():
        first, *others = np.flatnonzero(problem.group == group).tolist()
        for table in others:
            a, b = plan.option[first], plan.option[table]
            if problem.spread[a] != problem.spread[b] or not np.array_equal(plan.ranks[first], plan.ranks[table]):
                raise ValueError(f"group {group}: tables {first} and {table} are not together")
    for group in np.unique(problem.host_group[problem.host_group >= 0]).tolist():
        tables = np.flatnonzero(problem.host_group == group)
        placed = [plan.ranks[f] for f in tables.tolist() if problem.spread[plan.option[f]] != Spread.ALL]
        if placed and len(np.unique(problem.host_index[np.concatenate(placed)])) > 1:
            raise ValueError(f"host_group {group}: tables {tables.tolist()} are not on one host")
