"""The choice between two sums and spreading: by what both take, and by the rows that really leave."""

import pytest

from forerun.moe.choice import Choice, Rates

# Two sums of a token take 2 us; both halves 1 us, and a row 1 us: spreading gains below half a row a token.
RATES = Rates(summed=(10e-6, 2e-6), spread=(50e-6, 1e-6, 1e-6))


@pytest.mark.parametrize(
    ("tokens", "rows", "gains"),
    [(8, 0, False), (39, 0, False), (41, 0, True), (1000, 490, True), (1000, 1100, False), (1000, 500, True)],
)
def test_the_way_that_takes_less_is_chosen(tokens, rows, gains):
    assert RATES.gains(tokens, rows) is gains


def test_without_rates_ours_is_always_taken():
    choice = Choice(None, expected=9.0)
    assert choice.spreads(1)
    assert not choice.learns


def test_small_batches_take_stocks_way_and_large_ones_ours():
    choice = Choice(RATES, expected=0.2)
    assert [choice.spreads(tokens) for tokens in (1, 8, 4096, 2)] == [False, False, True, False]


def test_what_leaves_is_learned():
    choice = Choice(RATES, expected=0.1)
    assert choice.spreads(4096)
    for _ in range(20):
        choice.saw(1.5, 4096)
    assert choice.expected == pytest.approx(1.5, abs=0.01)
    assert not choice.spreads(4096)


def test_a_way_that_was_left_is_tried_again():
    choice = Choice(RATES, expected=1.5)
    tried = [choice.spreads(4096) for _ in range(600)]
    assert 1 <= sum(tried) <= 3
    choice = Choice(RATES, expected=1.5)
    assert not any(choice.spreads(8) for _ in range(2000))  # a batch too small gains nothing, whatever leaves
