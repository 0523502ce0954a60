"""Triangular Anderson mixing: earlier sweeps' trajectories, combined so that a point uses only points before it."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from forerun.picard.predict import working_dtype

__all__ = ["Anderson"]


class Anderson:
    """Mixes a rebuilt trajectory with earlier ones, from the window's start to each point by weights of its own.

    Weights solve a least-squares problem over the points from the window's start to that point (a running sum of Gram
    matrices), so a point never depends on a later one and the points that are final stay untouched by construction:
    their residuals are 0.

    Source: Accelerating Parallel Sampling of Diffusion Models, arXiv 2402.09970, theorem 3.2 and sec. 3.2 (ParaTAA).
    """

    def __init__(self, memory: int = 3, ridge: float = 1e-3) -> None:
        self._ridge = ridge  # relative to the mean diagonal of the Gram matrix
        self._history: deque[tuple[Tensor, Tensor]] = deque(maxlen=memory)  # changes of trajectory and of residual
        self._last: tuple[int, Tensor, Tensor] | None = None  # first point, trajectory, residual

    def mix(self, lo: int, old: Tensor, rebuilt: Tensor) -> Tensor:
        """`[W, B, ...]` the next trajectory, for the points from `lo` on, from the last one and its rebuild."""
        dtype = working_dtype(old.dtype)
        residual = rebuilt.to(dtype) - old.to(dtype)
        self._remember(lo, old.to(dtype), residual)
        if not self._history:
            return rebuilt
        moves = torch.stack([_fit_length(move, len(old)) for move, _ in self._history], -1).flatten(2, -2)
        turns = torch.stack([_fit_length(turn, len(old)) for _, turn in self._history], -1).flatten(2, -2)
        gram = (turns.transpose(-1, -2) @ turns).cumsum(0)  # [W, B, memory, memory]
        target = (turns.transpose(-1, -2) @ residual.flatten(2)[..., None]).cumsum(0)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        ridge = self._ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(dtype).tiny
        weights, failed = torch.linalg.solve_ex(gram + torch.diag_embed(ridge.expand_as(diagonal)), target)
        mixed = rebuilt.to(dtype) - ((moves + turns) @ weights).reshape(residual.shape)
        # Guard: a point whose weights fail, or that they throw far off, is left as rebuilt.
        unusable = (failed != 0) | ~(mixed.abs().flatten(2).amax(2) < 10 * rebuilt.abs().amax())
        unusable = unusable.reshape(*unusable.shape, *(1,) * (residual.ndim - 2))
        return torch.where(unusable, rebuilt.to(dtype), mixed).to(old.dtype)

    def _remember(self, lo: int, old: Tensor, residual: Tensor) -> None:
        if self._last is not None:
            skip = lo - self._last[0]
            self._history = deque(((move[skip:], turn[skip:]) for move, turn in self._history), self._history.maxlen)
            before, before_residual = (_fit_length(part[skip:], len(old)) for part in self._last[1:])
            known = torch.arange(len(old), device=old.device) < len(self._last[1]) - skip
            known = known.reshape(-1, *(1,) * (old.ndim - 1))
            self._history.append(
                (torch.where(known, old - before, 0), torch.where(known, residual - before_residual, 0))
            )
        self._last = (lo, old, residual)


def _fit_length(values: Tensor, length: int) -> Tensor:
    """Cut or padded with zeros to `length` along the first axis."""
    if len(values) >= length:
        return values[:length]
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
