"""Which of the tiles of ``tiles.py`` a convolution takes, how it stores its results, and how long that takes.

Pure arithmetic; a compiled kernel takes all of it as arguments, but for the kind of store.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterator

from fxfuse.kernels.convolution.sets import may_be_wide, pair_of, set_cycles, set_tilings
from fxfuse.kernels.convolution.specialisation import (
    CONSUMERS,
    LINE,
    LINE_PITCH,
    MOST_RUNS,
    ROWS,
    Along,
    Shared,
    Specialisation,
    Unsupported,
)
from fxfuse.kernels.convolution.tiles import Extents, Tiling, any_run, joint_tilings, positions_over, tilings

#: clock of a multiprocessor, and what one of the 132 of an H100 stores per second; how much longer a sector takes
#: that is written in part: measured on an H100, rows of 95 floats against rows of 96
CLOCK, STORE_RATE, PARTIAL_SECTOR, PROCESSORS = 1.7e9, 2e10, 5.0, 132
#: bytes of a run of neighbours, and what stores of runs that are shorter by this part cost besides: of five layers
#: whose tiles were 8 positions wide and up to 16 deep
WHOLE_RUN, NARROW_RUN = 128, 0.3
#: clock cycles of a multiprocessor that an accumulator costs where it becomes a part of a pool, outside the matrix
#: units: read off chains on an H100
POOLED = 0.2
#: the same where it becomes a part of a row that is reduced along w: read off four chains in two dtypes
ALONG_CYCLES = {Along.SHARED: 0.35, Along.HELD: 0.08}
#: bytes that are whole where threads store them at once, and seconds of a multiprocessor that each of these takes where
#: it is less: a guess
AT_ONCE, STORED_APART = 32, 1e-9
#: bytes per second of float32 input that is made rows, and of those rows; and seconds that launches take, of what
#: prepares x, of what prepares the weights, and the rest: read off runs on an H100
ROWS_RATE, LAUNCHES_X, LAUNCHES_WEIGHTS, LAUNCHES = 2.6e12, 6e-6, 4e-6, 5e-6
#: bytes per second of 16-bit x that is looked at where it lies
LOOKING = 2.5e12
#: bytes of a run that are worth the way through shared memory
SHORT_RUN = 128


class Store(enum.Enum):
    """How results get to memory."""

    CHANNELS = "channels are neighbours: from registers"
    DIRECT = "w varies fastest: from registers"
    WIDE = "w varies fastest: of two positions at once, from registers"
    ROWS = "w varies fastest: rows, through shared memory"
    PLANES = "w varies fastest: runs of whole rows, through shared memory"
    JOINT = "w varies fastest: runs of whole rows of both warpgroups, through shared memory"
    SECTORS = "w varies fastest: whole sectors, through shared memory of a warp"
    STREAM = "w varies fastest: one run of whole rows, through shared memory of a warp"
    ONE = "one value of all channels: from registers"
    ALONG = "w varies fastest: rows that are reduced"


#: those that go through the outbox of ``conv_outbox.cuh``
RUNS = (Store.ROWS, Store.PLANES, Store.JOINT)


@functools.lru_cache(maxsize=4096)
def tile(made: Specialisation, extents: Extents, row: int = 0, itemsize: int = 4) -> Tiling:
    """The fastest tiling of ``extents`` positions q per dim, as far as waste and stores tell.

    ``row``: elements of ``itemsize`` bytes in a row (along w) of the stored tensor; 0 where channels are
    neighbours in memory.
    """
    if made.samples > 1:
        best = _fastest(made, set_tilings(made, extents), extents, row, itemsize)
        if best is None:
            raise Unsupported(f"no tile of {made.samples} samples fits into shared memory")
        return best[1]
    linear = row == 0 or made.one or any_run(made)
    best = _fastest(made, tilings(made, extents, linear=linear), extents, row, itemsize)
    if made.along:
        if best is None:
            raise Unsupported(f"no tile that fits into shared memory has whole rows of {extents[2]} positions")
        return best[1]
    # results take their time, too: no more rows may be wasted for the sake of longer runs
    most = math.inf if best is None else math.prod(best[1].counts)
    ways = joint_tilings(made, extents, 0 if linear else positions_over(made, itemsize))
    joint = _fastest(made, (t for t in ways if math.prod(t.counts) <= most), extents, row, itemsize)
    if best is None or (joint is not None and joint[0] < best[0]):
        best = joint
    if best is None:
        raise Unsupported(f"no tile of {extents} positions fits into shared memory")
    return best[1]


def _fastest(
    made: Specialisation, ways: Iterator[Tiling], extents: Extents, row: int, itemsize: int
) -> tuple[tuple[float, int, int], Tiling] | None:
    """That of ``ways``, of the fewest tiles first, with its score: of equal times the smaller region, of fewer planes.

    Rows of several positions hardly have a halo: there the fewest planes come first, whose rows are neighbours.

    Arguments as of :func:`tile`.
    """
    best: tuple[tuple[float, int, int], Tiling] | None = None
    whole = _stored(made, extents, itemsize) / STORE_RATE
    # of the products the least part that a tiling may have: the last of its tiles may hold few positions
    least = made.multiplied(extents[0], 1) / (1 if made.slabs == 1 else 2)
    for found in ways:
        multiply = multiply_seconds(made, found, extents)
        if best is not None and multiply + whole > best[0][0]:  # however it is stored
            if _multiply_all_seconds(made, found) * least + whole > best[0][0]:  # nor will those be that follow
                break
            continue
        if made.by_channel and row and not sectors_fit(made, found, row, itemsize):
            continue
        estimate = multiply + store_seconds(made, found, extents, row, itemsize)
        region, planes = math.prod(found.region), found.tile[0]
        score = (estimate, planes, region) if row and made.layer.beside else (estimate, region, planes)
        if best is None or score < best[0]:
            best = score, found
    return best


def multiply_seconds(made: Specialisation, tiling: Tiling, extents: Extents) -> float:
    """Of one multiprocessor, for one sample, or set, group and tile of output channels of ``extents`` positions."""
    if made.samples > 1:
        return set_cycles(made, tiling, extents) / CLOCK
    return _multiply_all_seconds(made, tiling) * made.multiplied(extents[0], tiling.tile[0])


def _multiply_all_seconds(made: Specialisation, tiling: Tiling) -> float:
    """The same with the products that are left out."""
    return math.prod(tiling.counts) * len(tiling.row_base) * made.pass_cycles / CLOCK


def row_runs(made: Specialisation, tiling: Tiling, row: int) -> tuple[int, int]:
    """How many runs of neighbours in memory a warpgroup's part of a tile has per channel, and the longest of them.

    ``row``: elements of a row (along w) of the stored tensor.
    """
    _, step_h, step_w = made.layer.stride
    depth, height, width = tiling.box
    if step_h == 1 and tiling.counts[2] == 1 and tiling.half[2] == 0 and width * step_w == row:
        return depth, made.m_tiles * ROWS * step_w if tiling.linear else height * width * step_w
    return depth * height, width * step_w


def positions_at_once(made: Specialisation, *, streams: bool = False) -> int:
    """Positions, a power of two, whose elements of a channel a warp has in shared memory at once.

    ``streams``: they are one run in memory, and lie in shared memory without room between them.
    """
    line = min(2 * LINE, made.m_tiles * ROWS * made.layer.stride[2]) if streams else LINE
    return 1 << (line // made.layer.stride[2]).bit_length() - 1


def sectors_fit(made: Specialisation, tiling: Tiling, row: int, itemsize: int) -> bool:
    """Whether results are stored by whole sectors, and shared memory has room for what a warp stores at once: runs lie
    there at places congruent to their addresses (``conv_lines.cuh``).

    Rows follow each other in memory, as many as a tile has; or each of them is made of whole sectors.
    """
    align = 32 // itemsize
    runs, longest = row_runs(made, tiling, row)
    merged = runs == tiling.box[0]
    if not merged and (tiling.linear or row % align or longest % align):
        return False
    if row < align or runs * (longest + 3 * align) > made.places:
        return False
    at_once = positions_at_once(made)
    _, height, width = tiling.region
    rows = at_once // 8 if tiling.row_group != 8 and not merged else -(-at_once // (width * (height if merged else 1)))
    room = LINE_PITCH * 4 // itemsize - 2 * align
    return at_once * made.layer.stride[2] + rows * (3 * align - 3) + 3 * align <= room


def store_of(made: Specialisation, tiling: Tiling, extents: Extents, row: int, itemsize: int) -> tuple[Store, int]:
    """How results are stored, and how many of them follow each other in memory. Arguments as of :func:`tile`."""
    if made.along:
        return Store.ALONG, row
    if made.one:
        return Store.ONE, 1
    if row == 0:
        return Store.CHANNELS, made.columns
    if made.by_channel:
        runs, longest = row_runs(made, tiling, row)
        return Store.STREAM if runs == 1 else Store.SECTORS, longest
    if made.samples > 1:  # neighbouring threads have other samples
        wide = may_be_wide(made) and tiling.box[2] % 2 == 0
        return (Store.WIDE, 2 * made.layer.stride[2]) if wide else (Store.DIRECT, pair_of(made))
    stride = (1, 1, 1) if made.pooled else made.layer.stride
    classes, plane = made.stored_classes, stride[1] * stride[2]
    depth, height, width = tiling.box
    align = 32 // itemsize
    whole = tiling.counts[2] == 1 and tiling.half[2] == 0
    pair = stride[2] == 1 or (stride[2] == 2 and classes % 2 == 0)
    along = width * stride[2] * (height if whole and plane == 1 else 1)
    direct = Store.DIRECT, along if pair else 1
    sectors = row * itemsize % 32 == 0 and direct[1] * itemsize % 32 == 0
    scarce = made.pooled and not made.merged  # registers are, and little is stored
    if scarce or sectors or made.pingpong:  # or it comes as it should go
        return direct
    room = made.pitch
    if classes % plane == 0 and whole:
        longest = made.m_tiles * 64 if tiling.linear else height * stride[1] * row
        kind, runs = Store.PLANES, depth * (classes // plane)
        if tiling.joint:
            kind, room = Store.JOINT, made.joint_pitch
    elif classes % stride[2] == 0 and not (tiling.linear or tiling.joint):
        longest = width * stride[2]
        kind, runs = Store.ROWS, depth * height * (classes // stride[2])
    else:
        return direct
    pitch = -(-(longest + tiling.over * stride[2] + align - 1) // align) * align
    if longest * itemsize < SHORT_RUN or runs > MOST_RUNS or runs * pitch + 2 * align > room:
        return direct
    return kind, longest


def store_seconds(made: Specialisation, tiling: Tiling, extents: Extents, row: int, itemsize: int) -> float:
    """Of one multiprocessor, for one sample, or set, group and tile of output channels."""
    if made.samples > 1:
        return made.samples * _set_store_seconds(made, tiling, extents, row, itemsize)
    sectors = 1 + PARTIAL_SECTOR * _partial(made, tiling, extents, row, itemsize)
    return _stored(made, extents, itemsize) / STORE_RATE * (sectors + _narrow(made, tiling, extents, row, itemsize))


def _set_store_seconds(made: Specialisation, tiling: Tiling, extents: Extents, row: int, itemsize: int) -> float:
    """Of a sample of a set. Neighbouring threads have other samples: each stores by itself what it has of a row."""
    stored = _stored(made, extents, itemsize)
    each = store_of(made, tiling, extents, row, itemsize)[1] * itemsize
    return stored / STORE_RATE + (stored / each * STORED_APART if each < AT_ONCE else 0)


def _stored(made: Specialisation, extents: Extents, itemsize: int) -> int:
    """Bytes of one sample, group and tile of output channels."""
    return math.prod(extents) * made.stored_columns * (1 if made.pooled else math.prod(made.layer.stride)) * itemsize


def _partial(made: Specialisation, tiling: Tiling, extents: Extents, row: int, itemsize: int) -> float:
    """Part of the 32-byte sectors of a stored run that it fills only in part."""
    kind, run = store_of(made, tiling, extents, row, itemsize)
    if kind is Store.JOINT and tiling.over:  # only where a plane begins and ends
        run = extents[1] * made.layer.stride[1] * row
    if kind in (Store.CHANNELS, Store.ONE, Store.ALONG) or (row * itemsize % 32 == 0 and run * itemsize % 32 == 0):
        return 0.0
    return min(1.0, 2 / (run * itemsize / 32 + 1))


def _narrow(made: Specialisation, tiling: Tiling, extents: Extents, row: int, itemsize: int) -> float:
    """What stores of a narrow tile cost beside its bytes, where nothing else asks for wide ones.

    A tile of rows of several positions has no halo along w: one that is narrow and deep would cost no more products.
    """
    if not (row and made.layer.beside):
        return 0.0
    kind, run = store_of(made, tiling, extents, row, itemsize)
    return NARROW_RUN * max(0.0, WHOLE_RUN / (run * itemsize) - 1) if kind is Store.DIRECT else 0.0


def seconds(
    made: Specialisation,
    batch: int,
    sizes: Extents,
    extents: Extents,
    row: int,
    itemsize: int,
    *,
    keeps: bool = True,
    epilogue: float = 0.0,
    shares: Shared = Shared.NOTHING,
    besides: float = 0.0,
    in_place: bool = False,
) -> float:
    """An estimate of the kernels' time on an H100. ``sizes`` of x, ``extents`` of the stored tensor, per dim.

    ``keeps``: results are stored. ``epilogue``: cycles of a multiprocessor per accumulator, for what else it does.
    ``shares``: what of x and the weights is prepared. ``besides``: cycles of a multiprocessor per tile. ``in_place``: x
    has 16-bit numbers, channels next to each other, and no rows are made of it.
    """
    stride = (1, 1, 1) if made.pooled else made.layer.stride
    d, h, w = (-(-e // s) for e, s in zip(extents, stride, strict=True))
    tiling = tile(made, (d, h, w), row, itemsize)
    passes = len(made.passes) if made.by_pass else 1
    parts = math.prod(tiling.counts) * passes
    tiles = -(-batch // made.samples) * made.layer.groups * made.column_tiles * parts
    waves = -(-tiles // (PROCESSORS * made.teams))
    accumulators = made.teams * made.rows * made.columns * sum(len(p.residues) for p in made.passes) / passes
    multiply = made.teams * multiply_seconds(made, tiling, (d, h, w)) / parts
    # what one warpgroup does with its accumulators is hidden by the other one's products, and no more than that
    one = max(multiply, multiply / CONSUMERS + accumulators * epilogue / CLOCK) + besides / CLOCK
    if keeps:
        one += made.teams * store_seconds(made, tiling, (d, h, w), row, itemsize) / parts
    total = waves * one + LAUNCHES
    if made.planar:
        return total
    if shares is not Shared.ALL:
        total += LAUNCHES_WEIGHTS
    layer = made.layer
    if shares is Shared.NOTHING and in_place and not made.pads:
        total += made.watched * batch * math.prod(sizes) * layer.in_channels * layer.groups * 2 / LOOKING
    elif shares is Shared.NOTHING:
        read = math.prod(sizes) * layer.channels * layer.joined * 4
        written = math.prod(layer.row_sizes(sizes)) * made.padded_channels * made.parts * 2
        total += batch * layer.groups * (read + written) / ROWS_RATE + LAUNCHES_X
    return total
