"""Tiles of outputs of few positions: samples lie side by side in the rows of a matrix instruction. Pure.

An instruction has 64 rows, eight neighbours each. Where positions alone are its rows, an output 4 wide leaves half of
them idle. Here a set of 8 to 64 samples lies in shared memory position by position: 64 rows are all samples of 64, 32,
... positions along one dim, wherever these are in the box, and none is one of the halo's. x as rows is what other
kernels have, too: only the order differs in which a copy brings them (``convolution_engine.py``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

from fxfuse.kernels.convolution.specialisation import CONSUMERS, ROWS, Specialisation
from fxfuse.kernels.convolution.tiles import MOST_COPIED, Extents, Tiling

#: samples of a set
SETS = (8, 16, 32, 64)
#: bytes that a multiprocessor copies into shared memory in a clock cycle, and cycles that each row takes there: guesses
COPIED, ROW_CYCLES = 18, 1.0
#: how fast few instructions of a step are: as of other kernels
SHORT = {1: 0.7, 2: 0.85}
#: part of the copies that slabs leave to be waited for: few of them are given back before the last product
WAITED = 0.7


def outer_inner(made: Specialisation, of: Extents) -> tuple[int, int]:
    """Of sizes along d, h and w those of the outer dim of a region's planes and of the inner one."""
    return (of[2], of[1]) if made.inner == 1 else (of[1], of[2])


def set_tilings(made: Specialisation, extents: Extents) -> Iterator[Tiling]:
    """Boxes whose tiles of rows, of a set of samples, are as many as a thread block has, and fit into shared memory."""
    room = made.region_bytes // made.row_bytes
    for tiling in _set_tilings(made.m_tiles, made.samples, made.inner, made.halo, extents):
        if tiling.rows_needed(made.halo) <= room:
            yield tiling


@functools.lru_cache(maxsize=1024)
def _set_tilings(m_tiles: int, samples: int, inner: int, halo: Extents, extents: Extents) -> tuple[Tiling, ...]:
    """All of them, of the fewest tiles first."""
    run, count = ROWS // samples, CONSUMERS * m_tiles  # positions of a tile of rows; those of a block
    found = []
    for deep in _divisors(count):
        for high in _divisors(count // deep):
            box = (deep, high * run, count // deep // high) if inner == 1 else (deep, high, count // deep // high * run)
            counts = tuple(-(-n // size) for n, size in zip(extents, box, strict=True))
            region = tuple(size + more for size, more in zip(box, halo, strict=True))
            if inner == 1:
                region = region[0], region[2], region[1]
            if max(region) > MOST_COPIED:
                continue
            # of the tiles of rows of a thread, neighbours are neighbours along w
            steps = (
                range(box[0]),
                range(0, box[1], run if inner == 1 else 1),
                range(0, box[2], 1 if inner == 1 else run),
            )
            places = ((z, x, y) if inner == 1 else (z, y, x) for z, y, x in itertools.product(*steps))
            base = tuple(((z * region[1] + o) * region[2] + i) * samples for z, o, i in places)
            found.append(Tiling(box, box, (0, 0, 0), region, 8, base, 0, counts, samples=samples))  # type: ignore[arg-type]
    return tuple(sorted(found, key=lambda t: (math.prod(t.counts), math.prod(t.region))))


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def copy_cycles(made: Specialisation, tiling: Tiling, extents: Extents) -> float:
    """Of one multiprocessor, for one set, group and tile of output channels: weights, and x where it is not padding.

    Outputs of few positions have few products for every weight: it may be the copies that take the time.
    """
    lows = made.lows[:1] if made.resident else made.lows
    rows = made.chunks * math.prod(tiling.region) * tiling.samples
    along = (extents, tiling.tile, tiling.counts, made.halo)
    there = sum(math.prod(_part_there(*of) for of in zip(*along, low, strict=True)) for low in lows)
    weights = made.weight_bytes * made.multiplied(extents[0], tiling.tile[0])
    copied = max((weights + rows * there * made.row_bytes) / COPIED, rows * len(lows) * ROW_CYCLES)
    return math.prod(tiling.counts) * copied


def _part_there(extent: int, tile: int, count: int, halo: int, low: int) -> float:
    """Of the positions of regions along a dim the part that x has, which is about as large as the output."""
    begins = range(low, low + count * tile, tile)
    there = sum(max(0, min(begin + tile + halo, extent) - max(begin, 0)) for begin in begins)
    return there / (count * (tile + halo))


def set_cycles(made: Specialisation, tiling: Tiling, extents: Extents) -> float:
    """Of one multiprocessor, for the same: products, and copies, which take turns where x has no second place."""
    multiplied = made.multiplied(extents[0], tiling.tile[0])
    multiply = math.prod(tiling.counts) * len(tiling.row_base) * made.pass_cycles * multiplied
    multiply /= SHORT.get(made.m_tiles * made.chunk // 16, 1.0)
    copies = copy_cycles(made, tiling, extents)
    return max(multiply, copies) if made.x_buffers > 1 else multiply + copies * (WAITED if made.by_slab else 1)


def pair_of(made: Specialisation) -> int:
    """Neighbours along w that are classes of a position, of one thread."""
    return 2 if made.layer.stride[2] == 2 and made.pair else 1


def may_be_wide(made: Specialisation) -> bool:
    """Whether a thread has neighbouring positions along w in neighbouring tiles of rows, and all between."""
    return made.samples > 1 and made.inner == 1 and made.m_tiles % 2 == 0 and pair_of(made) == made.layer.stride[2]
