"""Whether a file's arrays are those that a profile or a plan is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["refuse_misfits"]


def refuse_misfits(arrays: Iterable[tuple[str, NDArray[Any], type, tuple[int | None, ...]]], of: str) -> None:
    """Raises unless each array has its type and shape, numbers that are finite and not negative.

    Args:
        arrays: Name, array, expected type, expected shape (None: any length) of each.
        of: What they belong to.

    Raises:
        ValueError: One does not; the message says what came and what was expected.
    """
    for name, array, kind, shape in arrays:
        fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
        if array.dtype != kind or not fits:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; expected {np.dtype(kind)}{list(shape)} "
                f"(None: any length) for {of}"
            )
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"{name} has a number that is negative or not finite")
