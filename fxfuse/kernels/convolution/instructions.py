"""How wide matrix instructions are, and how long they take. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

from fxfuse.kernels.convolution.geometry import Pass

#: rows of a matrix instruction
ROWS = 64
#: where float32's accuracy is wanted: 16-bit numbers for each of float32, and products of two such (not low times low)
PARTS, PRODUCTS = 2, 3
#: columns at most of instructions whose accumulators are kept beside sums (``cuh/conv_windows.cuh``); twice as many
#: where they are positions
WINDOW = 64


def window(columns: int) -> int:
    """Columns of the instructions, all of them as wide, that multiply so many where float32's accuracy is wanted."""
    return max(n for n in range(8, min(columns, WINDOW) + 1, 8) if columns % n == 0)


def held(channels: int, most: int) -> int:
    """Columns, at least ``channels`` and at most ``most``, whose windows take the least time: 88 are eleven of 8."""
    return min(
        range(-(-channels // 8) * 8, most + 1, 8), key=lambda n: (n // window(n) * _instruction(window(n), True), n)
    )


def cycles(passes: Iterable[Pass], columns: int, *, exact: bool = False) -> float:
    """Clock cycles of a multiprocessor for 64 positions and 16 numbers of each: of a class ``columns`` channels.

    ``exact``: float32's accuracy is wanted, from windows.
    """

    def step(columns: int) -> float:
        wide = window(columns) if exact else columns
        return columns / wide * _instruction(wide, exact)

    return sum(step(s.count * columns) for p in passes for s in p.steps)


def cycles_by_channel(passes: Iterable[Pass], columns: int, positions: int, *, exact: bool = False) -> float:
    """The same where the rows are channels, for 64 of an instruction's ``positions``."""
    each = _instruction(positions, exact) * ROWS / positions
    return sum(-(-s.count * columns // ROWS) * each for p in passes for s in p.steps)


def _instruction(columns: int, exact: bool) -> float:
    """Of one: with few columns, it waits for shared memory. Windows took 40 for 64 columns, 66 for 128 on an H100."""
    return max(columns * 0.515, 24 + columns / 4) if exact else max(columns / 2, 1.2 * (16 + columns / 4))
