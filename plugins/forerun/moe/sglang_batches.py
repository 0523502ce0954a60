"""A server's batches, one after the other: which layers are spread in each, and whether that is sooner in truth.

Each layer is asked by itself what it expects (`choice.py`). What a layer takes besides its collectives is not in that,
nor what else the machine does; so a batch with any layer that would be spread goes by turns with stock's way, until it
is known for its size which is sooner (`alternation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forerun.moe.alternation import Alternation
from forerun.moe.sglang_spread import Ranks, Spread

__all__ = ["Batches"]


@dataclass(eq=False)
class Batches:
    """Runs batches, alike on all ranks.

    Args:
        ranks: Who shares the experts.
        layers: In order.
        device: Of the model.
        trial: By turns with stock's way; None: what is expected is done.
        between: Is called before every batch.
    """

    ranks: Ranks
    layers: Sequence[Spread]
    device: torch.device
    trial: Alternation | None = None
    between: Callable[[], None] = lambda: None

    def run(self, everywhere: int, ids: Tensor | None, forward: Callable[[], Any]) -> Any:
        """What the model makes of a batch.

        Args:
            everywhere: Its tokens on all ranks together.
            ids: Of those on this rank, if known.
            forward: Runs the model.
        """
        self.between()
        chosen = [layer for layer in self.layers if everywhere and layer.choice.spreads(everywhere)]
        tried = self.trial if chosen else None
        if chosen and (tried is None or tried.begin(everywhere, self.device)):
            self.ranks.foresight.begin(ids)
            for layer in chosen:
                layer.chosen = True
        try:
            result = forward()
        finally:
            for layer in chosen:
                layer.chosen = False
                layer.end()
        if tried is not None:
            tried.end(everywhere)
        return result
