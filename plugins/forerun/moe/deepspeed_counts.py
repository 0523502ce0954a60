"""A routing profile that goes on while a speculated model serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forerun.moe.identity import Identity
from forerun.moe.profile import Profile, Recorder

__all__ = ["MOST_TRIPLES", "Counter"]

MOST_TRIPLES = 1 << 22  # (layer, token, expert) counted at once: 64 MiB; beyond, the rarest are forgotten
_BATCH = 4096  # tokens that are counted together


class Counter:
    """Counts where each token id's occurrences go, layer by layer.

    Token ids are those that the model's forward pass is given: `input_ids`, or the first integer tensor; padding by
    `attention_mask` is left out. A pass without ids is not counted, nor is a token that a gate dropped.

    Args:
        identity: The model.
        seed: Of the sample of paths; another one on every rank.
    """

    def __init__(self, identity: Identity, seed: int) -> None:
        self._recorder = Recorder(identity, seed=seed, triples=MOST_TRIPLES)
        self._layers = len(identity.layers)
        self._ids: Tensor | None = None
        self._used: Tensor | None = None
        self._chosen: dict[int, Tensor] = {}
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def hooks(self, module: nn.Module) -> list[Any]:
        """Listens to a model's forward passes."""
        return [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end),
        ]

    def saw(self, index: int, expert: Tensor) -> None:
        """Takes a layer's experts, `[n, k]`, of the pass that runs."""
        if self._ids is not None and len(expert) == self._ids.numel():
            self._chosen[index] = expert

    def profile(self) -> Profile:
        """What was counted up to now."""
        self._count()
        return self._recorder.profile()

    def _begin(self, _module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._chosen = {}
        given = [named.get("input_ids"), *inputs, *named.values()]
        whole = [one for one in given if isinstance(one, Tensor) and one.dtype in (torch.int32, torch.int64)]
        self._ids = whole[0] if whole else None
        mask = named.get("attention_mask")
        fits = self._ids is not None and isinstance(mask, Tensor) and mask.shape == self._ids.shape
        self._used = mask if fits else None

    def _end(self, *_: Any) -> None:
        if self._ids is None or len(self._chosen) < self._layers:
            return
        experts = torch.stack([self._chosen[index] for index in range(self._layers)])  # [L, n, k]
        kept = (experts >= 0).all(2).all(0)
        if self._used is not None:
            kept &= self._used.flatten() != 0
        self._waiting.append((self._ids.flatten()[kept], experts[:, kept]))
        self._ids, self._chosen = None, {}
        if sum(len(ids) for ids, _ in self._waiting) >= _BATCH:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            ids, experts = zip(*self._waiting, strict=True)
            self._recorder.add(torch.cat(ids).cpu().numpy(), torch.cat(experts, 1).cpu().numpy())
            self._waiting = []
