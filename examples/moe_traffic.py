"""Bytes that leave this rank, counted where they are handed to `torch.distributed`: the host's and ours alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Traffic"]


class Traffic:
    """Within, counts what collectives send from this rank to others.

    An all-to-all by its split sizes, this rank's own part left out; an all-reduce and a gathering as a ring sends them:
    2 (R - 1) / R of the buffer, and R - 1 times the part.

    Args:
        row: Bytes of a hidden state. Where rows of bytes are sent, this much of each is one; None: all of it.

    Attributes:
        rows: Bytes of hidden states by collective.
        index: Other bytes by collective: counts, indices, weights.
        calls: Collectives.
    """

    def __init__(self, row: int | None = None) -> None:
        self.rows: Counter[str] = Counter()
        self.index: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._row = row
        self._kept: dict[str, Callable[..., Any]] = {}

    @property
    def total(self) -> int:
        """Bytes of both kinds."""
        return self.rows.total() + self.index.total()

    def __enter__(self) -> Traffic:
        for name, count in (
            ("all_to_all_single", self._all_to_all),
            ("all_reduce", self._all_reduce),
            ("all_gather", self._all_gather),
            ("all_gather_into_tensor", self._all_gather),
            ("all_gather_single", self._all_gather),
        ):
            if hasattr(dist, name):
                self._kept[name] = getattr(dist, name)
                setattr(dist, name, _also(self._kept[name], count))
        return self

    def __exit__(self, *_: object) -> None:
        for name, kept in self._kept.items():
            setattr(dist, name, kept)
        self._kept = {}

    def _all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> None:
        ranks, here = dist.get_world_size(group), dist.get_rank(group)
        stays = len(input) // ranks if input_split_sizes is None else input_split_sizes[here]
        self._sent("all-to-all", input, (len(input) - stays) / max(len(input), 1))

    def _all_reduce(self, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> None:
        ranks = dist.get_world_size(group)
        self._sent("all-reduce", tensor, 2 * (ranks - 1) / ranks)

    def _all_gather(self, output: Any = None, input: Tensor | None = None, group: Any = None, **named: Any) -> None:
        tensor = next(t for t in (input, named.get("tensor"), named.get("input_tensor")) if t is not None)
        self._sent("all-gather", tensor, dist.get_world_size(group) - 1)

    def _sent(self, name: str, tensor: Tensor, times: float) -> None:
        size = round(tensor.numel() * tensor.element_size() * times)
        of_rows = 0
        if tensor.dtype == torch.uint8 and tensor.ndim == 2 and tensor.shape[1]:
            of_rows = size if self._row is None else size // tensor.shape[1] * self._row
        elif tensor.is_floating_point() and tensor.ndim >= 2:
            of_rows = size
        self.calls[name] += 1
        self.rows[name] += of_rows
        self.index[name] += size - of_rows


def _also(function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        count(*arguments, **named)
        return function(*arguments, **named)

    return counted
