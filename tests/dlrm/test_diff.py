"""What changes between plans, and the bytes that move, counted by hand."""

from dataclasses import replace

from forerun.dlrm.diff import difference
from forerun.dlrm.report import Report, Sharding


def report(*tables, rating=1.0):
    return Report(rating, None, 0.0, 0.0, "given", "torchrec", tables, ("hbm",), ((1000,),) * 4)


def sharded(name, parts, ranks, *, kernel="fused", kind="any"):
    """A byte for each element."""
    memory = tuple((rows * columns,) for _, _, rows, columns in parts)
    return Sharding(name, kind, kernel, tuple(ranks), tuple(parts), (1.0,) * len(ranks), memory)


WHOLE = [(0, 0, 8, 4)]
HALVES = [(0, 0, 4, 4), (4, 0, 4, 4)]
COLUMNS = [(0, 0, 8, 2), (0, 2, 8, 2)]


def test_nothing_moves_between_equal_plans():
    plan = report(sharded("a", HALVES, [0, 1]), sharded("b", WHOLE, [2]))
    same = difference(plan, plan)
    assert (same.changed, same.bytes_moved) == ((), 0)


def test_a_rank_keeps_the_rows_and_columns_that_it_holds():
    before = report(sharded("a", WHOLE, [0]))
    assert difference(before, report(sharded("a", WHOLE, [3]))).arriving == (0, 0, 0, 32)
    assert difference(before, report(sharded("a", HALVES, [0, 1]))).arriving == (0, 16, 0, 0)
    assert difference(before, report(sharded("a", WHOLE * 4, range(4)))).arriving == (0, 32, 32, 32)
    rows = report(sharded("a", HALVES, [0, 1]))
    assert difference(rows, report(sharded("a", COLUMNS, [0, 1]))).arriving == (8, 8, 0, 0)
    assert difference(rows, report(sharded("a", HALVES, [1, 0]))).arriving == (16, 16, 0, 0)
    assert difference(rows, report(sharded("a", COLUMNS, [0, 0]))).arriving == (16, 0, 0, 0)


def test_another_kernel_takes_all_and_tables_come_and_go():
    before = report(sharded("a", WHOLE, [0]), sharded("gone", WHOLE, [1]))
    after = report(sharded("a", WHOLE, [0], kernel="fused_uvm"), sharded("new", WHOLE, [1]), rating=2.0)
    changed = difference(before, after)
    assert changed.arriving == (32, 32, 0, 0)
    assert [(old and old.table, new and new.table) for old, new in changed.changed] == [
        ("a", "a"),
        ("gone", None),
        (None, "new"),
    ]
    assert changed.rating == (1.0, 2.0)


def test_ranks_that_were_not_there_take_what_they_get():
    fewer = replace(report(sharded("a", WHOLE, [0])), capacity=((1000,),))
    assert difference(fewer, report(sharded("a", HALVES, [0, 3]))).arriving == (0, 0, 0, 16)
