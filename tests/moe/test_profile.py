"""Profiles: what is counted, merged, kept, and refused."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_profile

from forerun.moe.identity import Identity
from forerun.moe.profile import Paths, Profile, Recorder, merge


def assert_same(one, other):
    assert one.identity == other.identity
    assert np.array_equal(one.keys, other.keys)
    assert np.array_equal(one.counts, other.counts)
    for field in Paths._fields:
        assert np.array_equal(getattr(one.paths, field), getattr(other.paths, field))


def counted(ids, chosen, layer, experts, vocabulary):
    table = np.zeros((vocabulary, experts))
    for place, token in enumerate(ids):
        for expert in chosen[layer, place]:
            table[token, expert] += 1
    return table


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 300), st.integers(1, 40))
def test_tables_are_what_a_loop_counts(seed, tokens, vocabulary):
    profile, ids, chosen = random_profile(seed=seed, tokens=tokens, vocabulary=vocabulary)
    for layer in range(3):
        table = profile.table(layer)
        expected = counted(ids, chosen, layer, 8, vocabulary)
        assert table.tokens.tolist() == sorted(set(ids.tolist()))
        assert np.array_equal(table.counts, expected[table.tokens])


def test_all_paths_are_kept_where_there_is_room():
    profile, ids, chosen = random_profile()
    paths = profile.paths
    kept = sorted((int(t), e.tolist()) for t, e in zip(paths.token, paths.experts, strict=True))
    assert kept == sorted((int(t), e.tolist()) for t, e in zip(ids, chosen.transpose(1, 0, 2), strict=True))


def test_a_sample_of_paths_is_uniform():
    identity = Identity("m", (0,), 2, 1)
    kept = np.zeros(40)
    for seed in range(400):
        recorder = Recorder(identity, paths=10, seed=seed)
        for start in (0, 20):
            recorder.add(np.arange(start, start + 20), np.zeros((1, 20, 1), int))
        kept[recorder.profile().paths.token] += 1
    assert kept.sum() == 4000
    assert abs(kept - 100).max() < 45  # 100 expected of each; deviation 8.7


def test_merged_is_as_if_recorded_together():
    parts = [random_profile(seed=seed)[0] for seed in range(3)]
    whole = merge(*parts)
    assert_same(whole, merge(merge(parts[2], parts[0]), parts[1]))
    assert whole.counts.sum() == sum(part.counts.sum() for part in parts)
    assert len(whole.paths.key) == 1800
    few = merge(*parts, paths=100)
    assert_same(few, merge(merge(parts[0], parts[1], paths=100), parts[2], paths=100))


def test_many_small_batches_are_one_large_one():
    identity = Identity("m", (1, 3), 4, 2)
    random = np.random.default_rng(0)
    ids = random.integers(0, 1000, 5000)
    chosen = random.permuted(np.tile(np.arange(4), (2, 5000, 1)), axis=2)[:, :, :2]
    one, many = Recorder(identity), Recorder(identity)
    one.add(ids, chosen)
    for part in np.array_split(np.arange(5000), 700):
        many.add(ids[part], chosen[:, part])
    assert np.array_equal(one.profile().keys, many.profile().keys)
    assert np.array_equal(one.profile().counts, many.profile().counts)


def test_saved_is_loaded(tmp_path):
    profile, *_ = random_profile()
    profile.save(tmp_path / "p")
    assert_same(Profile.load(tmp_path / "p"), profile)


@pytest.mark.parametrize(
    ("tokens", "experts", "message"),
    [
        ([1, 2], [[[0, 1]]], "tokens [2] with experts [1, 1, 2]"),
        ([1], [[[0, 8]]], "expert numbers must be whole, from 0 to 7"),
        ([1], [[[0, -1]]], "expert numbers must be whole"),
        ([-1], [[[0, 1]]], "token numbers must be whole"),
        ([1.5], [[[0, 1]]], "token numbers must be whole"),
        ([1 << 40], [[[0, 1]]], "token numbers must be whole"),
    ],
)
def test_batches_of_no_such_model_are_refused_whole(tokens, experts, message):
    recorder = Recorder(Identity("m", (0,), 8, 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        recorder.add(tokens, experts)
    assert len(recorder.profile().keys) == 0


def test_other_models_are_not_merged():
    one, *_ = random_profile()
    other = dataclasses.replace(one, identity=dataclasses.replace(one.identity, model="other"))
    with pytest.raises(ValueError, match=r"'other'.*'random'"):
        merge(one, other)
    with pytest.raises(ValueError, match="no profile"):
        merge()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("m", (), 8, 2), "layers are ()"),
        (("m", (3, 1), 8, 2), "rising"),
        (("m", (0,), 8, 9), "top 9 of 8"),
        (("m", (0,), 8.0, 2), "whole numbers"),
        ((7, (0,), 8, 2), "named by text"),
        (("m", (0,), 1 << 20, 2), "k <= E <="),
    ],
)
def test_models_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Identity(*fields)


def test_counts_of_other_layers_are_refused():
    with pytest.raises(ValueError, match=re.escape("layers [0, 4] are counted")):
        Profile.from_counts(Identity("m", (0, 3), 8, 2), [0, 4], [1, 1], [0, 0], [1, 1])


def test_a_recorder_with_an_end_forgets_the_rarest():
    """What is left is counted as it was, and paths are of tokens that are left."""
    identity = Identity("m", (0, 1), 8, 2)
    random = np.random.default_rng(0)
    tokens = np.minimum(random.geometric(0.02, 4000), 500)
    experts = np.stack([np.stack([tokens % 8, (tokens + 1 + place) % 8], 1) for place in range(2)])
    whole, bounded = Recorder(identity), Recorder(identity, triples=200)
    for recorder in (whole, bounded):
        recorder.add(tokens, experts)
    full, kept = whole.profile(), bounded.profile()
    assert len(full.keys) > 200 >= len(kept.keys) == 100
    where = np.searchsorted(full.keys, kept.keys)
    assert np.array_equal(full.keys[where], kept.keys)
    assert np.array_equal(full.counts[where], kept.counts)
    assert kept.counts.min() >= np.delete(full.counts, where).max()
    assert 0 < len(kept.paths.token) < 4000
