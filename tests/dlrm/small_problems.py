"""Small problems of every kind, for hypothesis: few enough plans to try them all."""

import numpy as np
from hypothesis import strategies as st
from instances import assemble

from forerun.dlrm.problem import Spread


@st.composite
def problems(draw, *, roomy=False, most_plans=4000):
    """A problem of 1 to 3 tables on 2 or 4 ranks, of any spreads, groups, tiers; its memory may not be enough."""
    ranks, size = draw(st.sampled_from([(2, 1), (2, 2), (4, 2), (3, 3), (3, 1)]))
    tiers = draw(st.integers(1, 2))
    hosts = ranks // size
    small = st.integers(0, 6)
    places = {
        (Spread.ANY, 1): ranks,
        (Spread.ANY, 2): ranks**2,
        (Spread.HOST, size): hosts,
        (Spread.HOSTS, size): hosts,
        (Spread.HOSTS, ranks): hosts**hosts,
        (Spread.ALL, ranks): 1,
        (Spread.WITHIN, 2): hosts * size**2,
        (Spread.APART, 2): ranks * (ranks - 1),
    }
    group = draw(st.sampled_from([[-1, -1, -1], [0, -1, 0], [0, 0, 0]]))
    host_group = draw(st.sampled_from([[-1, -1, -1], [1, -1, 1]]))
    tables, plans = [], 1
    for number in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(sorted(places)), min_size=1, max_size=3))
        if host_group[number] >= 0:
            kinds = [kind for kind in kinds if kind[0] != Spread.HOSTS and (kind[0] != Spread.APART or size > 1)]
        if not kinds:
            kinds = [(Spread.ANY, 1)]
        if group[number] == 0 and number and tables:
            kinds = [(spread, len(costs)) for spread, costs, _ in tables[0]]
        count = sum(places[kind] for kind in kinds)
        if plans * count > most_plans:
            break
        plans *= count
        options = []
        for spread, shards in kinds:
            alike = draw(st.booleans())
            costs = [draw(small)] * shards if alike else [draw(small) for _ in range(shards)]
            memory = [[draw(small) for _ in range(tiers)]] * shards
            if not alike:
                memory = [[draw(small) for _ in range(tiers)] for _ in range(shards)]
            options.append((spread, costs, memory))
        tables.append(options)
    if draw(st.booleans()):
        capacity = [[draw(st.integers(3, 14)) for _ in range(tiers)]] * ranks
    else:
        capacity = [[draw(st.integers(0, 14)) for _ in range(tiers)] for _ in range(ranks)]
    if roomy:
        capacity = np.full((ranks, tiers), 1000)
    return assemble(
        tables,
        capacity,
        np.arange(ranks) // size,
        base=np.array([draw(small) for _ in range(ranks)], float) if draw(st.booleans()) else np.zeros(ranks),
        group=np.array(group[: len(tables)]),
        host_group=np.array(host_group[: len(tables)])
        if -1 in group[:2] or len(tables) < 2
        else np.full(len(tables), -1),
    )
