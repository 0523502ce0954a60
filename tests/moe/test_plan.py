"""Plans: made from a profile, kept in files, refused on other models and where they are damaged."""

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from tables import random_profile

from forerun.moe.dispatch import fan_out
from forerun.moe.files import _digest
from forerun.moe.plan import Plan
from forerun.moe.planning import make_plan
from forerun.moe.profile import Profile

ARRAYS = ("rank", "tokens", "share", "prior", "ratio", "weight")


@pytest.fixture(scope="module")
def profile():
    return random_profile(tokens=3000)[0]


@pytest.fixture(scope="module")
def plan(profile):
    return make_plan(profile, 4)


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    return tmp_path / "plan.safetensors"


def rewritten(path, change):
    """The file with its arrays and header changed, and a hash that fits them."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["forerun"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, arrays)
    text = json.dumps(header)
    save_file(arrays, path, {"forerun": text, "sha256": _digest(text, arrays)})


def test_every_layer_is_planned_and_reported(profile, plan):
    assert plan.rank.shape == (3, 8)
    assert [report.layer for report in plan.layers] == [0, 2, 5]
    for place, report in enumerate(plan.layers):
        assert report.exact
        assert report.contiguous <= report.local + 1e-9
        assert report.local > 0.4  # 1/4 by chance: these tokens have tastes
        assert report.tokens <= 1.1 * (1 + 1e-6)
        measured = fan_out(profile.paths.experts[:, place], plan.rank[place], 4).mean()
        assert report.fan_out == pytest.approx(measured)
        assert report.batch is not None
        assert abs(report.batch - report.local) < 0.08
        assert report.sent < report.contiguous_sent
        assert report.calibration < 0.1
    assert plan.layers[0].lookback == plan.layers[1].lookback == 0


def test_shares_are_those_of_the_counts(profile, plan):
    table = profile.table(1)
    often = int(table.counts.sum(1).argmax())
    counts = table.counts[often]
    by_hand = [counts[plan.rank[1] == rank].sum() / counts.sum() for rank in range(4)]
    assert plan.shares(1, table.tokens[[often]])[0] == pytest.approx(by_hand, abs=0.05)
    assert plan.shares(1, np.array([10**6])) == pytest.approx(plan.prior[1][None], abs=1e-6)


def test_order_is_rank_by_rank(plan):
    for rank, order in zip(plan.rank, plan.order, strict=True):
        assert rank[order].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert all(order[i] < order[i + 1] for i in (0, 2, 4, 6))


def test_layers_name_their_ranks_alike(profile):
    """Tokens with the same taste in all layers are at home on one rank in all."""
    keys, counts, size = profile.table(0).tokens, profile.table(0).counts, len(profile.identity.layers)
    tokens, experts = np.nonzero(counts)
    flat = [np.concatenate([part] * size) for part in (keys[tokens], counts[tokens, experts].astype(int))]
    turned = np.concatenate([(experts + 3 * place) % 8 for place in range(size)])
    layers = np.repeat(profile.identity.layers, len(tokens))
    plan = make_plan(Profile.from_counts(profile.identity, layers, flat[0], turned, flat[1]), 4)
    home = plan.share.astype(float).argmax(2)
    assert (home == home[0]).mean() > 0.95
    assert plan.layers[0].fan_out is None


def test_a_plan_without_paths_or_with_embeddings(profile):
    bare = dataclasses.replace(
        profile,
        paths=profile.paths._replace(
            key=profile.paths.key[:0], token=profile.paths.token[:0], experts=profile.paths.experts[:0]
        ),
    )
    assert make_plan(bare, 2).layers[0].batch is None
    embeddings = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    assert make_plan(profile, 2, embeddings=embeddings).tokens.tolist() == list(range(64))


def test_saved_is_loaded(plan, path):
    found = Plan.load(path)
    assert found.identity == plan.identity
    assert found.layers == plan.layers
    for name in ARRAYS:
        assert np.array_equal(getattr(found, name), getattr(plan, name))


def test_another_model_is_refused_with_both_names(plan):
    other = dataclasses.replace(plan.identity, model="somebody's")
    with pytest.raises(ValueError, match=r"the plan is of 'random' .* not of \"somebody's\""):
        plan.refuse_other(other, 4)
    with pytest.raises(ValueError, match="the plan is for 4 ranks, not for 2"):
        plan.refuse_other(plan.identity, 2)
    plan.refuse_other(plan.identity, 4)


def test_experts_that_do_not_divide_are_refused(profile):
    with pytest.raises(ValueError, match="8 experts do not divide by 3 ranks"):
        make_plan(profile, 3)


def _set(name, value):
    def change(header, arrays):
        arrays[name] = value(arrays[name])

    return change


def _poisoned(array):
    array.ravel()[0] = np.nan
    return array


DAMAGE = {
    "NaN": (_set("share", _poisoned), "share has a number that is negative or not finite"),
    "shape": (_set("share", lambda a: a[:, :-1].copy()), "share is float16"),
    "type": (_set("prior", lambda a: a.astype(np.float64)), "prior is float64"),
    "ranks": (_set("rank", lambda a: np.zeros_like(a)), "does not put 8 / 4 experts on each of 4 ranks"),
    "a rank too many": (_set("rank", lambda a: a + 1), "does not put 8 / 4 experts"),
    "tokens": (_set("tokens", lambda a: a[::-1].copy()), "tokens must rise"),
    "sums": (_set("prior", lambda a: a * 2), "prior has rows that do not sum to 1"),
    "missing": (lambda h, a: a.pop("ratio"), "ratio"),
    "too many": (lambda h, a: a.update(more=np.zeros(1)), "more"),
    "model": (lambda h, a: h["identity"].update(model="other"), "the hash of 'other'"),
    "no model": (lambda h, a: h.pop("identity"), "no model is named"),
    "layers": (lambda h, a: h["layers"].pop(), "reports are of layers [0, 2]"),
    "report": (lambda h, a: h["layers"][0].update(local="high"), "a layer's local is 'high'"),
    "kind": (lambda h, a: h.update(kind="profile"), "is a profile; expected a plan"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_says_so_even_with_a_fitting_hash(path, what):
    change, message = DAMAGE[what]
    rewritten(path, change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Plan.load(path)
    assert path.name in str(error.value)


def test_files_that_are_no_plan(tmp_path, profile):
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none")
    with pytest.raises(OSError, match="irectory"):
        Plan.load(tmp_path)
    for content in (b"", b"{}", b"not one", b"\xff" * 100):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="is not a plan written by forerun"):
            Plan.load(tmp_path / "other")
    profile.save(tmp_path / "profile")
    with pytest.raises(ValueError, match="is a profile; expected a plan"):
        Plan.load(tmp_path / "profile")


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4, 8]))
def test_any_number_of_ranks_that_divides(seed, ranks):
    profile, *_ = random_profile(seed=seed, tokens=200, vocabulary=20, layers=(1, 4))
    plan = make_plan(profile, ranks, effort=2)
    assert plan.ranks == ranks
    if ranks == 1:
        assert all(report.local == 1 and report.sent == 0 for report in plan.layers)
