"""Bytes and dot products of a chain, and of what it replaces, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from forerun.runahead.chain import check_contexts

__all__ = ["all_gather", "dot_products", "hops", "returned", "sent"]


def hops(contexts: Sequence[int], bytes_per_token: int) -> list[int]:
    """Bytes that each engine but the last sends on: of all tokens up to its context's end.

    Raises:
        ValueError: The contexts are no split.
    """
    check_contexts(contexts)
    return [end * bytes_per_token for end in accumulate(contexts[:-1])]


def sent(contexts: Sequence[int], bytes_per_token: int) -> int:
    """Bytes of all hops.

    Raises:
        ValueError: The contexts are no split.
    """
    return sum(hops(contexts, bytes_per_token))


def returned(contexts: Sequence[int], bytes_per_token: int) -> list[int]:
    """Bytes that each engine sends to all engines before it, where they shall hold the whole prompt too.

    With those that are sent on, they are the all-gather's: it is when they travel that differs.

    Raises:
        ValueError: The contexts are no split.
    """
    check_contexts(contexts)
    return [own * before * bytes_per_token for before, own in enumerate(contexts)]


def all_gather(tokens: int, engines: int, bytes_per_token: int) -> int:
    """Bytes that sequence parallelism moves: every engine gets what all others have."""
    return (engines - 1) * tokens * bytes_per_token


def dot_products(contexts: Sequence[int]) -> list[int]:
    """Of queries with keys, by a kernel that does not know the causal mask: each context with all tokens up to its end.

    Raises:
        ValueError: The contexts are no split.
    """
    check_contexts(contexts)
    return [own * end for own, end in zip(contexts, accumulate(contexts), strict=True)]
