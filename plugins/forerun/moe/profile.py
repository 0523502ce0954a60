"""A routing profile: which experts the tokens of a text were sent to.

Counts are kept by (layer, token, expert). They say nothing of one token's experts together, nor of its way through the
layers; for that a uniform sample of whole *paths* is kept, all experts of one token occurrence in all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forerun.moe.check import refuse_misfits
from forerun.moe.files import read, write
from forerun.moe.identity import MOST_EXPERTS, MOST_LAYERS, MOST_TOKENS, Identity

__all__ = ["Paths", "Profile", "Recorder", "Table", "merge"]

_EXPERT_BITS, _TOKEN_BITS = MOST_EXPERTS.bit_length() - 1, MOST_TOKENS.bit_length() - 1
_LARGEST = (MOST_LAYERS << (_EXPERT_BITS + _TOKEN_BITS)) - 1


class Table(NamedTuple):
    """One layer's counts, dense."""

    tokens: NDArray[np.int64]  # [N] ids that occur, rising
    counts: NDArray[np.float32]  # [N, E]


class Paths(NamedTuple):
    """Token occurrences with all their experts."""

    key: NDArray[np.uint64]  # [P] random; a sample of n keeps the n smallest
    token: NDArray[np.int64]  # [P] ids
    experts: NDArray[np.int16]  # [P, L, k]


@dataclass(frozen=True, eq=False)
class Profile:
    """Counts and paths of one model on one text; `Recorder` and `from_counts` make them.

    Args:
        identity: The model.
        keys: `[n]` rising; layer (its place in `identity.layers`), token and expert in one number.
        counts: `[n]` occurrences of each.
        paths: A uniform sample of occurrences; may be empty.

    Raises:
        ValueError: The arrays do not fit together or the model.
    """

    identity: Identity
    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    paths: Paths

    def __post_init__(self) -> None:
        identity, paths = self.identity, self.paths
        whole = (paths.key.size, len(identity.layers), identity.top_k)
        refuse_misfits(
            [
                ("keys", self.keys, np.int64, (None,)),
                ("counts", self.counts, np.int64, (self.keys.size,)),
                ("path_key", paths.key, np.uint64, (None,)),
                ("path_token", paths.token, np.int64, whole[:1]),
                ("path_experts", paths.experts, np.int16, whole),
            ],
            str(identity),
        )
        if (np.diff(self.keys) <= 0).any():
            raise ValueError("keys must rise")
        layer, token, expert = _unpacked(self.keys)
        if (layer >= len(identity.layers)).any() or (expert >= identity.experts).any():
            raise ValueError(f"keys name a layer or an expert that {identity} does not have")
        if (self.counts < 1).any():
            raise ValueError("counts must be 1 or more")
        if (paths.experts >= identity.experts).any():
            raise ValueError(f"path_experts name an expert that {identity} does not have")
        if any(not np.isin(paths.token, token[layer == place]).all() for place in range(len(identity.layers))):
            raise ValueError("path_token names a token that is not counted")

    @classmethod
    def from_counts(
        cls, identity: Identity, layer: ArrayLike, token: ArrayLike, expert: ArrayLike, count: ArrayLike
    ) -> Profile:
        """A profile of counts alone, one entry per (layer, token, expert).

        Args:
            identity: The model.
            layer: `[n]` numbers as in `identity.layers`.
            token: `[n]` ids.
            expert: `[n]`.
            count: `[n]`.

        Raises:
            ValueError: A number is none of the model's.
        """
        numbers = np.asarray(layer, np.int64)
        place = np.minimum(np.searchsorted(identity.layers, numbers), len(identity.layers) - 1)
        if (np.asarray(identity.layers)[place] != numbers).any():
            raise ValueError(f"layers {sorted(set(numbers.tolist()))} are counted; {identity} has {identity.layers}")
        keys = _packed(identity, place, np.asarray(token), np.asarray(expert))
        return cls(identity, *_summed(keys, np.asarray(count, np.int64)), _no_paths(identity))

    def table(self, layer: int) -> Table:
        """The counts of a layer, given by its place in `identity.layers`."""
        shift = _EXPERT_BITS + _TOKEN_BITS
        start, end = np.searchsorted(self.keys, [layer << shift, (layer + 1) << shift])
        _, token, expert = _unpacked(self.keys[start:end])
        tokens, row = np.unique(token, return_inverse=True)
        counts = np.zeros((len(tokens), self.identity.experts), np.float32)
        counts[row, expert] = self.counts[start:end]
        return Table(tokens, counts)

    def save(self, path: str | Path) -> None:
        """Writes the profile as safetensors."""
        arrays: dict[str, NDArray[Any]] = {
            "keys": self.keys,
            "counts": self.counts,
            "path_key": self.paths.key,
            "path_token": self.paths.token,
            "path_experts": self.paths.experts,
        }
        write(path, "profile", {"identity": self.identity.as_json()}, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote.

        Raises:
            OSError: The file is not there.
            ValueError: It is not a profile, or a damaged one.
        """
        header, arrays = read(path, "profile")
        try:
            paths = Paths(arrays["path_key"], arrays["path_token"], arrays["path_experts"])
            return cls(Identity.from_json(header.get("identity")), arrays["keys"], arrays["counts"], paths)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is a damaged profile: {error}") from error


class Recorder:
    """Counts a model's routing while it runs, in memory that the text's length hardly adds to.

    Args:
        identity: The model.
        paths: Most paths that are kept.
        seed: Of the sample; recorders whose profiles are merged take different ones.
        triples: Most (layer, token, expert) that are counted: where there are more, the rarest are forgotten, with the
            paths of tokens of which nothing is left; None: no end.
    """

    def __init__(self, identity: Identity, *, paths: int = 1 << 15, seed: int = 0, triples: int | None = None) -> None:
        self.identity, self._triples = identity, triples
        self._most, self._random = paths, np.random.default_rng(seed)
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._paths = _no_paths(identity)
        self._waiting: list[NDArray[np.int64]] = []

    def add(self, tokens: ArrayLike, experts: ArrayLike) -> None:
        """Counts a batch.

        Args:
            tokens: `[n]` ids.
            experts: `[L, n, k]` the experts of each in each layer.

        Raises:
            ValueError: They are none of this model's; nothing is counted.
        """
        token, chosen = np.asarray(tokens), np.asarray(experts)
        layers, top_k = len(self.identity.layers), self.identity.top_k
        if token.ndim != 1 or chosen.shape != (layers, token.size, top_k):
            raise ValueError(
                f"tokens {list(token.shape)} with experts {list(chosen.shape)}; expected [n] and "
                f"[{layers}, n, {top_k}] for {self.identity}"
            )
        place = np.arange(layers)[:, None, None]
        self._waiting.append(_packed(self.identity, place, token[None, :, None], chosen).ravel())
        keys = self._random.integers(0, 1 << 63, token.size, np.uint64)
        batch = Paths(keys, token.astype(np.int64), chosen.transpose(1, 0, 2).astype(np.int16))
        self._paths = _sampled([self._paths, batch], self._most)
        if sum(map(len, self._waiting)) > max(1 << 20, len(self._keys)):
            self._count()

    def profile(self) -> Profile:
        """What was counted up to now."""
        self._count()
        return Profile(self.identity, self._keys, self._counts, self._paths)

    def _count(self) -> None:
        new = np.concatenate([np.zeros(0, np.int64), *self._waiting])
        keys, counts = np.concatenate([self._keys, new]), np.concatenate([self._counts, np.ones_like(new)])
        self._keys, self._counts = _summed(keys, counts)
        self._waiting = []
        if self._triples is not None and len(self._keys) > self._triples:
            self._forget()

    def _forget(self) -> None:
        # Half of the room is left free, so that this is seldom done.
        kept = np.sort(np.argsort(-self._counts, kind="stable")[: max(1, self._triples or 0) // 2])
        self._keys, self._counts = self._keys[kept], self._counts[kept]
        layer, token, _ = _unpacked(self._keys)
        known = [np.isin(self._paths.token, token[layer == place]) for place in range(len(self.identity.layers))]
        self._paths = Paths(*(part[np.logical_and.reduce(known)] for part in self._paths))


def merge(*profiles: Profile, paths: int = 1 << 15) -> Profile:
    """One profile of several texts, as if one recorder had seen them all.

    Raises:
        ValueError: They are of different models, or there is none.
    """
    if not profiles:
        raise ValueError("no profile to merge")
    identity = profiles[0].identity
    for profile in profiles[1:]:
        profile.identity.refuse_other(identity, "a profile")
    keys, counts = (np.concatenate(parts) for parts in zip(*((p.keys, p.counts) for p in profiles), strict=True))
    return Profile(identity, *_summed(keys, counts), _sampled([profile.paths for profile in profiles], paths))


def _packed(identity: Identity, place: NDArray[Any], token: NDArray[Any], expert: NDArray[Any]) -> NDArray[np.int64]:
    for name, values, end in (("token", token, MOST_TOKENS), ("expert", expert, identity.experts)):
        if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= end):
            raise ValueError(f"{name} numbers must be whole, from 0 to {end - 1}, for {identity}")
    layer, ids = place.astype(np.int64) << (_EXPERT_BITS + _TOKEN_BITS), token.astype(np.int64) << _EXPERT_BITS
    return np.asarray(layer | ids | expert.astype(np.int64))


def _unpacked(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    rest = keys >> _EXPERT_BITS
    return rest >> _TOKEN_BITS, rest & (MOST_TOKENS - 1), keys & (MOST_EXPERTS - 1)


def _summed(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts


def _no_paths(identity: Identity) -> Paths:
    shape = (0, len(identity.layers), identity.top_k)
    return Paths(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(shape, np.int16))


def _sampled(parts: list[Paths], most: int) -> Paths:
    key = np.concatenate([part.key for part in parts])
    kept = np.argsort(key, kind="stable")[:most]
    token, experts = (np.concatenate([part[field] for part in parts]) for field in (1, 2))
    return Paths(key[kept], token[kept], experts[kept])
