"""Whether the way that should be sooner is: passes go our way and stock's by turns, and the sooner one is kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from forerun.moe.alternation import Alternation

__all__ = ["Trial"]

_OURS, _STOCK = "forerun's exchange", "DeepSpeed's own exchange"


class Trial:
    """Which way a model's layers take a pass, decided for each size of batches, from first layer to last, by all ranks.

    Stock's way is measured where experts lie by the plan, on batches that it takes: a classic layer's exchange, for
    one, may ask for as many tokens on every rank. Others go ours. Both ways give the same answer.

    Args:
        layers: The model's, speculated, in order.
        turns: As of `Alternation`: passes of each size by each way.
    """

    def __init__(self, layers: Sequence[Any], turns: int) -> None:
        self._first, self._last = layers[0], layers[-1]
        self._turns = Alternation(turns, self._first.ep_group, "forerun's exchange", "DeepSpeed's own exchange")
        self._tokens, self._takes = 0, False  # of the pass: the most on one rank, and whether stock takes it
        self.ours = True  # whether it goes our way

    def begin(self, layer: Any, tokens: int, batch: int) -> bool:
        """Whether a layer goes our way. At the first layer of a pass ranks agree on it; the others follow.

        Args:
            layer: Whose call begins.
            tokens: That this rank has.
            batch: What has to be the same on all ranks for stock to take them; negative: it does not.
        """
        if layer is self._first:
            device = next(layer.parameters()).device
            told = torch.tensor([tokens, batch, -batch], device=device)
            dist.all_reduce(told, dist.ReduceOp.MAX, group=layer.ep_group)
            self._tokens, most, least = (int(number) for number in told.tolist())
            self._takes = most == -least >= 0
            self.ours = not self._takes or self._turns.begin(self._tokens, device)
        return self.ours

    def end(self, layer: Any) -> None:
        """A layer's call is through."""
        if layer is self._last and self._takes and self._turns.end(self._tokens) is False:
            warnings.warn(f"forerun: batches of {self._turns.told(self._tokens)}", RuntimeWarning, stacklevel=2)
