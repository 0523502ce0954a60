"""Which rank each token of a batch goes to, layer by layer, before the router has spoken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forerun.moe.alternation import Alternation
from forerun.moe.plan import Plan
from forerun.moe.shuffle import Shuffle, assign, shuffle

__all__ = ["Foresight", "even"]


def even(tokens: int, ranks: int) -> Shuffle:
    """Tokens in their own order, in chunks whose sizes differ by at most one."""
    order = torch.arange(tokens)
    return Shuffle(order, order, tuple(tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)))


class Foresight:
    """Shuffles of one batch after the other; the same on every rank that is told the same.

    Args:
        plan: What is expected; None: nothing, tokens stay in their order.
        columns: The plan's rank of each rank that tokens are spread over.
        trial: By which it is decided whether tokens are shuffled or stay in their order; None: they are.
    """

    def __init__(self, plan: Plan | None, columns: Sequence[int], trial: Alternation | None = None) -> None:
        self.columns = list(columns)
        self._plan = plan
        self._trial = trial if plan is not None else None
        self._shuffles = plan is not None  # this batch
        self._row: Tensor | None = None
        self._ids: Tensor | None = None
        self._last: list[Tensor] = []  # of the last two layers, the plan's rank of most of each token's experts
        if plan is not None:
            shares = np.concatenate([plan.share.astype(np.float32), plan.prior[:, None]], axis=1)
            self._share = torch.from_numpy(shares)  # [L, N + 1, R], what is not known at the end
            self._known = torch.from_numpy(plan.tokens)

    @property
    def looks_back(self) -> bool:
        """Whether it wants to be told ranks by `saw`."""
        return self._plan is not None and bool(self._plan.weight.any())

    @property
    def looks(self) -> bool:
        """Whether it wants to be told them in this batch."""
        return self._shuffles and self.looks_back

    def begin(self, ids: Tensor | None) -> None:
        """A batch of these token ids, any shape; None: they are not known."""
        self._ids = None if ids is None else ids.detach().flatten().cpu()
        self._row, self._last = None, []
        if self._trial is not None and ids is not None:
            self._shuffles = self._trial.begin(ids.numel(), ids.device)

    def end(self) -> None:
        """The batch is through its last layer."""
        if self._trial is not None and self._ids is not None:
            self._trial.end(len(self._ids))

    def saw(self, rank: Tensor) -> None:
        """`[n]` the plan's rank of most of each token's experts, in the layer that was shuffled last."""
        self._last = [*self._last[-1:], rank.cpu().long()]

    def shuffle(self, layer: int, tokens: int) -> Shuffle:
        """Where the batch's tokens go.

        Args:
            layer: Its place in the plan's layers.
            tokens: n; where it is not the number of ids, they are taken as not known.
        """
        ranks = len(self.columns)
        if self._plan is None or not self._shuffles or self._ids is None or len(self._ids) != tokens:
            return even(tokens, ranks)
        if self._row is None:
            row = torch.searchsorted(self._known, self._ids)
            inside = row.clamp(max=max(len(self._known) - 1, 0))
            known = self._known[inside] == self._ids if len(self._known) else torch.zeros(tokens, dtype=torch.bool)
            self._row = torch.where(known, inside, len(self._known))
        share = self._share[layer].index_select(0, self._row)
        if layer >= 2 and len(self._last) == 2 and self._plan.weight[layer]:
            before, last = (rank.numpy() for rank in self._last)
            share = torch.from_numpy(self._plan.lookback(layer).adjusted(share.numpy(), before, last))
        return shuffle(assign(share[:, self.columns]), ranks)
