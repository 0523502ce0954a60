"""Tokens shuffled between tensor-parallel ranks, where DeepSpeed folds AutoTP and AutoEP.

Replaces a decoder layer's forward pass in inference. Stock adds up the attention's output on every tensor-parallel
rank, routes all tokens on each, and gathers a row per (token, expert). Here each token is added up, with its residual,
on the rank that its experts are expected on; norm, router and experts are asked from there, and the layer's output
comes together on all ranks. The host's own modules compute; what was predicted wrongly goes the normal way.

Not supported: recording router logits (a rank sees its own tokens'), decoder layers that do more between attention and
experts than add and norm. The result is stock's but for roundings: see `forerun.moe.scatter`; the router's product and
the experts' have other numbers of rows, so that a token's near tie between two experts may fall the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forerun.moe.alternation import Alternation
from forerun.moe.foresight import Foresight
from forerun.moe.pieces import Pieces
from forerun.moe.plan import Plan
from forerun.moe.scatter import chunk, gather, scatter_sum
from forerun_adapters import deepspeed_folded as host

__all__ = ["folded", "obstacle", "shuffle_tokens", "unshuffle_tokens"]


@dataclass
class _State:
    """What a decoder layer carries while its tokens are shuffled."""

    stock: type[nn.Module]
    projection: type[nn.Module]  # stock's class of the attention's output projection
    foresight: Foresight
    layer: int  # its place among the MoE layers
    last: bool  # of those whose tokens are shuffled
    group: Any  # tensor-parallel
    pieces: Pieces
    hooks: list[Any] = field(default_factory=list)


class _Shuffled:
    """A decoder layer whose experts are asked for this rank's tokens alone; stock's class follows it."""

    forerun_shuffle: _State
    self_attn: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, **named: Any) -> Any:
        state = self.forerun_shuffle
        if torch.is_grad_enabled():
            return state.stock.forward(self, hidden_states, **named)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        there = state.foresight.shuffle(state.layer, len(tokens))
        part = host.attended(self, hidden_states, **named).reshape(tokens.shape)
        mine = scatter_sum(part, there, state.group, state.pieces)
        if self.self_attn.o_proj.bias is not None:
            mine = mine + self.self_attn.o_proj.bias
        mine = chunk(tokens, there, dist.get_rank(state.group)) + mine
        mine = mine + host.experts_of(self, mine)
        if state.foresight.looks:
            # The rank of each token's experts travels along as one more element: exact to 256 in any dtype.
            told = gather(
                torch.cat((mine, self.mlp.forerun_state.seen.to(mine)[:, None]), 1), there, state.group, state.pieces
            )
            state.foresight.saw(told[:, -1])
            whole = told[:, :-1]
        else:
            whole = gather(mine, there, state.group, state.pieces)
        if state.last:
            state.foresight.end()
        return whole.reshape(hidden_states.shape)


def folded(layer: Any) -> bool:
    """Whether a layer's ranks are shared with tensor-parallel attention."""
    return host.folding(layer) is not None


def obstacle(module: nn.Module, name: str, layer: Any) -> str | None:
    """Why tokens of a folded layer cannot be shuffled; None: they can, or it is not folded."""
    if not folded(layer):
        return None
    try:
        host.decoder(module, name)
    except ValueError as error:
        return str(error)
    return None


def shuffle_tokens(module: nn.Module, found: Sequence[tuple[str, Any]], plan: Plan | None, trial: int = 0) -> bool:
    """Shuffles tokens around those expert-parallel layers (name and module, in order) that are folded.

    Args:
        module: The model.
        found: The layers; none has an `obstacle`.
        plan: Where tokens are expected; None: they are split in their order.
        trial: Of each size of batches so many are shuffled and so many split in their order before one way is kept,
            the one that takes less time; 0: all are shuffled.

    Returns:
        Whether a layer's `forerun_state.seen` is asked for: `[n]` the plan's rank of most of each token's experts.
    """
    foresight: Foresight | None = None
    pieces: Pieces
    last = max((place for place, (_, layer) in enumerate(found) if folded(layer)), default=None)
    for place, (name, layer) in enumerate(found):
        folding = host.folding(layer)
        if folding is None:
            continue
        decoder = host.decoder(module, name)
        first = foresight is None
        if foresight is None:
            tried = Alternation(trial, folding.group, "tokens shuffled", "in their order") if trial else None
            foresight, pieces = Foresight(plan, folding.columns, tried), Pieces(folding.group)
        stock, projection = type(decoder), type(decoder.self_attn.o_proj)
        state = _State(stock, projection, foresight, place, place == last, folding.group, pieces)
        if first:
            state.hooks += _listening(module, foresight)
        decoder.forerun_shuffle = state
        decoder.__class__ = type(f"Shuffled{state.stock.__name__}", (_Shuffled, state.stock), {})
        decoder.self_attn.o_proj.__class__ = host.Part
    return foresight is not None and foresight.looks_back


def unshuffle_tokens(module: nn.Module) -> None:
    """Leaves every decoder layer as it was."""
    decoders: list[Any] = [one for one in module.modules() if isinstance(one, _Shuffled)]
    for decoder in decoders:
        state: _State = decoder.forerun_shuffle
        for hook in state.hooks:
            hook.remove()
        decoder.self_attn.o_proj.__class__ = state.projection
        decoder.__class__ = state.stock
        del decoder.forerun_shuffle


def _listening(module: Any, foresight: Foresight) -> list[Any]:
    """Hooks by which it learns a batch's token ids. For embeddings from outside it knows none and foresees nothing."""

    def begin(_: Any, inputs: Any) -> None:
        foresight.begin(inputs[0] if inputs else None)

    forget = module.register_forward_pre_hook(lambda *_: foresight.begin(None), prepend=True)
    return [forget, module.get_input_embeddings().register_forward_pre_hook(begin)]
