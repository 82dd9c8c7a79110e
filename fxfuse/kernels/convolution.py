"""How a convolution runs on Hopper's matrix instructions: what a kernel is compiled for, and its tiles per size.

Pure arithmetic, without a GPU. A :class:`Specialisation` holds what is compiled in: taps, channel tiles,
stages. A :class:`Tiling` holds what depends on sizes, which a compiled kernel takes as arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from fxfuse.kernels.geometry import Residue, Step, reach, residues_of, steps_of

#: shared memory of a thread block on sm_90
SHARED_BYTES = 232448
#: warpgroups that multiply, of 64 rows per m64 tile each
CONSUMERS = 2
STAGE_BYTES = 16384
#: clock of a multiprocessor, and what one of the 132 of an H100 stores per second; how much longer a sector takes
#: that is written in part: measured on an H100, rows of 95 floats against rows of 96
CLOCK, STORE_RATE, PARTIAL_SECTOR, PROCESSORS = 1.7e9, 2e10, 5.0, 132
#: bytes of float32 input per second that are measured and made rows, and seconds that launches take: read off runs
#: on an H100
ROWS_RATE, LAUNCHES = 1.2e12, 1.5e-5
#: products that the matrix units may add up by themselves where float32's accuracy is wanted: they truncate
PROMOTE_EVERY = 128
#: sizes of outputs for which a specialisation, which knows no sizes, is chosen: a power of two, and one with a border
_TYPICAL = ((32, 32, 32), (34, 34, 34))
#: part of the rows that the tiles of a large input must use; differences of it, summed over those, that do not matter
GOOD_FIT, ABOUT_AS_GOOD = 0.5, 0.05


class Unsupported(Exception):  # noqa: N818 - a refusal, not an error
    """The engine has no kernel for this; the message is a sentence for the report."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A transposed convolution, channels per group; three spatial dims."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]

    @functools.cached_property
    def residues(self) -> tuple[Residue, ...]:
        return residues_of(self.kernel, self.stride, self.padding, self.dilation)

    @property
    def volume(self) -> int:
        return math.prod(self.kernel)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Residue classes whose accumulators are held at the same time; None fills up."""

    residues: tuple[Residue, ...]
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """What is compiled into a convolution kernel.

    ``chunk``: input channels per row of shared memory; ``columns``: output channels per residue class and
    thread block; ``m_tiles``: 64-row tiles per multiplying warpgroup; ``stages``, ``x_buffers``: buffers in
    shared memory, of weights and of x. ``pooled``, ``exact``: see :func:`specialise`.
    """

    layer: Layer
    chunk: int
    columns: int
    passes: tuple[Pass, ...]
    m_tiles: int
    stages: int
    x_buffers: int
    pooled: bool
    exact: bool

    @property
    def parts(self) -> int:
        """16-bit numbers that make a float32: two for float32's own accuracy."""
        return 2 if self.exact else 1

    @property
    def padded_channels(self) -> int:
        """Input channels per group in rows of shared memory."""
        return -(-self.layer.in_channels // self.chunk) * self.chunk

    @property
    def chunks(self) -> int:
        """Chunks of channels that are multiplied: of two parts each, all products but low times low."""
        return self.padded_channels // self.chunk * (3 if self.exact else 1)

    @property
    def resident(self) -> bool:
        return self.chunks == 1

    @property
    def residues(self) -> int:
        return max(len(p.residues) for p in self.passes)

    @property
    def column_tiles(self) -> int:
        return -(-self.layer.out_channels // self.columns)

    @property
    def rows(self) -> int:
        """Positions q per thread block, the wasted ones among them."""
        return CONSUMERS * self.m_tiles * 64

    @property
    def region_bytes(self) -> int:
        """Shared memory for one buffer of x."""
        free = self.dynamic_bytes - 1024 - self.stages * STAGE_BYTES - self.staging_bytes
        return free // self.x_buffers // 1024 * 1024

    @property
    def dynamic_bytes(self) -> int:
        """Shared memory beside barriers and the tables of steps and channels."""
        steps = sum(len(p.steps) for p in self.passes)
        return (SHARED_BYTES - 512 - (steps + 1) * 8 - CONSUMERS * self.columns * 8) // 1024 * 1024

    @property
    def staging_bytes(self) -> int:
        """Shared memory for outputs on their way: eight channels of a thread block's rows, in float32."""
        return CONSUMERS * 8 * (self.m_tiles * 64 * (1 if self.pooled else self.residues) + 4) * 4

    @property
    def weight_bytes(self) -> int:
        """Packed weights of one group and one tile of output channels."""
        return sum(self.step_bytes(s) for p in self.passes for s in p.steps) * self.chunks

    def step_bytes(self, step: Step) -> int:
        return step.count * self.columns * self.chunk * 2

    def batches(self, steps: tuple[Step, ...]) -> list[list[Step]]:
        """Steps that share a stage: neighbours of the same run."""
        found: list[list[Step]] = []
        room = 0
        for step in steps:
            size = self.step_bytes(step)
            full = size > room or (self.exact and len(found[-1]) * self.chunk >= PROMOTE_EVERY)
            if full or (step.first, step.count) != (found[-1][0].first, found[-1][0].count):
                found.append([])
                room = STAGE_BYTES
            found[-1].append(step)
            room -= size
        return found


@functools.lru_cache(maxsize=1024)
def specialise(layer: Layer, *, pooled: bool, exact: bool = False, before: bool = False) -> Specialisation:
    """The kernel for a layer. ``pooled``: the epilogue keeps a running value per position and channel.

    ``exact``: float32's own accuracy, from two 16-bit parts and sums that are kept outside the matrix units.
    ``before``: an expression is computed in front of the pool, which needs registers, too.
    """
    low, high = reach(layer.residues)
    halo = tuple(b - a for a, b in zip(low, high, strict=True))
    width = max(8, -(-layer.out_channels // 8) * 8)
    choices = []
    for columns in {_columns(width, 64), _columns(width, 64 if pooled else 128)}:
        for stack in dict.fromkeys((1, layer.stride[2], layer.stride[2] * layer.stride[1], math.prod(layer.stride))):
            # neighbours along w in one thread make a store of two
            if stack <= 16 and stack * columns <= 128 and (pooled or layer.stride[2] != 2 or stack % 2 == 0):
                passes = _passes(layer, stack)
                choices.append((_cycles(passes, columns) * -(-width // columns), -stack, columns, passes))
    _, _, columns, passes = min(choices, key=lambda c: c[:3])
    wide = max(len(p.residues) for p in passes) * columns
    stack = max(len(p.residues) for p in passes)
    # a store has one bit for every row of a thread and residue class
    tiles = [
        m
        for m in (4, 2, 1)
        if m * 2 * stack <= 32
        and m * wide <= (128 if exact else 256)
        and not (pooled and m * columns > (64 if before else 128))
    ]
    for m_tiles, stages in itertools.product(tiles, (4, 3)):
        fitting: list[tuple[float, Specialisation]] = []
        for chunk, x_buffers in _memory(layer.in_channels, len(passes)):
            if m_tiles == 4 and x_buffers == 1:
                continue  # two tiles of half the size hide each other's copies
            made = Specialisation(layer, chunk, columns, passes, m_tiles, stages, x_buffers, pooled, exact)
            fit = [_fit(made, extents, halo) for extents in _TYPICAL]
            if min(fit) >= GOOD_FIT:
                fitting.append((sum(fit), made))
        if fitting:
            best = max(fit for fit, _ in fitting)
            # the first of those that are about as good: they are in the order of preference
            return next(made for fit, made in fitting if fit >= best - ABOUT_AS_GOOD)
    raise Unsupported(f"a kernel of {layer.kernel} with dilation {layer.dilation} reaches too far for shared memory")


def _fit(made: Specialisation, extents: tuple[int, int, int], halo: tuple[int, ...]) -> float:
    """Part of the rows of the best tiles that are positions."""
    parts = [0.0]
    for shape in _shapes(made.m_tiles, extents, halo):
        if shape.rows_needed(halo) * made.chunk * 2 <= made.region_bytes:
            tiles = math.prod(-(-e // t) for e, t in zip(extents, shape.tile, strict=True))
            parts.append(math.prod(extents) / (tiles * made.rows))
    return max(parts)


def _passes(layer: Layer, stack: int) -> tuple[Pass, ...]:
    """Passes of ``stack`` residue classes, in an order in which instructions always begin at the first one.

    ptxas keeps the accumulators of one instruction in one place: runs that begin anywhere would be copied
    to and fro. Where no order helps, every class gets instructions of its own.
    """
    groups = [layer.residues[i : i + stack] for i in range(0, len(layer.residues), stack)]
    orders = itertools.permutations(range(stack)) if stack <= 4 else iter([tuple(range(stack))])
    for order in orders:
        passes = tuple(Pass(r, steps_of(r)) for r in (tuple(g[i] for i in order) for g in groups))
        if all(s.first == 0 for p in passes for s in p.steps):
            return passes
    return tuple(
        Pass(g, tuple(sorted(
            (Step(s.delta, s.first + i, (tap,)) for s in steps_of(g) for i, tap in enumerate(s.taps)),
            key=lambda s: (s.first, s.delta),
        ))) for g in groups
    )  # fmt: skip


def _cycles(passes: tuple[Pass, ...], columns: int) -> float:
    """Relative time of the instructions: below 64 columns they wait for shared memory."""
    return sum(max(s.count * columns / 2, 1.2 * (16 + s.count * columns / 4)) for p in passes for s in p.steps)


def _columns(width: int, most: int) -> int:
    """Output channels per tile: at most ``most``, as few padded ones as possible, then as many as possible."""
    return min(range(8, min(width, most) + 1, 8), key=lambda c: (-(-width // c) * c + 8 * -(-width // c), -c))


def _memory(channels: int, passes: int) -> list[tuple[int, int]]:
    """(chunk, buffers of x), the fastest first: several passes want x to stay, one wants copies hidden."""
    padded = -(-channels // 16) * 16
    found = [(chunk, buffers) for chunk in (64, 32, 16) if padded % chunk == 0 for buffers in (2, 1)]
    return sorted(found, key=lambda f: -f[1]) if passes == 1 else found


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Boxes of positions q: ``tile``, of two ``box``es, one per warpgroup; with halo: ``region``.

    ``row_base``: first row of each m64 tile; ``row_group``: rows from one group of eight to the next.
    """

    tile: tuple[int, int, int]
    box: tuple[int, int, int]
    region: tuple[int, int, int]
    row_group: int
    row_base: tuple[int, ...]
    counts: tuple[int, int, int]
    rows: int

    @property
    def useful(self) -> float:
        """Part of the rows that are positions of tiles."""
        return math.prod(self.tile) / self.rows


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A box per multiplying warpgroup, the tile that they make together, and where their rows lie."""

    box: tuple[int, int, int]
    tile: tuple[int, int, int]
    row_group: int
    row_base: tuple[int, ...]

    def rows_needed(self, halo: tuple[int, ...]) -> int:
        """Rows of shared memory that the matrix instructions read, the last tap's included."""
        rh, rw = self.tile[1] + halo[1], self.tile[2] + halo[2]
        shift = (halo[0] * rh + halo[1]) * rw + halo[2]
        return max((self.tile[0] + halo[0]) * rh * rw, max(self.row_base) + 7 * self.row_group + 8 + shift)


def _shapes(m_tiles: int, extents: tuple[int, int, int], halo: tuple[int, ...]) -> Iterator[_Shape]:
    """Boxes of blocks of 8 by 8 positions, and boxes of consecutive rows; two of them along any dim."""
    for (d, h, w), blocks in _boxes(m_tiles, extents, halo):
        for axis in range(3):
            size = [d, h, w]
            size[axis] *= CONSUMERS
            rh, rw = size[1] + halo[1], size[2] + halo[2]
            step = (d * rh * rw, h * rw, w)[axis]
            if blocks:
                inside = itertools.product(range(d), range(0, h, 8), range(0, w, 8))
                base = [(z * rh + y) * rw + x for z, y, x in inside]
            else:
                # consecutive rows of the region: as many as the box spans in it
                if (d - 1) * rh * rw + (h - 1) * rw + w > m_tiles * 64:
                    continue
                base = list(range(0, m_tiles * 64, 64))
            rows = tuple(group * step + at for group in range(CONSUMERS) for at in base)
            yield _Shape((d, h, w), (size[0], size[1], size[2]), rw if blocks else 8, rows)


def _boxes(
    m_tiles: int, extents: tuple[int, int, int], halo: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int, int], bool]]:
    """(box, whether it is made of blocks of 8 by 8) for the rows of one warpgroup."""
    for a in (1, 2, 4):
        for b in (1, 2, 4):
            if a * b <= m_tiles:
                yield (m_tiles // (a * b), a * 8, b * 8), True
    rows = m_tiles * 64
    for parts in range(1, 17):
        w = -(-extents[2] // parts)
        rw = w + halo[2]
        if w > rows or rw > 256:
            continue
        for h in range(1, min((rows - w) // rw + 1, extents[1]) + 1):
            deepest = (rows - (h - 1) * rw - w) // ((h + halo[1]) * rw) + 1
            yield (min(max(deepest, 1), extents[0]), h, w), False


@functools.lru_cache(maxsize=4096)
def tile(made: Specialisation, extents: tuple[int, int, int], row: int = 0, itemsize: int = 4) -> Tiling:
    """The fastest tiling of ``extents`` positions q per dim, as far as waste and stores tell.

    ``row``: elements of ``itemsize`` bytes in a row (along w) of the stored tensor; 0 where channels are
    neighbours in memory.
    """
    low, high = reach(made.layer.residues)
    halo = tuple(b - a for a, b in zip(low, high, strict=True))
    best: tuple[tuple[float, int], Tiling] | None = None
    for shape in _shapes(made.m_tiles, extents, halo):
        size = shape.tile
        region = (size[0] + halo[0], size[1] + halo[1], size[2] + halo[2])
        if shape.rows_needed(halo) * made.chunk * 2 > made.region_bytes or max(region) > 256:
            continue
        counts = tuple(-(-e // t) for e, t in zip(extents, size, strict=True))
        multiply = math.prod(counts) * made.rows / 64 * _pass_cycles(made) / CLOCK
        estimate = multiply + _store_seconds(made, shape.box, extents, row, itemsize)
        score = (estimate, math.prod(region))
        if best is None or score < best[0]:
            found = Tiling(size, shape.box, region, shape.row_group, shape.row_base, counts, made.rows)  # type: ignore[arg-type]
            best = score, found
    if best is None:
        raise Unsupported(f"no tile of {extents} positions fits into shared memory")
    return best[1]


def _store_seconds(
    made: Specialisation, box: tuple[int, int, int], extents: tuple[int, int, int], row: int, itemsize: int
) -> float:
    """Of one multiprocessor, for one sample, group and tile of output channels."""
    stored = math.prod(extents) * made.columns * (1 if made.pooled else math.prod(made.layer.stride)) * itemsize
    return stored / STORE_RATE * (1 + (PARTIAL_SECTOR * _partial(made, box, extents, row, itemsize) if row else 0.0))


def seconds(
    made: Specialisation,
    batch: int,
    sizes: tuple[int, int, int],
    extents: tuple[int, int, int],
    row: int,
    itemsize: int,
) -> float:
    """An estimate of the kernels' time on an H100. ``sizes`` of x, ``extents`` of the stored tensor, per dim."""
    stride = (1, 1, 1) if made.pooled else made.layer.stride
    q = tuple(-(-e // s) for e, s in zip(extents, stride, strict=True))
    tiling = tile(made, (q[0], q[1], q[2]), row, itemsize)
    tiles = batch * made.layer.groups * made.column_tiles * math.prod(tiling.counts)
    waves = -(-tiles // PROCESSORS)
    one = made.rows / 64 * _pass_cycles(made) / CLOCK
    one += _store_seconds(made, tiling.box, (q[0], q[1], q[2]), row, itemsize) / math.prod(tiling.counts)
    read = batch * made.layer.groups * made.layer.in_channels * math.prod(sizes)
    return waves * one + read * 4 / ROWS_RATE + LAUNCHES


def _pass_cycles(made: Specialisation) -> float:
    """Clock cycles that the matrix units of a multiprocessor need for all taps of 64 rows."""
    return _cycles(made.passes, made.columns) * (made.chunks * made.chunk // 16)


def _partial(
    made: Specialisation, size: tuple[int, int, int], extents: tuple[int, int, int], row: int, itemsize: int
) -> float:
    """Part of the 32-byte sectors of a stored run that it fills only in part."""
    stride = 1 if made.pooled else made.layer.stride[2]
    width = stride if stride == 1 or (stride == 2 and made.residues % 2 == 0) else 1
    if width != stride:
        return 1.0
    run = size[2] * width
    if size[2] >= extents[2]:
        merged = (made.pooled or made.layer.stride[1] == 1) and size[2] == row
        run = row * (size[1] if merged else 1)
    if row * itemsize % 32 == 0 and run * itemsize % 32 == 0:
        return 0.0
    return min(1.0, 2 / (run * itemsize / 32 + 1))
