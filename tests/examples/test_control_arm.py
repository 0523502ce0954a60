"""The diffusion policy of the examples on its simulated arm: parallel sampling drives it as stock DDIM does."""

from __future__ import annotations

import control_arm
import pytest
import torch
from diffusion_policy import load
from train_arm import expert_success


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    return control_arm.measure(load(control_arm.ASSETS), steps=15, episodes=3)


def test_the_expert_reaches_its_targets():
    assert expert_success(10) == 1.0


def test_every_sampler_drives_the_same_episodes(rows):
    sequential, plain, accelerated = rows
    assert sequential.success >= 2 / 3
    for row in (plain, accelerated):
        assert row.success == sequential.success
        assert row.reward == pytest.approx(sequential.reward, abs=0.01)
        assert row.difference < 0.02  # rad/s, of some 7
    assert sequential.rounds == 15
    assert plain.rounds < 12
    assert accelerated.rounds < 8


def test_the_interval_of_a_share():
    low, high = control_arm.wilson(47, 50)
    assert (low, high) == (pytest.approx(0.838, abs=1e-3), pytest.approx(0.979, abs=1e-3))
