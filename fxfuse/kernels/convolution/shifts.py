"""Products of x with itself as matrix products: which shifts of x are rows, which are columns. Pure.

A sum over positions of ``x[p] * x[p + lag]`` is an element of the product of two matrices whose inner dim is the
positions. Rows are input channels of x at some distances, columns are input channels at shifts along w: a row at
distance l and a column at shift s have the lag ``l - s``, so that with several shifts there are fewer rows. A lane
walks along w: what rows need at one distance, it has read for the next one, a step before.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

Box = tuple[int, int, int]

#: columns of the first factor: input channels at shifts, and ones; rows of a matrix instruction, and positions
FACTORS, ROWS, SLOTS = 8, 16, 4
#: clock cycles of a multiprocessor that a matrix instruction takes; and that a warp's load takes, whose numbers become
#: float64: 16 of them per cycle
PRODUCT_CYCLES, LOAD_CYCLES = 4, 2
#: numbers of 32 bits that shared memory gives at a time; gaps between rows there that are tried
BANKS, GAPS = 32, 8


class Spread(NamedTuple):
    """Of x in shared memory: what lies between two rows; the distances of planes and of channels, modulo the banks."""

    gap: int
    plane: int
    channel: int


@dataclasses.dataclass(frozen=True)
class Shifts:
    """Rows and columns for some lags. Made by :meth:`of`.

    ``copies``: shifts along w of the first factor, 0, ``unit``, 2 ``unit`` and so on. ``rows``: distances of a
    channel's rows of the second factor. ``windows``: every row is multiplied at its distance, and at the next ones
    along w.
    """

    channels: int
    copies: int
    unit: int
    rows: tuple[Box, ...]
    windows: int

    @staticmethod
    def of(lags: Sequence[Box], channels: int) -> Shifts:
        """Those that take the least time."""
        return min(_choices(lags, channels), key=lambda f: (f.cycles, f.copies, f.windows))

    @property
    def more(self) -> int:
        """Steps of a walk beyond its positions."""
        return (self.copies - 1) * self.unit

    @property
    def tiles(self) -> int:
        """Matrix instructions' rows that are loaded in a step."""
        return -(-self.channels * len(self.rows) // ROWS)

    @property
    def results(self) -> int:
        """Matrix instructions of a step."""
        return self.tiles * self.windows

    @property
    def cycles(self) -> int:
        """Of a step of a warp: products or loads, whichever take longer."""
        return max(self.results * PRODUCT_CYCLES, (2 * self.tiles + 1) * LOAD_CYCLES)

    @property
    def reach(self) -> tuple[int, int]:
        """Along w: how far what is read reaches back, and how far ahead."""
        at = [w for _, _, w in self.rows]
        return self.more - min(at), max(at) + self.windows - 1

    def find(self, lag: Box) -> tuple[int, int, int]:
        """The row of a channel, the window and the shift that have this lag; they are there for every lag."""
        return next(
            (row, window, shift)
            for (row, (d, h, w)), window, shift in itertools.product(
                enumerate(self.rows), range(self.windows), range(self.copies)
            )
            if (d, h, w + window - shift * self.unit) == lag
        )

    def entry(self, lag: Box) -> int:
        """Where the product of a channel and itself lies among the results."""
        row, window, shift = self.find(lag)
        return (window * self.tiles * ROWS + row) * FACTORS + shift * self.channels

    # --- shared memory ----------------------------------------------------------------------------------
    def spread(self, width: int, *, thin: bool = False) -> Spread:
        """How x lies in shared memory, where rows are that wide, so that fewest lanes meet in a bank. ``thin``: there
        is one row of positions in a plane."""
        return _spread(self, width % BANKS, thin)

    def wavefronts(self, row: int, plane: int, channel: int, *, thin: bool = False) -> int:
        """Of a step's loads, by lanes at neighbouring rows of x, for these distances. ``channel`` -1: as if channels
        never met."""
        return sum(_fullest(load, row, plane, channel) for load in _loads(self, thin))


def _choices(lags: Sequence[Box], channels: int) -> Iterator[Shifts]:
    lines: dict[tuple[int, int], list[int]] = {}
    for d, h, w in sorted(lags):
        lines.setdefault((d, h), []).append(w)
    unit = math.gcd(*(w for _, _, w in lags)) or 1
    low, high = min(w for _, _, w in lags), max(w for _, _, w in lags)
    widest = max((at[-1] - at[0]) // unit + 1 for at in lines.values())
    for copies in range(1, max(min((FACTORS - 1) // channels, widest), 1) + 1):
        rows = ((d, h, w) for (d, h), at in lines.items() for w in _covering(at, copies, unit))
        yield Shifts(channels, copies, unit, tuple(rows), 1)
        windows = high - low + 2 - copies
        if unit == 1 and windows > 1:
            yield Shifts(channels, copies, 1, tuple((d, h, low + copies - 1) for d, h in lines), windows)


def _covering(at: Iterable[int], copies: int, unit: int) -> Iterator[int]:
    """Distances of rows that have all these lags of a line, in ascending order, at the shifts."""
    last, covered = max(at), None
    for w in at:
        if covered is None or w > covered:
            covered = min(w + (copies - 1) * unit, last)
            yield covered


#: channel, plane, row and position along w that lanes of a warp read
Load = frozenset[tuple[int, int, int, int]]


@functools.lru_cache(maxsize=256)
def _loads(made: Shifts, thin: bool) -> tuple[Load, ...]:
    rows = [(c, *at) for c in range(made.channels) for at in made.rows]
    columns = [(c, 0, 0, s * made.unit) for s in range(made.copies) for c in range(made.channels)]
    loads = (of[i : i + 32 // SLOTS] for of in (rows, columns) for i in range(0, len(of), 32 // SLOTS))
    step_d, step_h = (1, 0) if thin else (0, 1)
    return tuple(
        frozenset((c, d + slot * step_d, h + slot * step_h, w) for c, d, h, w in load for slot in range(SLOTS))
        for load in loads
    )


def _fullest(load: Load, row: int, plane: int, channel: int) -> int:
    """Elements in the fullest bank."""
    banks: dict[tuple[int, int], int] = {}
    for c, d, h, w in load:
        bank = (c if channel < 0 else 0), (max(channel, 0) * c + plane * d + row * h + w) % BANKS
        banks[bank] = banks.get(bank, 0) + 1
    return max(banks.values())


@functools.lru_cache(maxsize=1024)
def _spread(made: Shifts, width: int, thin: bool) -> Spread:
    def least(gap: int) -> tuple[int, Spread]:
        row = width + gap
        plane = min(range(BANKS), key=lambda p: made.wavefronts(row, p, -1, thin=thin))
        channel = min(range(BANKS), key=lambda c: made.wavefronts(row, plane, c, thin=thin))
        return made.wavefronts(row, plane, channel, thin=thin), Spread(gap, plane, channel)

    enough = len(_loads(made, thin)) + 1  # products take longer
    return min((max(found, enough), spread) for found, spread in map(least, range(GAPS)))[1]
