"""Routing to test with: planted blocks, random profiles, and the real tables where they are."""

import os
from pathlib import Path

import numpy as np
import pytest

from forerun.moe.identity import Identity
from forerun.moe.profile import Profile, Recorder


def planted(spread, *, experts=64, ranks=8, top_k=8, tokens=512, seed=0):
    """`[tokens, experts]` counts where each token's experts are one hidden block but for a share `spread`.

    That share goes to all experts alike, so that no placement has more than `(1 - spread) + spread / ranks` local.
    """
    block = np.random.default_rng(seed).permutation(experts).reshape(ranks, -1)
    counts = np.full((tokens, experts), spread * 1000 / experts)
    for token in range(tokens):
        counts[token, block[token % ranks]] += (1 - spread) * 1000 / (experts // ranks)
    return (counts * top_k / 8).astype(np.float32)


def random_profile(*, layers=(0, 2, 5), experts=8, top_k=2, vocabulary=50, tokens=600, seed=0, paths=1 << 15):
    """A profile of tokens with tastes of their own, and what was recorded."""
    random = np.random.default_rng(seed)
    identity = Identity("random", layers, experts, top_k)
    taste = random.gumbel(size=(len(layers), vocabulary, experts)) * 3
    recorder = Recorder(identity, paths=paths, seed=seed)
    ids, chosen = [], []
    for part in np.array_split(random.integers(0, vocabulary, tokens), 5):
        noisy = taste[:, part] + random.gumbel(size=(len(layers), len(part), experts))
        ids.append(part)
        chosen.append(np.argsort(-noisy, axis=2)[:, :, :top_k])
        recorder.add(ids[-1], chosen[-1])
    return recorder.profile(), np.concatenate(ids), np.concatenate(chosen, axis=1)


_SHAPES = {"olmoe-1b-7b": (64, 8), "mixtral-8x7b": (8, 2)}


def real_profile(model, domain):
    """Counts of a real model on real text; skips where the folder is not given."""
    folder = os.environ.get("FORERUN_ROUTING_DATA")
    if not folder:
        pytest.skip("FORERUN_ROUTING_DATA does not name the folder of the real models' routing tables")
    with np.load(Path(folder) / f"{model}.{domain}.npz") as file:
        columns = [file[name] for name in ("layer", "token", "expert", "count")]
    experts, top_k = _SHAPES[model]
    return Profile.from_counts(Identity(model, (0, 7, 15), experts, top_k), *columns)
