"""When local experts are computed while rows travel: where waiting took long, and now and then measured anew."""

from forerun.moe.overlap import Pace


def test_overlap_waits_for_a_slow_link():
    pace = Pace()
    assert not pace.overlaps(100)  # nothing was measured
    pace.measured(100, waited=0.01, computed=1.0)
    assert not pace.overlaps(100)
    pace.measured(100, waited=1.0, computed=1.0)
    assert pace.overlaps(100)


def test_few_pairs_are_neither_overlapped_nor_measured():
    pace = Pace()
    pace.measured(100, waited=1.0, computed=1.0)
    pace.measured(1, waited=0.0, computed=1.0)
    assert pace.overlaps(100)
    assert not pace.overlaps(1)


def test_it_is_measured_anew():
    pace = Pace()
    pace.measured(100, waited=1.0, computed=1.0)
    decisions = [pace.overlaps(100) for _ in range(40)]
    assert decisions[0]
    assert not decisions[-1]
    pace.measured(100, waited=1.0, computed=1.0)
    assert pace.overlaps(100)
