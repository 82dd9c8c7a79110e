"""Tiles of a convolution's output: which positions a thread block may take, and what of x that needs in shared memory.

An output is tiled in positions q, of which every residue class has an element. Pure arithmetic; a compiled kernel
takes all of it as arguments. ``tiling.py`` chooses among them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fxfuse.kernels.convolution.specialisation import (
    CONSUMERS,
    GATHERED,
    MOST_BLOCKS,
    MOST_WAITING,
    ROWS,
    Along,
    Specialisation,
)

#: positions of x per dim that one copy brings
MOST_COPIED = 256
#: rows of shared memory after which the order of their units repeats: copies begin there
SWIZZLED = 8

Extents = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Positions q of a thread block: a ``tile``, of two ``box``es, one per warpgroup; with halo: ``region``.

    ``joint``: the tile is one box, whose rows in the region both warpgroups share: half of them each. It may have
    positions ``over``, of the row behind it, that the next tile has, too: who begins a sector of memory stores it.
    ``sharing``: warpgroups that have a tile; where each has its own, that is one box.
    ``row_base``: first row of each m64 tile in the region; ``row_group``: rows from one group of eight to the
    next. ``linear``: a tile is ``tile[1]`` consecutive rows of a plane of the region, which is as wide as the
    output and its halo, from anywhere; ``box`` and ``region`` hold the rows along h that it may touch.
    ``half``: from the first box to the second, in positions; ``part_rows``: in rows, where places of the
    second are counted from its own begin. ``samples``: of a set, every position of the region has so many rows; of the
    region the inner dim is the last one (``sets.py``).
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
    samples: int = 1
    sharing: int = CONSUMERS

    def rows_needed(self, halo: Extents) -> int:
        """Rows of shared memory that the matrix instructions read, the last tap's included."""
        if self.samples > 1:
            return math.prod(self.region) * self.samples
        _, height, width = self.region
        shift = (halo[0] * height + halo[1]) * width + halo[2]
        skip = width - 1 if self.linear else 0
        return max(math.prod(self.region), skip + max(self.row_base) + 7 * self.row_group + 8 + shift)

    @property
    def uniform(self) -> bool:
        """Whether all groups of eight rows of a warpgroup are equally far apart."""
        each = len(self.row_base) // self.sharing
        return all(b - a == 8 * self.row_group for a, b in itertools.pairwise(self.row_base[:each]))

    @property
    def whole_rows(self) -> bool:
        """Whether each warpgroup's part of a tile is boxes of whole rows along w."""
        return self.counts[2] == 1 and not (self.half[2] or self.linear or self.joint)

    @property
    def joint(self) -> bool:
        return self.sharing > 1 and not self.linear and not any(self.half)

    def fit(self, extents: Extents) -> float:
        """Part of the rows that are positions of ``extents``, of whole sets."""
        return math.prod(extents) * self.samples / (math.prod(self.counts) * len(self.row_base) * 64)


def region_stride(made: Specialisation, tiling: Tiling) -> int:
    """Bytes of shared memory from one buffer of x to the next."""
    rows = math.prod(copied(made, tiling)) if made.planar else tiling.rows_needed(made.halo)
    return -(-rows * made.row_bytes // 1024) * 1024


def copied(made: Specialisation, tiling: Tiling) -> Extents:
    """Sizes of what is copied of x for a tile."""
    return made.copied(tiling.region, tiling.tile[2] if tiling.counts[2] > 1 else 0)


def outbox_blocks(made: Specialisation, tiling: Tiling, itemsize: int) -> int:
    """Blocks of results on their way that a multiplying warpgroup has, of numbers of ``itemsize`` bytes.

    They have the shared memory that is left, up to a limit: results come in bursts, behind the products of a pass.
    """
    if made.samples > 1 or made.pingpong or made.along is Along.HELD:
        return 0
    given = made.region_bytes - region_stride(made, tiling)
    free = made.staging_bytes + made.x_buffers * given - CONSUMERS * GATHERED * 4
    block = made.lines * made.pitch * itemsize
    return min(MOST_BLOCKS, max(made.least_blocks, MOST_WAITING // block), free // CONSUMERS // block)


def tilings(made: Specialisation, extents: Extents, *, linear: bool) -> Iterator[Tiling]:
    """Those whose region fits into shared memory, of the fewest tiles first. ``linear``: such tiles as well."""
    room, by_channel = _room(made), made.by_channel
    ways = _ways(made.m_tiles, made.sharing, made.halo, extents, linear)
    found = (way.tiling() for way in ways if way.rows <= room and (way.uniform or not by_channel))
    if made.along is Along.HELD:
        return _eight_rows(made, extents)
    if made.along is Along.SHARED:
        return (t for t in found if t.whole_rows)
    return filter(functools.partial(_fits_copied, made), found) if made.planar else found


def _eight_rows(made: Specialisation, extents: Extents) -> Iterator[Tiling]:
    """Eight rows for each warpgroup, of all positions along w, as blocks of 8 by 8."""
    box = (1, 8, 8 * made.m_tiles)
    for axis in range(2 if made.sharing > 1 else 1) if extents[2] <= box[2] else ():
        found = _box(made.m_tiles, made.sharing, made.halo, extents, box, axis, True)
        if max(found.region) <= MOST_COPIED and found.rows_needed(made.halo) <= _room(made):
            yield found


def joint_tilings(made: Specialisation, extents: Extents, over: int) -> Iterator[Tiling]:
    """Joint ones, with so many positions ``over`` and without, in the same order."""
    room = _room(made)
    ways = _joint_ways(made.m_tiles, made.halo, extents, over) if over else ()
    found = (way.tiling() for way in ways if way.rows <= room)
    return filter(functools.partial(_fits_copied, made), found) if made.planar else found


def _fits_copied(made: Specialisation, tiling: Tiling) -> bool:
    """Whether planes of x for a tile fit into shared memory, and into a copy."""
    sizes = copied(made, tiling)
    return math.prod(sizes) <= _room(made) and max(sizes) <= MOST_COPIED


def _room(made: Specialisation) -> int:
    """Rows of shared memory for one buffer of x."""
    return made.region_bytes // made.row_bytes


class _Way(NamedTuple):
    """A tiling that need not have been made yet. ``rows``: of shared memory, that it needs; ``tiles``: of it."""

    tiles: int
    rows: int
    uniform: bool
    tiling: Callable[[], Tiling]


# a layer is looked at in many ways, in stages, buffers and chunks, which have their tiles in common: so have layers
@functools.lru_cache(maxsize=64)
def _ways(m_tiles: int, sharing: int, halo: Extents, extents: Extents, linear: bool) -> tuple[_Way, ...]:
    """Tilings, those of the fewest tiles first."""
    found = [*_boxes(m_tiles, sharing, halo, extents)]
    for made in _linear(m_tiles, sharing, halo, extents) if linear else ():
        if max(made.region) <= MOST_COPIED:
            tiles = math.prod(made.counts)
            found.append(_Way(tiles, made.rows_needed(halo), made.uniform, functools.partial(_itself, made)))
    return tuple(sorted(found, key=operator.attrgetter("tiles")))


def _itself(made: Tiling) -> Tiling:
    return made


def _boxes(m_tiles: int, sharing: int, halo: Extents, extents: Extents) -> Iterator[_Way]:
    """Boxes of blocks of 8 by 8 positions, and boxes of consecutive rows; two of them along any dim, or one."""
    for box, blocks in _box_sizes(m_tiles, extents, halo):
        d, h, w = box
        for axis in range(3 if sharing > 1 else 1):
            size, region = _with_halo(box, axis, sharing, halo)
            _, rh, rw = region
            # consecutive rows of the region: as many as the box spans in it
            if max(region) > MOST_COPIED or (not blocks and (d - 1) * rh * rw + (h - 1) * rw + w > m_tiles * 64):
                continue
            make = functools.partial(_box, m_tiles, sharing, halo, extents, box, axis, blocks)
            uniform, last = True, (m_tiles - 1) * 64 + (sharing - 1) * (d * rh * rw, h * rw, w)[axis]
            if blocks:
                made = make()
                uniform, last = made.uniform, max(made.row_base)
            shift = (halo[0] * rh + halo[1]) * rw + halo[2]
            rows = max(math.prod(region), last + 7 * (rw if blocks else 8) + 8 + shift)
            yield _Way(math.prod(_counts(extents, size)), rows, uniform, make)


def _with_halo(box: Extents, axis: int, count: int, halo: Extents) -> tuple[Extents, Extents]:
    """The size of ``count`` boxes along ``axis``, and that of the region that they read."""
    size = [*box]
    size[axis] *= count
    d, h, w = size
    return (d, h, w), (d + halo[0], h + halo[1], w + halo[2])


def _counts(extents: Extents, size: Extents) -> Extents:
    (a, b, c), (d, h, w) = extents, size
    return -(-a // d), -(-b // h), -(-c // w)


@functools.lru_cache(maxsize=4096)
def _box(m_tiles: int, sharing: int, halo: Extents, extents: Extents, box: Extents, axis: int, blocks: bool) -> Tiling:
    d, h, w = box
    size, region = _with_halo(box, axis, sharing, halo)
    _, rh, rw = region
    step = (d * rh * rw, h * rw, w)[axis] if sharing > 1 else 0
    if blocks:
        inside = itertools.product(range(d), range(0, h, 8), range(0, w, 8))
        base = [(z * rh + y) * rw + x for z, y, x in inside]
    else:
        base = [*range(0, m_tiles * 64, 64)]
    rows = tuple(part * step + at for part in range(sharing) for at in base)
    half = tuple(n if axis == dim and sharing > 1 else 0 for dim, n in enumerate(box))
    group, counts = rw if blocks else 8, _counts(extents, size)
    return Tiling(size, box, (half[0], half[1], half[2]), region, group, rows, step, counts, sharing=sharing)


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


def _linear(m_tiles: int, sharing: int, halo: Extents, extents: Extents) -> Iterator[Tiling]:
    """Runs of a padded plane: one of all rows, or two in neighbouring planes."""
    depth, height, width = extents
    rows = m_tiles * 64
    rw = width + halo[2]
    for planes in range(1, sharing + 1):
        run = rows * sharing // planes
        tiles_h = -(-((height - 1) * rw + width) // run)
        span = max((k * run % rw + run - 1) // rw + 1 for k in range(tiles_h))
        region = (planes + halo[0], span + halo[1], rw)
        part = region[1] * rw if planes > 1 else 0
        base = tuple((part or rows) * group + at for group in range(sharing) for at in range(0, rows, 64))
        yield Tiling(
            (planes, run, width), (1, span, width), (planes - 1, 0, 0), region, 8, base, part,
            (-(-depth // planes), tiles_h, 1), linear=True, sharing=sharing,
        )  # fmt: skip


def best_fit(made: Specialisation, extents: Extents) -> float:
    """Part of the rows of the best tiles that are positions."""
    room = _room(made)
    fits = _fits(made.m_tiles, made.sharing, made.halo, extents, any_run(made), made.by_channel)
    return next((fit for fit, rows in fits if rows <= room), 0.0)


@functools.lru_cache(maxsize=256)
def _fits(
    m_tiles: int, sharing: int, halo: Extents, extents: Extents, linear: bool, uniform: bool
) -> tuple[tuple[float, int], ...]:
    """Of every tiling the part of the rows that are positions, the best first, and the rows that it needs."""
    positions, ways = math.prod(extents), _ways(m_tiles, sharing, halo, extents, linear)
    return tuple((positions / (w.tiles * sharing * m_tiles * ROWS), w.rows) for w in ways if w.uniform or not uniform)


def positions_over(made: Specialisation, itemsize: int) -> int:
    """Positions that complete a sector, of whichever element it ends behind; zero where no tile is joint."""
    return -(-(32 // itemsize - 1) // made.layer.stride[2]) if has_joint_tiles(made) else 0


def has_joint_tiles(made: Specialisation) -> bool:
    """Whether tiles whose rows both warpgroups share are among those of a layer: where rows of several classes follow
    each other in what is stored. Of one class, a tile is any run of positions.
    """
    _, h, w = made.layer.stride
    return not (any_run(made) or made.one or made.pingpong) and made.stored_classes % (h * w) == 0


def any_run(made: Specialisation) -> bool:
    """Whether any run of positions may be a tile: they are neighbours where stored, or each is told its place."""
    return made.by_channel or made.pooled or math.prod(made.layer.stride) == 1


def first_planes(made: Specialisation, tiling: Tiling) -> int:
    """Planes of the region that are copied together, before others come one by one: all, where these do not begin where
    copies may.
    """
    planes, *plane = tiling.region
    apart = made.by_slab and math.prod(plane) * made.samples % SWIZZLED == 0
    return tiling.tile[0] if apart else planes
