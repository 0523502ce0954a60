"""Requests to data-parallel ranks, near the experts that their tokens are expected to take.

Under data parallelism a request stays on one rank through all layers, and whoever splits the batch decides on which.
Every rank answers its requests as any other would: the split changes what travels, not what is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.moe.plan import Plan

__all__ = ["Arrivals", "assign", "expected"]

_WORTH = 64  # tokens whose experts are at hand, that a rank's further request is worth: an answer may be as long


def assign(requests: Sequence[Any], plan: Plan, *, limit: float = 1.1) -> NDArray[np.int64]:
    """`[n]` the rank of each request: where most of its experts are expected, as far as there is room.

    Requests that lose most elsewhere choose first (by *regret*); one that fits nowhere goes where there is most room.
    So no rank has more tokens than `limit` times the mean, or than the mean and the longest request. The same requests
    and plan give the same ranks.

    Plain equivalent where there is room for all: `expected(requests, plan).argmax(1)`.

    Args:
        requests: Token ids of each: sequences, arrays or tensors of whole numbers, any shape, none empty by need.
        plan: Whose ranks they are spread over.
        limit: Most tokens of a rank, over the mean; 1 or more.

    Raises:
        ValueError: The limit is below 1.
        TypeError: A request holds something else than whole numbers.
    """
    if not limit >= 1:
        raise ValueError(f"limit is {limit}; expected tokens of a rank over the mean, 1 or more")
    ids = [_ids(request) for request in requests]
    size = np.array([len(one) for one in ids], np.int64)
    share = expected(ids, plan) * size[:, None]  # tokens whose experts are expected there
    room = np.full(plan.ranks, limit * size.sum() / plan.ranks + 1e-9)
    rank = np.full(len(ids), -1, np.int64)
    waiting = np.arange(len(ids))
    while len(waiting):
        open_to = room >= size[waiting, None]
        gain = np.where(open_to, share[waiting], -np.inf)
        nowhere = ~open_to.any(1)
        if nowhere.any():
            longest = np.flatnonzero(nowhere)[size[waiting[nowhere]].argmax()]
            chosen, to = longest, int(room.argmax())
        else:
            best = np.sort(gain, axis=1)
            second = np.where(np.isfinite(best[:, -2]), best[:, -2], 0) if plan.ranks > 1 else 0
            chosen = int((best[:, -1] - second).argmax())
            to = int(gain[chosen].argmax())
        rank[waiting[chosen]] = to
        room[to] -= size[waiting[chosen]]
        waiting = np.delete(waiting, chosen)
    return rank


class Arrivals:
    """Requests one by one, as they come: each to the rank where most of its experts are expected, if that has room.

    A rank has room while its tokens, older ones counting less and less, are at most `limit` times the mean with the
    request on it, or while no other rank has fewer. Requests that come together answer together, token by token, and
    the rank with most of them is waited for: so they go to the ranks in turn, those that wait for their answers where
    that is known. Out of turn they go where as many tokens' experts as an answer may be long are expected there and
    nowhere whose turn it is, to a rank that is at most one request ahead of the mean; where it is not known which ones
    wait, what a rank is ahead by further than one counts less and less.

    Args:
        plan: Whose ranks they are spread over.
        limit: Most tokens of a rank, over the mean; 1 or more.
        memory: Tokens of later requests after which a request's tokens count half.
        recent: Later requests after which one that was out of turn counts half.

    Raises:
        ValueError: The limit is below 1.
    """

    def __init__(self, plan: Plan, *, limit: float = 1.1, memory: int = 1 << 16, recent: int = 32) -> None:
        if not limit >= 1:
            raise ValueError(f"limit is {limit}; expected tokens of a rank over the mean, 1 or more")
        self._plan, self._limit, self._memory, self._recent = plan, limit, memory, recent
        self.load = np.zeros(plan.ranks)  # tokens of each rank
        self.ahead = np.zeros(plan.ranks)  # requests that each rank had more than the one with fewest

    def rank(self, request: Any, waiting: Sequence[int] | None = None) -> int:
        """The rank of the next request.

        Args:
            request: Its token ids, as in `assign`.
            waiting: Requests of each rank that are not answered yet, which are evened out; None: not known, those of
                all time are.

        Raises:
            TypeError: It holds something else than whole numbers.
        """
        ids = _ids(request)
        self.load *= 0.5 ** (len(ids) / self._memory)
        if waiting is None:
            self.ahead -= np.maximum(self.ahead - 1, 0) * (1 - 0.5 ** (1 / self._recent))
        else:
            self.ahead = np.array(waiting, float) - min(waiting)
        share = expected([ids], self._plan)[0]
        has_room, in_turn = self._room(len(ids)), self.ahead < 0.5
        worth = (share - share[in_turn].max()) * len(ids) >= _WORTH
        open_to = has_room & (in_turn | (worth & (self.ahead <= self.ahead.mean() + 1)))
        if not open_to.any():
            open_to = has_room & (self.ahead <= self.ahead[has_room].min())
        best = np.flatnonzero(open_to & (share >= share[open_to].max() - 1e-12))
        chosen = int(best[self.load[best].argmin()])
        self.load[chosen] += len(ids)
        self.ahead[chosen] += 1
        self.ahead -= self.ahead.min()
        return chosen

    def _room(self, more: int) -> NDArray[np.bool_]:
        load = self.load
        most = self._limit * (load.sum() + more) / self._plan.ranks
        room: NDArray[np.bool_] = (load + more <= most) | (load <= load.min())
        return room


def expected(requests: Sequence[Any], plan: Plan) -> NDArray[np.float64]:
    """`[n, R]` what share of each request's experts is expected on each rank, over its tokens and all layers.

    Args:
        requests: As in `assign`; an empty one is expected anywhere alike.
        plan: By which it is expected.
    """
    share = np.full((len(requests), plan.ranks), 1 / plan.ranks)
    for at, request in enumerate(requests):
        ids, counts = np.unique(_ids(request), return_counts=True)
        if len(ids):
            layers = [counts @ plan.shares(layer, ids) for layer in range(len(plan.identity.layers))]
            share[at] = np.mean(layers, axis=0) / counts.sum()
    return share


def _ids(request: Any) -> NDArray[np.int64]:
    ids = np.asarray(request.cpu() if hasattr(request, "cpu") else request)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"a request is {ids.dtype}{list(ids.shape)}; expected its token ids, whole numbers")
    return ids.ravel().astype(np.int64)
