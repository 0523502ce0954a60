"""Attention of a prompt's last tokens."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from forerun.runahead.lowest import attend_last


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("rows, before", [(1, 0), (1, 70), (255, 3), (256, 0), (300, 41), (600, 500)])
def test_as_one_mask_over_everything(rows, before, heads, kv_heads):
    draw = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, heads, 16, generator=draw)
    key, value = (torch.randn(rows + before, kv_heads, size, generator=draw) for size in (16, 24))
    mask = torch.ones(rows, rows + before).tril(before).bool()
    group = heads // kv_heads
    wanted = scaled_dot_product_attention(
        query.transpose(0, 1),
        key.repeat_interleave(group, 1).transpose(0, 1),
        value.repeat_interleave(group, 1).transpose(0, 1),
        mask,
        scale=0.3,
    ).transpose(0, 1)
    torch.testing.assert_close(attend_last(query, key, value, scale=0.3), wanted, atol=2e-6, rtol=1e-5)
