"""Routes between orders of experts, and orders on the way."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from forerun.moe.move import Route, pieces, toward


@st.composite
def moves(draw):
    """Ranks, and two orders of experts."""
    ranks = draw(st.integers(1, 5))
    experts = ranks * draw(st.integers(1, 6))
    return ranks, *(torch.tensor(draw(st.permutations(range(experts)))) for _ in range(2))


@given(moves())
def test_routes_bring_every_expert_to_its_place(move):
    """What ranks send each other, taken by hand, is the other order."""
    ranks, before, after = move
    routes = [Route.between(before, after, rank, ranks) for rank in range(ranks)]
    held, placed = before.view(ranks, -1), before.view(ranks, -1).clone()
    for to, route in enumerate(routes):
        for by, places in enumerate(route.takes):
            placed[to, places] = held[by, routes[by].sends[to]]
    assert torch.equal(placed.flatten(), after)
    changed = (before != after).view(ranks, -1).sum(1).tolist()
    assert {route.widest for route in routes} == {max(changed)}
    assert [sum(map(len, route.takes)) for route in routes] == changed
    assert [sum(map(len, route.sends)) for route in routes] == changed


@given(moves(), st.integers(2, 8))
def test_orders_on_the_way_take_few_experts_and_arrive(move, most):
    ranks, before, after = move
    while not torch.equal(before, after):
        order = toward(before, after, ranks, most)
        assert sorted(order.tolist()) == sorted(after.tolist())
        assert (before != order).view(ranks, -1).sum(1).max() <= most
        assert (order == after).sum() > (before == after).sum()
        before = order


@given(moves(), st.integers(1, 200))
def test_pieces_are_all_bytes_and_fit(move, most):
    ranks, before, after = move
    route = Route.between(before, after, 0, ranks)
    weights = [[torch.zeros(3, 5) for _ in range(2)], [torch.zeros(7, dtype=torch.int16) for _ in range(2)]]
    found = list(pieces(weights, route, most))
    assert sum(parts[0].numel() for parts in found) == (74 if route.widest else 0)
    assert all(2 * route.widest * parts[0].numel() <= max(most, 2 * route.widest) for parts in found)
