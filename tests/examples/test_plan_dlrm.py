"""`examples/plan_dlrm.py`: both planners' rows, and the picture."""

from __future__ import annotations

import pytest

pytest.importorskip("torchrec")

import plan_dlrm


def test_both_planners_are_rated_alike_and_drawn(tmp_path):
    stock, ours = plan_dlrm.compare(8)
    assert (stock.planner, ours.planner) == (plan_dlrm.STOCK, plan_dlrm.OURS)
    assert stock.rating == pytest.approx(4.1733, abs=1e-4)
    assert ours.bound <= ours.rating < stock.rating
    assert 0 <= ours.gap < stock.gap
    assert all(it.rating == pytest.approx(max(it.report.rank_cost)) for it in (stock, ours))
    plan_dlrm.draw([stock, ours], tmp_path / "loads.png")
    assert (tmp_path / "loads.png").read_bytes().startswith(b"\x89PNG")
