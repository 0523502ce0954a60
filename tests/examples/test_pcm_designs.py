"""The designs of the arm's PCM: a curve goes on where it was killed, and a design measured again changes no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

_BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
_PAIRS = range(500_000_000, 500_000_001)


@pytest.fixture
def designs(monkeypatch):
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    import pcm_designs

    yield pcm_designs
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny(designs):
    """The first design, in two turns of one update."""
    first = designs.DESIGNS[0]
    return replace(first, training=replace(first.training, turns=2, samples=2, updates=1, measure_every=1, held_out=1))


def test_a_killed_design_goes_on_to_the_same_curve(designs, tiny, tmp_path):
    arms = designs.cases(15, after=2, episodes=1)
    *_, whole = designs.curve(tiny, arms, _PAIRS, tmp_path / "whole", episodes=2)
    begun = designs.curve(tiny, arms, _PAIRS, tmp_path / "killed", episodes=2)
    assert {point.turn for point in next(begun)} == {0, 1}
    begun.close()
    *_, resumed = designs.curve(tiny, arms, _PAIRS, tmp_path / "killed", episodes=2)
    assert [point._replace(seconds=0) for point in resumed] == [point._replace(seconds=0) for point in whole]
    by_turn = [point.turn for point in whole if (point.moments, point.rule) == ("any", designs.PAPER)]
    assert by_turn == [0, 0, 1, 1, 2, 2]  # under two switches
    assert [(point.moments, point.rule, point.turn) for point in whole if point.switch == "trained"][3:] == [
        ("any", "relative 1e-2", 2),
        ("any", "relative 1e-3", 2),
        ("first", designs.PAPER, 2),
    ]
    assert all(1 <= rounds <= 15 for point in whole for rounds in (point.plain, point.accelerated))


def test_a_design_measured_again_changes_no_other(designs, tmp_path):
    one, other = designs.DESIGNS[:2]
    before = [
        designs.Point(design.key, 15, "trained", "any", designs.PAPER, 3, 1.0, 7.0, 6.0) for design in (one, other)
    ]
    references = [
        designs.Reference(15, "any", designs.PAPER, way, rounds) for way, rounds in (("sequential", 15), ("plain", 9))
    ]
    results = designs.Results.before(tmp_path / "pcm-designs.json").with_references(references, {"command": "a"})
    for design, point in zip((one, other), before, strict=True):
        results = results.with_design(design, [point], {"command": "a"})
    (tmp_path / "pcm-designs.json").write_text(results.as_json({"command": "a"}))
    found = designs.Results.before(tmp_path / "pcm-designs.json")
    assert found == results
    again = [before[0]._replace(turn=turn, plain=6.0) for turn in (0, 5)]
    after = found.with_design(one, again, {"command": "b"})
    assert [point for point in after.points if point.design == one.key] == again
    assert [point for point in after.points if point.design == other.key] == before[1:]
    assert after.references == references
    assert {key: run["command"] for key, run in after.runs.items()} == {
        "references 15 any": "a",
        one.key: "b",
        other.key: "a",
    }
    assert after.trainings[one.key]["turns"] == 5
    best = {row["peer_name"]: row for row in designs.reached(after.points, after.references) if row["bound"]}
    assert {peer: (row["ours"], row["ratio"]) for peer, row in best.items()} == {
        "sequential": (6.0, 15 / 6),
        "plain": (6.0, 9 / 6),
    }


def test_designs_have_keys_of_their_own(designs):
    keys = [design.key for design in designs.DESIGNS]
    assert len(set(keys)) == len(keys)
    assert not any("," in key or " " in key for key in keys)
