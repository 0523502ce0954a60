"""Pieces follow each other, two on their way, on a slow link; on a fast one all goes at once."""

import time

import torch.distributed as dist

from forerun.moe.pieces import PIECE_BYTES, Pieces


def handed(pieces, rows, row_bytes, seconds=0.0):
    """What was begun and ended, in order."""
    events = []

    def begin(part):
        events.append(part)
        time.sleep(seconds)
        return lambda: events.append(part.stop)

    pieces.hand_over(rows, row_bytes, begin)
    return events


def test_two_are_on_their_way():
    events = handed(Pieces(slow=True), 7, PIECE_BYTES // 2)
    assert events == [slice(0, 2), slice(2, 4), 2, slice(4, 6), 4, slice(6, 7), 6, 7]


def test_a_row_larger_than_a_piece_goes_alone():
    assert handed(Pieces(slow=True), 2, 3 * PIECE_BYTES) == [slice(0, 1), slice(1, 2), 1, 2]
    assert handed(Pieces(slow=True), 0, PIECE_BYTES) == []


def test_until_the_link_is_known_and_on_a_fast_one_all_goes_at_once(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pieces = Pieces()
        for _ in range(20):
            assert handed(pieces, 5, PIECE_BYTES) == [slice(0, 5), 5]
        slow = Pieces()
        for _ in range(4):  # 1.25 MiB in 30 ms: 44 MB a second
            assert handed(slow, 5, PIECE_BYTES, 0.03) == [slice(0, 5), 5]
        assert slow.slow
        assert len(handed(slow, 5, PIECE_BYTES)) == 10
        for _ in range(20):  # it is looked at anew
            handed(slow, 5, PIECE_BYTES)
        assert not slow.slow
        for _ in range(9):
            handed(slow, 1, PIECE_BYTES, 0.03)  # what is small says nothing
        assert not slow.slow
    finally:
        dist.destroy_process_group()
