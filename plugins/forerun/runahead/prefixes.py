"""Which beginnings of prompts an engine's prefix cache probably holds: hashes of blocks, the least used forgotten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

__all__ = ["Prefixes", "block_keys", "digest", "token_bytes"]


def token_bytes(tokens: Sequence[int]) -> bytes:
    """What stands for tokens in keys and digests, 8 bytes each.

    Raises:
        OverflowError: One is no token's number.
    """
    return np.asarray(tokens, "<i8").tobytes()


def digest(tokens: Sequence[int]) -> str:
    """Tells prompts apart: what an engine is sent keys and values for must be what it was asked."""
    return blake2b(token_bytes(tokens), digest_size=16).hexdigest()


def block_keys(content: bytes, size: int, root: str) -> list[bytes]:
    """A key for each whole block, which depends on all blocks before it too.

    Args:
        content: Of the prompt.
        size: Bytes of a block.
        root: What prompts must have in common besides, such as the model.
    """
    key, keys = blake2b(root.encode(), digest_size=16).digest(), []
    for end in range(size, len(content) + 1, size):
        key = blake2b(content[end - size : end], key=key, digest_size=16).digest()
        keys.append(key)
    return keys


class Prefixes:
    """One engine's.

    Args:
        capacity: Blocks, at most.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def match(self, keys: Sequence[bytes]) -> int:
        """Blocks at the beginning that are held."""
        return next((i for i, key in enumerate(keys) if key not in self._held), len(keys))

    def add(self, keys: Sequence[bytes]) -> None:
        """A prompt's blocks were computed or used; the last ones are forgotten first, as the engine does."""
        for key in reversed(keys[: self._capacity]):
            self._held[key] = None
            self._held.move_to_end(key)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)

    def clear(self) -> None:
        """The engine has started anew."""
        self._held.clear()
