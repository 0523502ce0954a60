"""What the benchmarks compute of their measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "examples" / "benchmarks" / "results" / "pcm.json"


def _parts(results):
    cells = {f"quality {row['case']}-{row['steps']}" for row in results["quality"]}
    cells |= {f"rounds {row['case']}-{row['steps']}" for row in results["measured"]}
    return cells | ({"control"} if results["control"] else set())


def test_every_part_of_the_pcms_results_says_which_run_it_is_of():
    results = json.loads(_RESULTS.read_text())
    assert set(results["runs"]) == _parts(results)
    for run in results["runs"].values():
        assert run["command"] or "not recorded" in run["note"]


def test_a_part_measured_again_says_so_and_the_others_stay(tmp_path):
    before = json.loads(_RESULTS.read_text())
    (tmp_path / "pcm.json").write_text(_RESULTS.read_text())
    arguments = ["--parts", "quality", "--cases", "digits-50", "--samples", "8", "--sweeps", "3"]
    program = [sys.executable, _ROOT / "examples" / "benchmarks" / "pcm.py", *arguments, "--out", tmp_path]
    subprocess.run(program, check=True, timeout=240, capture_output=True)
    after = json.loads((tmp_path / "pcm.json").read_text())
    assert set(after["runs"]) == _parts(after) == set(before["runs"])
    changed = {part for part, run in after["runs"].items() if run != before["runs"][part]}
    assert changed == {"quality digits-50"}
    assert " ".join(arguments) in after["runs"]["quality digits-50"]["command"]
    assert after["measured"] == before["measured"]
    assert [row for row in after["quality"] if row["case"] == "arm"] == [
        row for row in before["quality"] if row["case"] == "arm"
    ]
