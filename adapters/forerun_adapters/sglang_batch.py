"""What a batch of SGLang's has: tokens here and on all ranks, and whether a CUDA graph is made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forerun_adapters._require import require

require("sglang")

from sglang.srt.runtime_context import get_parallel as _parallel  # noqa: E402

__all__ = ["apart", "batch_of", "captured", "each_of"]


def apart() -> bool:
    """Whether attention is data-parallel: each rank has tokens of its own."""
    return bool(_parallel().attn_dp_size > 1)


def batch_of(batch: Any) -> tuple[int, Tensor | None]:
    """A batch's tokens on all ranks together, and the ids of those on this rank, if it has any."""
    ids, each = batch.input_ids, each_of(batch)
    return sum(each) if each else 0 if ids is None else len(ids), ids


def each_of(batch: Any) -> list[int]:
    """A batch's tokens on each rank, where each has tokens of its own; none otherwise."""
    each = batch.global_num_tokens_cpu if apart() else None
    return [int(tokens) for tokens in each or ()]


def captured() -> bool:
    """Whether a CUDA graph is made of what runs now: what it repeats may not depend on where tokens go."""
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
