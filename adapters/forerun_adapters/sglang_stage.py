"""Where a decoder layer's tokens come to its experts and leave them, from SGLang 0.5.21 on: its FFN's stage.

`prepare` adds up the attention's output and its residual and norms it, `finish` adds up what the experts said. `Stage`
stands in for the stage of a layer that was built, and asks what it is given, a `forerun.moe.sglang_spread.Spread`.
`forerun_adapters.sglang_communicator` is the same for releases before.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from forerun_adapters._require import require
from forerun_adapters.sglang_batch import batch_of, captured

_RELEASE = require("sglang")

from sglang.srt.layers.layer_boundary import stage as _stage  # noqa: E402
from sglang.srt.layers.layer_boundary.residual import add_norm as _norm  # noqa: E402
from sglang.srt.layers.layer_boundary.residual import batch as _batch  # noqa: E402
from sglang.srt.layers.layer_boundary.residual.stream import DeclaredSum as _DeclaredSum  # noqa: E402
from sglang.srt.runtime_context import get_forward as _forward  # noqa: E402

__all__ = ["Stage", "boundary_of", "obstacle"]

# In 0.5.21 experts add up what they say themselves, unless they are told not to; and names are others. Remove when
# sglang >= 0.5.22.
_TOLD = Version("0.5.22") > _RELEASE
_stream_of = _batch.current if _TOLD else _batch.stream_of
_ADD, _NORM = (_norm.ADD, _norm.NORM_READ) if _TOLD else (_norm.PLAIN_ADD, _norm.NORM_READOUT)
_ADDS, _NORMS, _RECORD = (
    ("adds_plainly", "norms_plainly", "leave") if _TOLD else ("is_plain_add", "is_plain_norm", "record")
)


def boundary_of(decoder: nn.Module) -> Any | None:
    """A layer's stage; None: it hands its tokens over in another way."""
    stage = getattr(decoder, "ffn_boundary", None)
    return stage if isinstance(stage, _stage.StageBoundary) else None


def obstacle(stage: Any) -> str | None:
    """What of a stage only stock serves; None: nothing."""
    declared = stage.declaration
    transported = getattr(declared, "row_transport", None) is not None  # none before sglang 0.5.23
    plain = getattr(declared.read, _NORMS) and getattr(declared.update, _ADDS)
    reasons = (
        (stage.plan.fusions is not None or transported, "a stage with kernels of its own"),
        (not plain, "a residual that is not a plain sum"),
        (declared.output_transform is not None, "an output transform"),
        (_TOLD and declared.reduction.name != "SCOPED", "experts that add up what they say in any case"),
    )
    return next((reason for applies, reason in reasons if applies), None)


class Stage(_stage.StageBoundary):  # type: ignore[misc]
    """A stage that asks `forerun_spread` about every batch: whether it is spread, and to do it."""

    forerun_spread: Any

    def prepare(self, hidden_states: Any, forward_batch: Any, **call: Any) -> Any:
        stream, spread = _stream_of(forward_batch), self.forerun_spread
        tokens = _tokens(stream)
        everywhere = batch_of(forward_batch)[0] if spread.ranks.apart else tokens
        if tokens is None or captured() or not spread.begin(tokens, everywhere, _row(stream)):
            return super().prepare(hidden_states, forward_batch, **call)
        part, residual = stream.input(hidden_states)
        mine, residual = spread.scatter(part, residual)
        mine, residual = _NORM.update_and_read(_ADD, mine, residual, self.norm)
        stream.write(residual)
        return mine

    def exit(self, forward_batch: Any, **named: Any) -> Any:
        if not self.forerun_spread.under_way:
            return super().exit(forward_batch, **named)
        return _Exit(self, forward_batch)

    def finish(self, hidden_states: Any, forward_batch: Any, **named: Any) -> Any:
        spread = self.forerun_spread
        if not spread.under_way:
            return super().finish(hidden_states, forward_batch, **named)
        stream = _stream_of(forward_batch)
        if spread.ranks.apart:
            handed = getattr(stream, _RECORD)(hidden_states, _ADD)
        else:
            handed = stream.write(spread.gather(hidden_states, stream.residual))
        spread.end()
        return handed


class _Exit:
    """What a model is given that scopes its experts' computation by `exit`, not by `finish` alone."""

    defer_moe_finalize = False

    def __init__(self, stage: Stage, batch: Any) -> None:
        self._stage, self._batch = stage, batch
        self._scope = _forward().scoped(fuse_mlp_allreduce=True) if _TOLD else nullcontext()

    def __enter__(self) -> _Exit:
        self._scope.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._scope.__exit__(*raised)

    def finish(self, hidden_states: Any) -> Any:
        return self._stage.finish(hidden_states, self._batch)


def _tokens(stream: Any) -> int | None:
    """A batch's tokens here; None where what was handed over is no plain part of a sum."""
    pending = stream.pending
    if pending is None or stream.residual is None or not isinstance(pending.value, Tensor):
        return None
    owed = pending.owed
    if owed is not None and not (isinstance(owed, _DeclaredSum) and getattr(owed, "complete_sum", None) is None):
        return None
    return len(pending.value)


def _row(stream: Any) -> int:
    value = stream.pending.value
    return int(value.shape[-1] * value.element_size())
