"""The kernel of a layer as sizes want it: more rows per tile, more tiles, more room for what is stored. Pure."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

from fxfuse.kernels.convolution.sets import SETS, copy_cycles
from fxfuse.kernels.convolution.specialisation import (
    CONSUMERS,
    MOST_TILES,
    ROWS,
    Along,
    Shared,
    Specialisation,
    Unsupported,
)
from fxfuse.kernels.convolution.specialise import WORTH_COMPILING, kernels_of_sets, positions_of
from fxfuse.kernels.convolution.tiles import Extents, outbox_blocks
from fxfuse.kernels.convolution.tiling import (
    CLOCK,
    PROCESSORS,
    RUNS,
    multiply_seconds,
    seconds,
    store_of,
    store_seconds,
    tile,
)

#: accumulators of a thread up to which kernels may have twice the usual rows; and clock cycles that a tile costs
#: beside its products and stores: its place, its channels, waiting for one after the other
FEW_ACCUMULATORS, TILE_CYCLES = 64, 1000
#: how much faster kernels must be by estimate in which each warpgroup has tiles of its own; clock cycles in which a
#: warpgroup works off an accumulator, beside another one: about
WORTH_A_TILE_EACH, EPILOGUE_CYCLES = 1.05, 0.17
#: of weights: one is multiplied, one is there, one is on its way
LEAST_STAGES = 3
#: tiles from which on few of a GPU's multiprocessors are idle; the fewest channels that more tiles are made with, and
#: how much faster each halving must be by estimate
ENOUGH_TILES, LEAST_COLUMNS, WORTH_HALVING = PROCESSORS // 2, 16, 1.1
#: samples from which on sets of them are tried, and positions of an output up to which; how much faster they must be;
#: and of the ways to fill rows with samples those that are tried: so much of the best one's rows are used
LEAST_SAMPLES, FEW_POSITIONS, WORTH_SETS, WELL_FILLED = 8, 4096, 1.15, 0.85


def seconds_of(made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int, *, keeps: bool) -> float:
    """Of a kernel whose x and weights are prepared; infinite where it has no tiles.

    ``samples``, ``stored``, ``row``, ``itemsize``: of the stored tensor, as in
    :mod:`~fxfuse.kernels.convolution.tiling`; ``keeps``: it is stored.
    """
    with contextlib.suppress(Unsupported):
        return seconds(
            made, samples, stored, stored, row, itemsize, keeps=keeps, shares=Shared.ALL, besides=TILE_CYCLES
        )
    return math.inf


def with_more_rows(
    made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int, *, keeps: bool
) -> Specialisation:
    """The same with twice the rows per tile, where there are registers for their accumulators and it saves time.

    Arguments as of :func:`seconds_of`.
    """
    larger = dataclasses.replace(made, m_tiles=2 * made.m_tiles)
    if made.by_channel or made.along or (made.pooled and not made.merged) or larger.m_tiles != MOST_TILES // CONSUMERS:
        return made
    if math.prod(larger.accumulators) > FEW_ACCUMULATORS or 2 * larger.m_tiles * made.residues > 32:
        return made
    time = functools.partial(seconds_of, samples=samples, stored=stored, row=row, itemsize=itemsize, keeps=keeps)
    best = min((dataclasses.replace(larger, stages=stages) for stages in range(made.stages, 2, -1)), key=time)
    return best if time(best) * WORTH_COMPILING < time(made) else made


def with_more_room(made: Specialisation, stored: Extents, row: int, itemsize: int) -> Specialisation:
    """The same with a stage of weights less, where shared memory is scarce (x has one buffer) and what a pass stores
    does not fit into it otherwise. Arguments as of :func:`seconds_of`.
    """
    fewer = dataclasses.replace(made, stages=made.stages - 1)
    if made.x_buffers > 1 or made.by_channel or fewer.stages < LEAST_STAGES:
        return made
    positions = positions_of(made, stored)
    at, other = (tile(one, positions, row, itemsize) for one in (made, fewer))
    if at != other or store_of(made, at, positions, row, itemsize)[0] not in RUNS:
        return made
    blocks = outbox_blocks(made, at, itemsize)
    scarce = blocks < made.columns // made.lines and blocks < outbox_blocks(fewer, at, itemsize)
    return fewer if scarce else made


def with_more_tiles(
    made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int, *, keeps: bool, divisible: bool
) -> Specialisation:
    """The same with fewer rows per tile, then with fewer channels, where most of a GPU is idle and that saves time.

    ``divisible``: a tile need not hold all channels. The others as of :func:`seconds_of`.
    """
    if not 0 < _tiles(made, samples, stored, row, itemsize) < ENOUGH_TILES:
        return made
    time = functools.partial(seconds_of, samples=samples, stored=stored, row=row, itemsize=itemsize, keeps=keeps)
    best = made
    for half in (_half_the_rows, _half_the_columns) if divisible else (_half_the_rows,):
        while (other := half(best)) is not None and time(other) * WORTH_HALVING < time(best):
            best = other
    return best


def as_pingpong(
    made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int, *, keeps: bool
) -> Specialisation:
    """The same with tiles for each warpgroup, where that saves time: both would work off their accumulators at the same
    time else. Arguments as of :func:`seconds_of`.

    Not where results go through shared memory: tiles of half the size have shorter runs of neighbours. With one buffer
    of x, it is waited for.
    """
    if not may_pingpong(made):
        return made
    other = dataclasses.replace(made, pingpong=True, stages=1, x_buffers=2)
    time = functools.partial(_phases, samples=samples, stored=stored, row=row, itemsize=itemsize, keeps=keeps)
    return other if time(other) * WORTH_A_TILE_EACH < time(made) < math.inf else made


def may_pingpong(made: Specialisation) -> bool:
    """Whether there is a kernel like ``made`` with tiles for each warpgroup, if all weights fit into shared memory."""
    if made.exact or made.by_channel or made.planar or made.samples > 1 or made.along is Along.SHARED:
        return False
    # of several passes, weights of a chunk of channels do not follow those of another; a block has those of one tile
    return (made.resident or len(made.passes) == 1) and made.layer.groups * made.column_tiles <= PROCESSORS


def _phases(made: Specialisation, *, samples: int, stored: Extents, row: int, itemsize: int, keeps: bool) -> float:
    """Clock cycles of products and of what follows them; infinite where there are no tiles, or where results go through
    shared memory.
    """
    positions = positions_of(made, stored)
    try:
        tiling = tile(made, positions, row, itemsize)
    except Unsupported:
        return math.inf
    if store_of(made, tiling, positions, row, itemsize)[0] in RUNS:
        return math.inf
    counts = math.prod(tiling.counts)
    tiles = samples * made.layer.groups * made.column_tiles * counts
    accumulators = made.m_tiles * ROWS * made.columns * sum(len(p.residues) for p in made.passes)
    multiply = multiply_seconds(made, tiling, positions) / counts * CLOCK
    stores = store_seconds(made, tiling, positions, row, itemsize) / counts * CLOCK if keeps else 0.0
    follows = max(accumulators * EPILOGUE_CYCLES, stores)
    waves = -(-tiles // (PROCESSORS * made.teams))
    return waves * (max(2 * multiply, multiply + follows, 2 * stores) if made.pingpong else multiply + follows)


def _half_the_rows(made: Specialisation) -> Specialisation | None:
    if made.m_tiles % 2 or made.along is Along.HELD:
        return None
    return dataclasses.replace(made, m_tiles=made.m_tiles // 2)


def _half_the_columns(made: Specialisation) -> Specialisation | None:
    if made.by_channel or made.columns < 2 * LEAST_COLUMNS or made.columns % 16:
        return None
    return dataclasses.replace(made, columns=made.columns // 2)


def _tiles(made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int) -> int:
    """Thread blocks that have one; 0 where there are no tiles."""
    with contextlib.suppress(Unsupported):
        counts = tile(made, positions_of(made, stored), row, itemsize).counts
        return samples * made.layer.groups * made.column_tiles * math.prod(counts)
    return 0


def with_sets(
    made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int, *, keeps: bool, finite: bool
) -> Specialisation:
    """The kernel with sets of samples side by side (``sets.py``), where outputs of few positions leave rows unused and
    it saves time. ``finite``: x has no Inf nor NaN. The others as of :func:`seconds_of`.
    """
    d, h, w = positions_of(made, stored)
    if samples < LEAST_SAMPLES or d * h * w > FEW_POSITIONS or not may_have_sets(made):
        return made
    time = functools.partial(seconds_of, samples=samples, stored=stored, row=row, itemsize=itemsize, keeps=keeps)
    least = max(time(made), _copy_seconds(made, samples, stored, row, itemsize))
    ways = {(size, inner): _filled(size, (h, w)[inner - 1], samples) for size in SETS for inner in (1, 2)}
    well = [way for way, filled in ways.items() if filled >= WELL_FILLED * max(ways.values())]
    kernels = kernels_of_sets(made, finite)
    found = (dataclasses.replace(k, samples=size, inner=inner) for size, inner in well for k in kernels)
    best, seconds_of_best = min(((one, time(one)) for one in found), key=lambda f: f[1], default=(made, math.inf))
    return best if seconds_of_best * WORTH_SETS < least else made


def may_have_sets(made: Specialisation) -> bool:
    """Whether there are kernels like ``made`` with sets: those that store every class, from registers.

    Of a set neighbouring rows are samples, not neighbours in memory: results that go through shared memory (an
    outbox), statistics, and reductions find the sample of a tile, not of a row. Positions side by side fill rows too.
    """
    return not (made.by_channel or made.planar or made.pooled or made.one or made.merged or made.layer.beside)


def _filled(size: int, positions: int, samples: int) -> float:
    """Part of the rows that are used by sets of this ``size`` and of so many ``positions`` along the inner dim."""
    run = ROWS // size
    return positions / (-(-positions // run) * run) * samples / (-(-samples // size) * size)


def _copy_seconds(made: Specialisation, samples: int, stored: Extents, row: int, itemsize: int) -> float:
    """Of copies into shared memory alone; zero where there are no tiles."""
    positions = positions_of(made, stored)
    with contextlib.suppress(Unsupported):
        tiling = tile(made, positions, row, itemsize)
        counts = math.prod(tiling.counts)
        waves = -(-samples * made.layer.groups * made.column_tiles * counts // PROCESSORS)
        return waves * copy_cycles(made, tiling, positions) / counts / CLOCK
    return 0.0
