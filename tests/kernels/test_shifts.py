"""Rows and columns of the products of x with itself: every lag is there, little is idle, few lanes meet in a bank."""

from __future__ import annotations

import itertools
import random

import pytest

from fxfuse.kernels.convolution.shifts import BANKS, FACTORS, GAPS, ROWS, Box, Shifts

#: of taps that are neighbours; those of one plane; of taps two apart
NEIGHBOURS: list[Box] = [lag for lag in itertools.product((-1, 0, 1), repeat=3) if lag >= (0, 0, 0)]
FLAT: list[Box] = [(0, 0, w) for w in range(5)]
APART: list[Box] = [(0, h, w) for h in (0, 1) for w in (-4, -2, 0, 2, 4) if (h, w) >= (0, 0)]


@pytest.mark.parametrize(
    ("lags", "channels", "arranged"),
    [
        (NEIGHBOURS, 3, (2, 1, 5, 2, 2)),  # copies, unit, rows of a channel, windows, instructions
        (NEIGHBOURS, 2, (3, 1, 5, 1, 1)),
        (NEIGHBOURS, 4, (1, 1, 14, 1, 4)),
        (FLAT, 1, (1, 1, 5, 1, 1)),
        (APART, 2, (1, 2, 8, 1, 1)),
        ([(0, 0, 0)], 7, (1, 1, 1, 1, 1)),
    ],
)
def test_arrangements(lags: list[Box], channels: int, arranged: tuple[int, ...]) -> None:
    made = Shifts.of(lags, channels)
    assert (made.copies, made.unit, len(made.rows), made.windows, made.results) == arranged


@pytest.mark.parametrize("seed", range(40))
def test_every_lag_is_there(seed: int) -> None:
    """At a place of its own, within what is read."""
    pick = random.Random(seed)
    unit, channels = pick.choice((1, 1, 2, 3)), pick.randint(1, 7)
    lags = {(pick.randint(0, 2), pick.randint(-2, 2), unit * pick.randint(-3, 3)) for _ in range(pick.randint(1, 20))}
    lags = {max(lag, (-lag[0], -lag[1], -lag[2])) for lag in lags} | {(0, 0, 0)}
    made = Shifts.of(sorted(lags), channels)
    back, ahead = made.reach
    assert channels * made.copies < FACTORS  # the last columns are of ones
    for lag in lags:
        row, window, shift = made.find(lag)
        d, h, w = made.rows[row]
        assert (d, h, w + window - shift * made.unit) == lag
        assert -back <= w + window - made.more and w + window <= ahead
        # results are [window][rows][columns], with the channels of a shift beside each other
        tile, rest = divmod(made.entry(lag), made.tiles * ROWS * FACTORS)
        assert (tile, divmod(rest, FACTORS)) == (window, (row, shift * channels))
    entries = {
        made.entry(lag) + second * len(made.rows) * FACTORS + first
        for lag in lags
        for first, second in itertools.product(range(channels), repeat=2)
    }
    assert len(entries) == len(lags) * channels**2 and max(entries) < made.results * ROWS * FACTORS


@pytest.mark.parametrize("width", range(1, 49))
def test_few_lanes_meet_in_a_bank(width: int) -> None:
    """Of the benchmark's loads: the matrix instructions of a step take longer than these."""
    made = Shifts.of(NEIGHBOURS, 3)
    for thin in (False, True):
        spread = made.spread(width, thin=thin)
        assert 0 <= spread.gap < GAPS and 0 <= spread.plane < BANKS and 0 <= spread.channel < BANKS
        # loads of three times 32 numbers
        found = made.wavefronts(width + spread.gap, spread.plane, spread.channel, thin=thin)
        assert 3 <= found <= (6 if thin else 4) < made.cycles == 8
    assert made.wavefronts(32, 0, 0) > 16  # all that is at one place in a row
