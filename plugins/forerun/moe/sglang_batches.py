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
        decided = tried is not None and tried.end(everywhere) is not None
        if counting:
            self._enter(everywhere)
        if self.ledger is not None and (counting or decided) and self.ledger.worth() is False:
            self.useless()
        return result

    def shown(self, tokens: int) -> bool | None:
        """Whether batches of so many tokens are sooner spread where it is expected; None: it is not known yet.

        Where stock's way was found to be sooner by the plan, it is without it, as more would be sent.
        """
        return True if self.trial is None else self.trial.kept(tokens)

    def _enter(self, tokens: int) -> None:
        """Into the ledger: which experts the batch asked, and what the plan saved of it on the wire."""
        assert self.ledger is not None
        self.ranks.counting = False
        nothing = torch.zeros(self.layers[0].experts, dtype=torch.int64, device=self.device)
        asked = torch.stack([nothing if layer.asked is None else layer.asked for layer in self.layers])
        for layer in self.layers:
            layer.asked = None
        self.ledger.saw(asked, tokens, sum(layer.choice.saves(tokens) for layer in self.layers))
