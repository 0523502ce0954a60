"""Where a decoder layer's tokens come to its experts and leave them, before SGLang 0.5.21: its communicator.

`prepare_mlp` adds up the attention's output and its residual and norms it, `postprocess_layer` moves what the experts
said, which they add up unless they are told that somebody else does. `Stage` stands in for the communicator of a layer
that was built, and asks what it is given, a `forerun.moe.sglang_spread.Spread`. Remove when sglang >= 0.5.21, which has
what `forerun_adapters.sglang_stage` says instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from forerun_adapters._require import require
from forerun_adapters.sglang_batch import batch_of, captured

require("sglang")

from sglang.srt.layers import communicator as _communicator  # noqa: E402

__all__ = ["Stage", "boundary_of", "obstacle"]


def boundary_of(decoder: nn.Module) -> Any | None:
    """A layer's communicator; None: it hands its tokens over in another way."""
    found = getattr(decoder, "layer_communicator", None)
    return found if isinstance(found, _communicator.LayerCommunicator) else None


def obstacle(communicator: Any) -> str | None:
    """What of a communicator only stock serves; None: nothing."""
    modes = communicator.layer_scatter_modes
    ways = {modes.layer_input_mode, modes.attn_mode, modes.middle_residual_mode, modes.layer_output_mode}
    reasons = (
        (type(communicator) not in (_communicator.LayerCommunicator, Stage), "a communicator of its own kind"),
        # SGLang's sign that the layer's experts leave their sum to somebody else where they are told so.
        (not communicator.allow_reduce_scatter, "experts that add up what they say in any case"),
        # There are none before sglang 0.5.19.
        (getattr(communicator, "_sp_variant", None) is not None, "norms on parts of a sequence"),
        (ways != {_communicator.ScatterMode.TP_ATTN_FULL}, "tokens that come or go in parts"),
    )
    return next((reason for applies, reason in reasons if applies), None)


class Stage(_communicator.LayerCommunicator):  # type: ignore[misc]
    """A communicator that asks `forerun_spread` about every batch: whether it is spread, and to do it."""

    forerun_spread: Any

    def prepare_mlp(self, hidden_states: Any, residual: Any, forward_batch: Any, *rest: Any, **named: Any) -> Any:
        tokens, row = len(hidden_states), int(hidden_states.shape[-1] * hidden_states.element_size())
        spread = self.forerun_spread
        everywhere = batch_of(forward_batch)[0] if spread.ranks.apart else tokens
        if len(residual) != tokens or captured() or not spread.begin(tokens, everywhere, row):
            return super().prepare_mlp(hidden_states, residual, forward_batch, *rest, **named)
        mine, residual = spread.scatter(hidden_states, residual)
        return self.post_attention_layernorm(mine, residual) if len(mine) else (mine, residual)

    def should_use_reduce_scatter(self, forward_batch: Any) -> bool:
        # Experts that are told so do not add up.
        return self.forerun_spread.under_way or bool(super().should_use_reduce_scatter(forward_batch))

    def should_fuse_mlp_allreduce_with_next_layer(self, forward_batch: Any) -> bool:
        fuses = super().should_fuse_mlp_allreduce_with_next_layer
        return not self.forerun_spread.under_way and bool(fuses(forward_batch))

    def postprocess_layer(self, hidden_states: Any, residual: Any, forward_batch: Any, **named: Any) -> Any:
        spread = self.forerun_spread
        if not spread.under_way:
            return super().postprocess_layer(hidden_states, residual, forward_batch, **named)
        # A sum without a residual is one of SGLang's own ways to hand over.
        handed = (hidden_states, residual) if spread.ranks.apart else (spread.gather(hidden_states, residual), None)
        spread.end()
        return handed
