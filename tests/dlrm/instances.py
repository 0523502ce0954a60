"""Problems to plan, made from a seed, and all plans of a small one."""

import itertools

import numpy as np

from forerun.dlrm.problem import Problem, Spread


def assemble(tables, capacity, host, **rest):
    """A problem from tables of options, each (spread, cost per shard, bytes of each tier per shard)."""
    options = [option for table in tables for option in table]
    tiers = np.shape(capacity)[1]
    return Problem(
        np.cumsum([0] + [len(table) for table in tables]),
        np.cumsum([0] + [len(costs) for _, costs, _ in options]),
        np.array([spread for spread, _, _ in options]),
        np.concatenate([np.asarray(costs, float) for _, costs, _ in options]),
        np.concatenate([np.reshape(memory, (-1, tiers)) for _, _, memory in options]),
        np.array(capacity),
        np.array(host),
        **rest,
    )


def synthetic(tables, ranks, *, seed=0, ranks_per_host=8, fill=0.5, skew=1.5, tiers=2):
    """Tables of log-normal cost and size, as a recommendation model has them.

    Options: on one rank, in 2 or 4 columns (slightly dearer), by rows on all ranks (with an overhead per rank), on the
    ranks of one host, a copy on every rank, and the first in slower memory.

    Args:
        fill: Share of the ranks' fast memory that all tables take once.
    """
    random = np.random.default_rng(seed)
    size = random.lognormal(0, 2, tables)
    size = np.maximum((size / size.sum() * fill * ranks * 80e9).astype(np.int64), 1024)
    cost = random.lognormal(0, skew, tables)
    local = min(ranks_per_host, ranks)
    made = []
    for bytes_, ms in zip(size.tolist(), cost.tolist(), strict=True):

        def shards(count, per_cost, per_bytes, slow=False):
            memory = np.zeros((count, tiers), np.int64)
            memory[:, 1 if slow else 0] = per_bytes
            return [per_cost] * count, memory

        options = [(Spread.ANY, *shards(1, ms, bytes_))]
        for count in (2, 4):
            options.append((Spread.ANY, *shards(count, ms * (1 + 0.03 * count) / count, bytes_ // count)))
        options.append((Spread.ALL, *shards(ranks, ms * 1.3 / ranks + 0.02, bytes_ // ranks)))
        options.append((Spread.HOST, *shards(local, ms * 1.2 / local + 0.02, bytes_ // local)))
        options.append((Spread.ALL, *shards(ranks, bytes_ * 2e-9 + ms * 0.5 / ranks, 3 * bytes_)))
        if tiers > 1:
            options.append((Spread.ANY, *shards(1, 5 * ms, bytes_, slow=True)))
        made.append(options)
    capacity = np.full((ranks, tiers), 80_000_000_000)
    if tiers > 1:
        capacity[:, 1] = 400_000_000_000
    return assemble(made, capacity, np.arange(ranks) // local)


def all_plans(problem):
    """All (options, ranks per table) of a small problem that keep to its rules (yielded, memory kept)."""
    every = list(range(problem.ranks))
    hosts = [h.tolist() for h in problem.hosts]

    def places(option):
        count, spread = int(problem.shards[option]), problem.spread[option]
        if spread == Spread.ALL:
            return [tuple(every)]
        if spread == Spread.HOST:
            return [tuple(h) for h in hosts if len(h) == count]
        if spread == Spread.HOSTS:
            need, found = count // len(hosts[0]), []
            for picked in itertools.product(range(len(hosts)), repeat=need):
                used = np.bincount(picked, minlength=len(hosts))
                if used.max() - used.min() <= 1 and (need >= len(hosts) or used.max() == 1):
                    found.append(tuple(r for h in picked for r in hosts[h]))
            return found
        if spread == Spread.WITHIN:
            return [place for h in hosts for place in itertools.product(h, repeat=count)]
        if spread == Spread.APART:
            return list(itertools.permutations(every, count))
        return list(itertools.product(every, repeat=count))

    own = [range(problem.option_start[f], problem.option_start[f + 1]) for f in range(problem.tables)]
    for options in itertools.product(*own):
        for ranks in itertools.product(*[places(option) for option in options]):
            if _together(problem, options, ranks):
                yield options, ranks


def best_rating(problem):
    """The least rating of all plans, by trying them; infinite if none fits."""
    best = np.inf
    for options, ranks in all_plans(problem):
        cost, memory = problem.base.copy(), np.zeros_like(problem.capacity)
        for option, placed in zip(options, ranks, strict=True):
            for shard, rank in zip(
                range(problem.shard_start[option], problem.shard_start[option + 1]), placed, strict=True
            ):
                cost[rank] += problem.cost[shard]
                memory[rank] += problem.memory[shard]
        if cost.max() < best and (memory <= problem.capacity).all():
            best = cost.max()
    return best


def _together(problem, options, ranks):
    for group in set(problem.group.tolist()) - {-1}:
        inside = [f for f in range(problem.tables) if problem.group[f] == group]
        if len({(problem.spread[options[f]], ranks[f]) for f in inside}) > 1:
            return False
    for group in set(problem.host_group.tolist()) - {-1}:
        inside = [f for f in range(problem.tables) if problem.host_group[f] == group]
        inside = [f for f in inside if problem.spread[options[f]] != Spread.ALL]
        if len({problem.host[r] for f in inside for r in ranks[f]}) > 1:
            return False
    return True
