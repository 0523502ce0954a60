"""What the benchmarks compute of their measurements."""

from __future__ import annotations

import pytest
import torch
from benchmarks.frechet import frechet_distance


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return torch.randn(200, 5, generator=generator, dtype=torch.float64) @ mixed


def test_a_set_is_no_distance_from_itself(features):
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_of_a_shifted_set_it_is_the_squared_shift(features):
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    assert frechet_distance(features + shift, features) == pytest.approx(float(shift.square().sum()))


def test_of_a_stretched_set_it_is_the_difference_of_the_roots(features):
    centred = features - features.mean(0)
    expected = float(torch.cov(centred.T).trace()) * (3 - 1) ** 2
    assert frechet_distance(3 * centred, centred) == pytest.approx(expected)


def test_directions_count_each_for_itself():
    """Variances 1 and 4 against 4 and 1: the roots differ by 1 in each direction."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * (3 / 4) ** 0.5
    scale = torch.tensor([1.0, 2.0])
    assert frechet_distance(signs * scale, signs * scale.flip(0)) == pytest.approx(2.0)


def test_fewer_samples_than_features_have_a_distance(features):
    assert frechet_distance(features[:3], features[:3]) == pytest.approx(0, abs=1e-5)
