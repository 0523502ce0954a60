"""Causal attention of a prompt's last tokens to all of it, on what torch ships."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attend_last"]

_ROWS = 256  # queries at once: a mask of so many rows, and nothing above its diagonal block is computed


def attend_last(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """What the last N of S tokens see: query i attends to the first `S - N + i + 1` keys.

    The plain equivalent is `scaled_dot_product_attention(query, key, value, mask)` with
    `mask = torch.ones(N, S).tril(S - N).bool()`, without the work above the diagonal.

    Args:
        query: `[N, H, D]`.
        key: `[S, K, D]`; K divides H.
        value: `[S, K, E]`.
        scale: Of the scores; None: 1 / sqrt(D).

    Returns:
        `[N, H, E]`.
    """
    rows, heads, _ = query.shape
    before = key.shape[0] - rows
    group = heads // key.shape[1]
    keys, values = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    if not before:
        queries = query.transpose(0, 1)[None]
        whole = scaled_dot_product_attention(queries, keys, values, scale=scale, is_causal=True, enable_gqa=group > 1)
        return whole[0].transpose(0, 1)
    found = query.new_empty(rows, heads, value.shape[2])
    for start in range(0, rows, _ROWS):
        end = min(start + _ROWS, rows)
        seen = before + end
        mask = query.new_full((end - start, seen), float("-inf")).triu_(before + start + 1)
        attended = scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            keys[:, :, :seen],
            values[:, :, :seen],
            mask,
            scale=scale,
            enable_gqa=group > 1,
        )
        found[start:end] = attended[0].transpose(0, 1)
    return found
