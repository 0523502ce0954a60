"""A server's batches, one after the other: which layers are spread in each, and whether that is sooner in truth.

Each layer is asked by itself what it expects (`choice.py`). What a layer takes besides its collectives is not in that,
nor what else the machine does; so a batch with any layer that would be spread goes by turns with stock's way, until it
is known for its size which is sooner (`alternation.py`). What a plan costs and saves is known once enough batches were
counted by experts (`imbalance.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forerun.moe.alternation import Alternation
from forerun.moe.imbalance import Ledger
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
        ledger: Of the plan that experts lie by; None: they lie in order, or as they lie in any case.
        useless: Is called between two batches, where the plan saves less than it costs.
    """

    ranks: Ranks
    layers: Sequence[Spread]
    device: torch.device
    trial: Alternation | None = None
    between: Callable[[], None] = lambda: None
    ledger: Ledger | None = None
    useless: Callable[[], None] = lambda: None

    def run(self, everywhere: int, ids: Tensor | None, forward: Callable[[], Any], each: Sequence[int] = ()) -> Any:
        """What the model makes of a batch.

        Args:
            everywhere: Its tokens on all ranks together.
            ids: Of those on this rank, if known.
            forward: Runs the model.
            each: Tokens of each rank, under data-parallel attention; left aside where they are not as many as the ids.
        """
        self.between()
        chosen = [layer for layer in self.layers if everywhere and layer.choice.spreads(everywhere)]
        tried = self.trial if chosen else None
        if chosen and (tried is None or tried.begin(everywhere, self.device)):
            self.ranks.foresight.begin(ids)
            for layer in chosen:
                layer.chosen = True
        counting = self.ledger is not None and everywhere > 0 and self.ledger.counts()
        told = bool(each) and ids is not None and each[self.ranks.rank] == len(ids)
        self.ranks.each, self.ranks.counting = each if told else (), counting
        try:
            result = forward()
        finally:
            for layer in chosen:
                layer.chosen = False
                layer.end()
        if tried is not None:
            tried.end(everywhere)
        if counting:
            self._enter(everywhere, tried)
        return result

    def _enter(self, tokens: int, tried: Alternation | None) -> None:
        """Into the ledger: which experts the batch asked, and what the plan saved of it on the wire."""
        assert self.ledger is not None
        self.ranks.counting = False
        nothing = torch.zeros(self.layers[0].experts, dtype=torch.int64, device=self.device)
        asked = torch.stack([nothing if layer.asked is None else layer.asked for layer in self.layers])
        for layer in self.layers:
            layer.asked = None
        # Where stock's way was found to be sooner by the plan, it is without it, as more would be sent.
        stock = tried is not None and tried.kept(tokens) is False
        saved = 0.0 if stock else sum(layer.choice.saves(tokens) for layer in self.layers)
        if self.ledger.saw(asked, saved) is False:
            self.useless()
