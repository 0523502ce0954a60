"""Predictions: smoothing, back-off, calibration, look-back."""

import numpy as np
import pytest

from forerun.moe.lookback import dominant, fit_lookback, pairs_by_rank
from forerun.moe.predict import calibration, fit
from forerun.moe.profile import Table


def drawn(seed, tokens=400, experts=8, concentration=0.3):
    """Ids with shares of their own, and counts drawn from them: many for some, few for most."""
    random = np.random.default_rng(seed)
    true = random.dirichlet(np.full(experts, concentration), tokens)
    pairs = random.integers(1, 4, tokens) ** random.integers(1, 7, tokens)
    counts = np.stack([random.multinomial(n, p) for n, p in zip(pairs, true, strict=True)])
    return true, Table(np.arange(tokens) * 3, counts.astype(np.float32)), random


def test_shares_sum_to_one_and_seen_often_means_own_counts():
    _, table, _ = drawn(0)
    predictor = fit(table)
    often = int(table.counts.sum(1).argmax())
    share = predictor.shares(np.array([table.tokens[often], 1, 5000]))
    assert share.sum(1) == pytest.approx(1, abs=1e-5)
    assert share[0] == pytest.approx(table.counts[often] / table.counts[often].sum(), abs=0.02)
    assert share[1] == pytest.approx(predictor.prior, abs=1e-6)
    assert share[2] == pytest.approx(predictor.prior, abs=1e-6)


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_the_fitted_strength_predicts_new_occurrences_about_best(concentration):
    """Log-likelihood of fresh draws: no strength on a grid is much better."""
    true, table, _ = drawn(1, concentration=concentration)
    predictor = fit(table)

    def loss(strength):
        share = type(predictor)(table, predictor.prior, strength).smoothed(table.counts)
        return -(true * np.log(share)).sum(1).mean()

    best = min(loss(strength) for strength in np.geomspace(0.01, 1e4, 60))
    assert loss(predictor.strength) <= best + 0.02


def test_an_unseen_id_answers_as_its_neighbour():
    _, table, random = drawn(2)
    embeddings = random.normal(size=(1300, 16)).astype(np.float32)
    embeddings[1] = embeddings[30] * 2 + 1e-3
    predictor = fit(table)
    near, seen = predictor.shares(np.array([1, 30]), embeddings)
    assert near.tolist() == seen.tolist()


def test_predictions_that_come_true_are_calibrated():
    random = np.random.default_rng(0)
    predicted = random.random(20_000)
    came = random.binomial(8, predicted)
    honest = calibration(predicted, came, np.full(20_000, 8))
    assert honest.error < 0.01
    boastful = calibration(np.minimum(predicted + 0.2, 1), came, np.full(20_000, 8))
    assert boastful.error == pytest.approx(0.18, abs=0.02)
    assert honest.pairs.sum() == 160_000


def test_lookback_learns_a_way_through_the_layers():
    """The next rank is decided by the last two; the id says nothing."""
    random = np.random.default_rng(0)
    before, last = random.integers(0, 4, (2, 4000))
    truth = (before + 2 * last) % 4
    experts = (truth[:, None] * 2 + np.arange(2)).astype(np.int16)
    pairs = pairs_by_rank(experts, np.arange(8) // 2, 4)
    assert dominant(pairs).tolist() == truth.tolist()
    share = np.full((4000, 4), 0.25, np.float32)
    lookback = fit_lookback(share, before, last, pairs)
    assert lookback.adjusted(share, before, last).argmax(1).tolist() == truth.tolist()


def test_lookback_that_says_nothing_is_not_believed_much():
    random = np.random.default_rng(0)
    before, last = random.integers(0, 4, (2, 6000))
    share = random.dirichlet(np.full(4, 0.3), 6000).astype(np.float32)
    truth = np.array([random.choice(4, p=p / p.sum()) for p in share.astype(float)])
    pairs = np.eye(4, dtype=np.float32)[truth]
    adjusted = fit_lookback(share, before, last, pairs).adjusted(share, before, last)
    assert (adjusted.argmax(1) == share.argmax(1)).mean() > 0.95
