"""The diffusion policy of the examples on its simulated arm: parallel sampling drives it as stock DDIM does."""

from __future__ import annotations

from dataclasses import replace

import control_arm
import pytest
import torch
from diffusion_policy import load
from train_arm import expert_success
from train_arm_pcm import TRAININGS, observations, source

from forerun.picard.training import train


@pytest.fixture(scope="module")
def policy():
    return load(control_arm.ASSETS)


@pytest.fixture(scope="module")
def rows(policy):
    torch.manual_seed(0)
    return {row.sampler: row for row in control_arm.measure(policy, steps=15, episodes=3)}


def test_the_expert_reaches_its_targets():
    assert expert_success(10) == 1.0


def test_every_exact_sampler_drives_the_same_episodes(rows):
    sequential = rows["diffusers DDIM, sequential"]
    assert sequential.success >= 2 / 3
    exact = [row for name, row in rows.items() if not name.startswith("approximate")]
    assert len(exact) == 6
    for row in exact:
        assert row.success == sequential.success
        assert row.reward == pytest.approx(sequential.reward, abs=0.01)
        assert row.difference < 0.02  # rad/s, of some 7


def test_parallel_sampling_saves_rounds(rows):
    assert rows["diffusers DDIM, sequential"].rounds == 15
    assert rows["plain + PCM"].rounds < rows["plain Picard iteration"].rounds < 12
    assert rows["forerun's default"].rounds < 8
    assert rows["default + PCM"].rounds < 8
    assert rows["default, data_variance fitted"].rounds < rows["forerun's default"].rounds


def test_approximate_samplers_end_after_two_rounds(rows):
    approximate = [row for name, row in rows.items() if name.startswith("approximate")]
    assert [row.rounds for row in approximate] == [2] * 5
    off = {name.removeprefix("approximate: "): row.difference for name, row in rows.items() if row in approximate}
    assert off["plain + PCM"] < off["plain, slope only"] < off["plain"]


@pytest.mark.parametrize("steps", control_arm.PCMS)
def test_a_pcm_of_the_policy_is_there_for_its_steps(policy, steps):
    pcm = control_arm.trained_pcm(policy, steps)
    assert pcm is not None
    assert pcm.card.steps == steps
    assert "/" not in pcm.card.base.name  # no path of the machine that trained it


def test_another_policy_has_no_pcm(policy):
    other = load(control_arm.ASSETS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert control_arm.trained_pcm(other, 15) is None
    assert not any("PCM" in name for name in control_arm.ways(None))


def test_a_seed_has_its_own_observation(policy):
    chosen = observations(policy, episodes=2)
    both = chosen([3, 1_000_000_000])["condition"]
    assert both.shape == (2, len(policy.observations.low))
    assert torch.equal(both[1:], chosen([1_000_000_000])["condition"])


def test_a_pcm_is_trained_for_the_arm(policy, tmp_path, monkeypatch):
    training = replace(TRAININGS[15], turns=1, samples=2, updates=1, held_out=2)
    train(source(policy, episodes=2), tmp_path, training)
    monkeypatch.setitem(control_arm.PCMS, 15, tmp_path)
    made = control_arm.trained_pcm(policy, 15)
    assert made is not None
    assert made.card.training["history"][-1]["rounds_without"] <= 15


def test_the_interval_of_a_share():
    low, high = control_arm.wilson(47, 50)
    assert (low, high) == (pytest.approx(0.838, abs=1e-3), pytest.approx(0.979, abs=1e-3))
