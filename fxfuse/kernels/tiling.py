"""Tiles of a convolution's output: which positions a thread block takes, how it stores them, and how long that takes.

An output is tiled in positions q, of which every residue class has an element. Pure arithmetic; a compiled kernel
takes all of it as arguments, but for the kind of store.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fxfuse.kernels.convolution import (
    CONSUMERS,
    GATHERED,
    LINE,
    LINE_PITCH,
    MOST_BLOCKS,
    MOST_RUNS,
    ROWS,
    Shared,
    Specialisation,
    Unsupported,
)

#: clock of a multiprocessor, and what one of the 132 of an H100 stores per second; how much longer a sector takes
#: that is written in part: measured on an H100, rows of 95 floats against rows of 96
CLOCK, STORE_RATE, PARTIAL_SECTOR, PROCESSORS = 1.7e9, 2e10, 5.0, 132
#: clock cycles of a multiprocessor that an accumulator costs where it becomes a part of a pool, outside the matrix
#: units: read off chains on an H100
POOLED = 0.2
#: bytes per second of float32 input that is made rows, and of those rows; and seconds that launches take, of what
#: prepares x, of what prepares the weights, and the rest: read off runs on an H100
ROWS_RATE, LAUNCHES_X, LAUNCHES_WEIGHTS, LAUNCHES = 2.6e12, 6e-6, 4e-6, 5e-6
#: bytes of a run that are worth the way through shared memory
SHORT_RUN = 128
#: positions of x per dim that one copy brings
MOST_COPIED = 256
#: rows of shared memory after which the order of their units repeats: copies begin there
SWIZZLED = 8

Extents = tuple[int, int, int]


class Store(enum.Enum):
    """How results get to memory."""

    CHANNELS = "channels are neighbours: from registers"
    DIRECT = "w varies fastest: from registers"
    ROWS = "w varies fastest: rows, through shared memory"
    PLANES = "w varies fastest: runs of whole rows, through shared memory"
    JOINT = "w varies fastest: runs of whole rows of both warpgroups, through shared memory"
    SECTORS = "w varies fastest: whole sectors, through shared memory of a warp"
    STREAM = "w varies fastest: one run of whole rows, through shared memory of a warp"
    ONE = "one value of all channels: from registers"


#: those that go through the outbox of ``conv_outbox.cuh``
RUNS = (Store.ROWS, Store.PLANES, Store.JOINT)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Positions q of a thread block: a ``tile``, of two ``box``es, one per warpgroup; with halo: ``region``.

    ``joint``: the tile is one box, whose rows in the region both warpgroups share: half of them each. It may have
    positions ``over``, of the row behind it, that the next tile has, too: who begins a sector of memory stores it.
    ``row_base``: first row of each m64 tile in the region; ``row_group``: rows from one group of eight to the
    next. ``linear``: a tile is ``tile[1]`` consecutive rows of a plane of the region, which is as wide as the
    output and its halo, from anywhere; ``box`` and ``region`` hold the rows along h that it may touch.
    ``half``: from the first box to the second, in positions; ``part_rows``: in rows, where places of the
    second are counted from its own begin.
    """

    tile: Extents
    box: Extents
    half: Extents
    region: Extents
    row_group: int
    row_base: tuple[int, ...]
    part_rows: int
    counts: Extents
    linear: bool = False
    over: int = 0

    def rows_needed(self, halo: Extents) -> int:
        """Rows of shared memory that the matrix instructions read, the last tap's included."""
        _, height, width = self.region
        shift = (halo[0] * height + halo[1]) * width + halo[2]
        skip = width - 1 if self.linear else 0
        return max(math.prod(self.region), skip + max(self.row_base) + 7 * self.row_group + 8 + shift)

    @property
    def uniform(self) -> bool:
        """Whether all groups of eight rows of a warpgroup are equally far apart."""
        each = len(self.row_base) // CONSUMERS
        return all(b - a == 8 * self.row_group for a, b in itertools.pairwise(self.row_base[:each]))

    @property
    def joint(self) -> bool:
        return not self.linear and not any(self.half)

    def fit(self, extents: Extents) -> float:
        """Part of the rows that are positions of ``extents``."""
        return math.prod(extents) / (math.prod(self.counts) * len(self.row_base) * 64)


def region_stride(made: Specialisation, tiling: Tiling) -> int:
    """Bytes of shared memory from one buffer of x to the next."""
    return -(-tiling.rows_needed(made.halo) * made.chunk * 2 // 1024) * 1024


def outbox_blocks(made: Specialisation, tiling: Tiling, itemsize: int) -> int:
    """Blocks of results on their way that a multiplying warpgroup has, of numbers of ``itemsize`` bytes.

    They have all shared memory that is left: results come in bursts, behind the products of a pass.
    """
    given = made.region_bytes - region_stride(made, tiling)
    free = made.staging_bytes + made.x_buffers * given - CONSUMERS * GATHERED * 4
    return min(MOST_BLOCKS, free // CONSUMERS // (made.lines * made.pitch * itemsize))


def tilings(made: Specialisation, extents: Extents, *, linear: bool) -> Iterator[Tiling]:
    """Those whose region fits into shared memory, of the fewest tiles first. ``linear``: such tiles as well."""
    room, by_channel = _room(made), made.by_channel
    ways = _ways(made.m_tiles, made.halo, extents, linear)
    return (way.tiling() for way in ways if way.rows <= room and (way.uniform or not by_channel))


def joint_tilings(made: Specialisation, extents: Extents, over: int) -> Iterator[Tiling]:
    """Joint ones, with so many positions ``over`` and without, in the same order."""
    room = _room(made)
    ways = _joint_ways(made.m_tiles, made.halo, extents, over) if over else ()
    return (way.tiling() for way in ways if way.rows <= room)


def _room(made: Specialisation) -> int:
    """Rows of shared memory for one buffer of x."""
    return made.region_bytes // (made.chunk * 2)


class _Way(NamedTuple):
    """A tiling that need not have been made yet. ``rows``: of shared memory, that it needs; ``tiles``: of it."""

    tiles: int
    rows: int
    uniform: bool
    tiling: Callable[[], Tiling]


# a layer is looked at in many ways, in stages, buffers and chunks, which have their tiles in common: so have layers
@functools.lru_cache(maxsize=64)
def _ways(m_tiles: int, halo: Extents, extents: Extents, linear: bool) -> tuple[_Way, ...]:
    """Tilings, those of the fewest tiles first."""
    found = [*_boxes(m_tiles, halo, extents)]
    for made in _linear(m_tiles, halo, extents) if linear else ():
        if max(made.region) <= MOST_COPIED:
            tiles = math.prod(made.counts)
            found.append(_Way(tiles, made.rows_needed(halo), made.uniform, functools.partial(_itself, made)))
    return tuple(sorted(found, key=operator.attrgetter("tiles")))


def _itself(made: Tiling) -> Tiling:
    return made


def _boxes(m_tiles: int, halo: Extents, extents: Extents) -> Iterator[_Way]:
    """Boxes of blocks of 8 by 8 positions, and boxes of consecutive rows; two of them along any dim."""
    for box, blocks in _box_sizes(m_tiles, extents, halo):
        d, h, w = box
        for axis in range(3):
            size, region = _with_halo(box, axis, halo)
            _, rh, rw = region
            # consecutive rows of the region: as many as the box spans in it
            if max(region) > MOST_COPIED or (not blocks and (d - 1) * rh * rw + (h - 1) * rw + w > m_tiles * 64):
                continue
            make = functools.partial(_box, m_tiles, halo, extents, box, axis, blocks)
            uniform, last = True, (m_tiles - 1) * 64 + (d * rh * rw, h * rw, w)[axis]
            if blocks:
                made = make()
                uniform, last = made.uniform, max(made.row_base)
            shift = (halo[0] * rh + halo[1]) * rw + halo[2]
            rows = max(math.prod(region), last + 7 * (rw if blocks else 8) + 8 + shift)
            yield _Way(math.prod(_counts(extents, size)), rows, uniform, make)


def _with_halo(box: Extents, axis: int, halo: Extents) -> tuple[Extents, Extents]:
    """The size of two boxes along ``axis``, and that of the region that they read."""
    size = [*box]
    size[axis] *= CONSUMERS
    d, h, w = size
    return (d, h, w), (d + halo[0], h + halo[1], w + halo[2])


def _counts(extents: Extents, size: Extents) -> Extents:
    (a, b, c), (d, h, w) = extents, size
    return -(-a // d), -(-b // h), -(-c // w)


@functools.lru_cache(maxsize=4096)
def _box(m_tiles: int, halo: Extents, extents: Extents, box: Extents, axis: int, blocks: bool) -> Tiling:
    d, h, w = box
    size, region = _with_halo(box, axis, halo)
    _, rh, rw = region
    step = (d * rh * rw, h * rw, w)[axis]
    if blocks:
        inside = itertools.product(range(d), range(0, h, 8), range(0, w, 8))
        base = [(z * rh + y) * rw + x for z, y, x in inside]
    else:
        base = [*range(0, m_tiles * 64, 64)]
    rows = tuple(part * step + at for part in range(CONSUMERS) for at in base)
    half = (d if axis == 0 else 0, h if axis == 1 else 0, w if axis == 2 else 0)
    return Tiling(size, box, half, region, rw if blocks else 8, rows, step, _counts(extents, size))


def _box_sizes(m_tiles: int, extents: Extents, halo: Extents) -> Iterator[tuple[Extents, bool]]:
    """(box, whether it is made of blocks of 8 by 8) for the rows of one warpgroup."""
    for a in (1, 2, 4):
        for b in (1, 2, 4):
            if a * b <= m_tiles:
                yield (m_tiles // (a * b), a * 8, b * 8), True
    rows = m_tiles * 64
    for parts in range(1, 17):
        yield from ((box, False) for box in _row_sizes(rows, -(-extents[2] // parts), extents, halo))


def _row_sizes(rows: int, w: int, extents: Extents, halo: Extents, over: int = 0) -> Iterator[Extents]:
    """Boxes of ``w`` positions along w that span no more than ``rows`` rows of their region, with those ``over``."""
    rw, last, more = w + halo[2], over or w, 1 if over else 0
    if w > rows or rw > MOST_COPIED:
        return
    for h in range(1, min((rows - last) // rw + 1 - more, extents[1]) + 1):
        deepest = (rows - (h + more - 1) * rw - last) // ((h + more + halo[1]) * rw) + 1
        yield min(max(deepest, 1), extents[0]), h, w


@functools.lru_cache(maxsize=64)
def _joint_ways(m_tiles: int, halo: Extents, extents: Extents, over: int) -> tuple[_Way, ...]:
    """The same of joint tilings."""
    found = itertools.chain.from_iterable(_joint(m_tiles, halo, extents, more) for more in (0, over))
    return tuple(sorted(found, key=operator.attrgetter("tiles")))


def _joint(m_tiles: int, halo: Extents, extents: Extents, over: int) -> Iterator[_Way]:
    """Boxes of whole rows, whose rows in the region both warpgroups share."""
    rows = CONSUMERS * m_tiles * ROWS
    for box in _row_sizes(rows, extents[2], extents, halo, over):
        d, h, w = (size + more for size, more in zip(box, halo, strict=True))
        h += over > 0
        counts, region = _counts(extents, box), (d, h, w)
        if max(region) <= MOST_COPIED and over < box[2] and (counts[1] > 1 or not over):
            bases = tuple(range(0, rows, ROWS))
            make = functools.partial(Tiling, box, box, (0, 0, 0), region, 8, bases, 0, counts, over=over)
            last = rows + (halo[0] * h + halo[1]) * w + halo[2]
            yield _Way(math.prod(counts), max(math.prod(region), last), True, make)


def _linear(m_tiles: int, halo: Extents, extents: Extents) -> Iterator[Tiling]:
    """Runs of a padded plane: one of twice the length, or two in neighbouring planes."""
    depth, height, width = extents
    rows = m_tiles * 64
    rw = width + halo[2]
    for planes in range(1, CONSUMERS + 1):
        run = rows * CONSUMERS // planes
        tiles_h = -(-((height - 1) * rw + width) // run)
        span = max((k * run % rw + run - 1) // rw + 1 for k in range(tiles_h))
        region = (planes + halo[0], span + halo[1], rw)
        part = region[1] * rw if planes == CONSUMERS else 0
        base = tuple((part or rows) * group + at for group in range(CONSUMERS) for at in range(0, rows, 64))
        yield Tiling(
            (planes, run, width), (1, span, width), (planes - 1, 0, 0), region, 8, base, part,
            (-(-depth // planes), tiles_h, 1), linear=True,
        )  # fmt: skip


def best_fit(made: Specialisation, extents: Extents) -> float:
    """Part of the rows of the best tiles that are positions."""
    room = _room(made)
    fits = _fits(made.m_tiles, made.halo, extents, _dense(made), made.by_channel)
    return next((fit for fit, rows in fits if rows <= room), 0.0)


@functools.lru_cache(maxsize=256)
def _fits(m_tiles: int, halo: Extents, extents: Extents, linear: bool, uniform: bool) -> tuple[tuple[float, int], ...]:
    """Of every tiling the part of the rows that are positions, the best first, and the rows that it needs."""
    positions, ways = math.prod(extents), _ways(m_tiles, halo, extents, linear)
    return tuple((positions / (w.tiles * CONSUMERS * m_tiles * ROWS), w.rows) for w in ways if w.uniform or not uniform)


def positions_over(made: Specialisation, itemsize: int) -> int:
    """Positions that complete a sector, of whichever element it ends behind; zero where no tile is joint."""
    return -(-(32 // itemsize - 1) // made.layer.stride[2]) if has_joint_tiles(made) else 0


def has_joint_tiles(made: Specialisation) -> bool:
    """Whether tiles whose rows both warpgroups share are among those of a layer: where rows of several classes follow
    each other in what is stored. Of one class, a tile is any run of positions.
    """
    _, h, w = made.layer.stride
    return not (_dense(made) or made.one) and made.stored_classes % (h * w) == 0


def _dense(made: Specialisation) -> bool:
    """Whether any run of positions may be a tile: they are neighbours where stored, or each is told its place."""
    return made.by_channel or made.pooled or math.prod(made.layer.stride) == 1


@functools.lru_cache(maxsize=4096)
def tile(made: Specialisation, extents: Extents, row: int = 0, itemsize: int = 4) -> Tiling:
    """The fastest tiling of ``extents`` positions q per dim, as far as waste and stores tell.

    ``row``: elements of ``itemsize`` bytes in a row (along w) of the stored tensor; 0 where channels are
    neighbours in memory.
    """
    linear = row == 0 or made.one or _dense(made)
    best = _fastest(made, tilings(made, extents, linear=linear), extents, row, itemsize)
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
) -> tuple[tuple[float, int], Tiling] | None:
    """That of ``ways``, of the fewest tiles first, with its score. Arguments as of :func:`tile`."""
    best: tuple[tuple[float, int], Tiling] | None = None
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
        score = (estimate, math.prod(found.region))
        if best is None or score < best[0]:
            best = score, found
    return best


def first_planes(made: Specialisation, tiling: Tiling) -> int:
    """Planes of the region that are copied together, before others come one by one: all, where these do not begin where
    copies may.
    """
    planes, *plane = tiling.region
    apart = made.by_slab and math.prod(plane) % SWIZZLED == 0
    return tiling.tile[0] if apart else planes


def multiply_seconds(made: Specialisation, tiling: Tiling, extents: Extents) -> float:
    """Of one multiprocessor, for one sample, group and tile of output channels of ``extents`` positions."""
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
    there at places congruent to their addresses (``conv_sectors.cuh``).

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
    if made.one:
        return Store.ONE, 1
    if row == 0:
        return Store.CHANNELS, made.columns
    if made.by_channel:
        runs, longest = row_runs(made, tiling, row)
        return Store.STREAM if runs == 1 else Store.SECTORS, longest
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
    if scarce or sectors:  # or it comes as it should go
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
    """Of one multiprocessor, for one sample, group and tile of output channels."""
    sectors = 1 + PARTIAL_SECTOR * _partial(made, tiling, extents, row, itemsize)
    return _stored(made, extents, itemsize) / STORE_RATE * sectors


def _stored(made: Specialisation, extents: Extents, itemsize: int) -> int:
    """Bytes of one sample, group and tile of output channels."""
    return math.prod(extents) * made.stored_columns * (1 if made.pooled else math.prod(made.layer.stride)) * itemsize


def _partial(made: Specialisation, tiling: Tiling, extents: Extents, row: int, itemsize: int) -> float:
    """Part of the 32-byte sectors of a stored run that it fills only in part."""
    kind, run = store_of(made, tiling, extents, row, itemsize)
    if kind is Store.JOINT and tiling.over:  # only where a plane begins and ends
        run = extents[1] * made.layer.stride[1] * row
    if kind in (Store.CHANNELS, Store.ONE) or (row * itemsize % 32 == 0 and run * itemsize % 32 == 0):
        return 0.0
    return min(1.0, 2 / (run * itemsize / 32 + 1))


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
) -> float:
    """An estimate of the kernels' time on an H100. ``sizes`` of x, ``extents`` of the stored tensor, per dim.

    ``keeps``: results are stored. ``epilogue``: cycles of a multiprocessor per accumulator, for what else it does.
    ``shares``: what of x and the weights is prepared. ``besides``: cycles of a multiprocessor per tile.
    """
    stride = (1, 1, 1) if made.pooled else made.layer.stride
    d, h, w = (-(-e // s) for e, s in zip(extents, stride, strict=True))
    tiling = tile(made, (d, h, w), row, itemsize)
    tiles = batch * made.layer.groups * made.column_tiles * math.prod(tiling.counts)
    waves = -(-tiles // PROCESSORS)
    accumulators = made.rows * made.columns * sum(len(p.residues) for p in made.passes)
    multiply = multiply_seconds(made, tiling, (d, h, w)) / math.prod(tiling.counts)
    # what one warpgroup does with its accumulators is hidden by the other one's products, and no more than that
    one = max(multiply, multiply / CONSUMERS + accumulators * epilogue / CLOCK) + besides / CLOCK
    if keeps:
        one += store_seconds(made, tiling, (d, h, w), row, itemsize) / math.prod(tiling.counts)
    total = waves * one + LAUNCHES
    if shares is not Shared.ALL:
        total += LAUNCHES_WEIGHTS
    if shares is Shared.NOTHING:
        position = made.layer.in_channels * 4 + made.padded_channels * made.parts * 2
        total += batch * made.layer.groups * math.prod(sizes) * position / ROWS_RATE + LAUNCHES_X
    return total
