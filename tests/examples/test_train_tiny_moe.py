"""`examples/train_tiny_moe.py`: what it trained is small, speaks Python, and routes by habits of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5")

import torch
import train_tiny_moe
from transformers import AutoModelForCausalLM, AutoTokenizer

from forerun.moe.planning import make_plan
from forerun.moe.transformers import identify, profile_model


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(train_tiny_moe.ASSETS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out():
    _, kept = train_tiny_moe.sources()
    words = AutoTokenizer.from_pretrained(train_tiny_moe.ASSETS)
    return train_tiny_moe.as_stream(kept, words)[: 256 * 40]


def test_the_folder_is_small():
    files = [file for file in Path(train_tiny_moe.ASSETS).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    told = json.loads((train_tiny_moe.ASSETS / "training.json").read_text())
    assert told["parameters"] == 1_321_088


def test_it_predicts_modules_that_it_was_not_trained_on(model, held_out):
    told = train_tiny_moe.held_out(model, held_out, 256)
    assert told["held_out_loss"] < 4.2  # ln(2048) = 7.62 knows nothing
    assert max(told["expert_load"]) < 4  # no expert has all of a layer's tokens


def test_its_routing_can_be_predicted_from_ids(model, held_out):
    """Of a shuffled token's experts, predicted from other occurrences, far more than a quarter are on its rank."""
    assert identify(model).experts == 16
    plan = make_plan(profile_model(model, held_out.view(-1, 256)), 4, effort=4)
    assert len(plan.layers) == 4
    for report in plan.layers:
        assert report.batch is not None
        assert report.batch > 0.36
        assert report.sent < 0.75 * report.contiguous_sent


def test_a_step_of_training_writes_a_model(tmp_path):
    told = train_tiny_moe.train(steps=1, batch=1, length=16, vocabulary=300, out=tmp_path)
    assert told["held_out_loss"] == pytest.approx(5.7, abs=0.5)  # ln(300)
    assert identify(AutoModelForCausalLM.from_pretrained(tmp_path)).layers == (0, 1, 2, 3)
