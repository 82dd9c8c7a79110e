"""Statistics of a convolution's output without that output: what is compiled, for a few input channels. Pure.

Over a residue class, ``y = b + w . patch``: the sum of ``(y - b)^2`` is ``w^T M w`` with M the sums of products of
every two elements of a patch. Such a sum depends on the distance of the two, the ``lag``, but for where it begins and
ends: a class has so many positions. So x is cut into parts, boxes that no such border runs through;
``cuh/correlation.cuh`` adds up the products of all lags once per part, in float64 on the matrix units, as
:mod:`~fxfuse.kernels.convolution.shifts` arranges them. Those of a class are sums over the parts that it has.
Float64 loses nothing to a mean far from zero, nor to outputs much smaller than the terms that they are made of.
Statistics that may be of outputs that are not finite are made of these.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Sequence

import torch

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.convolution.entries import TYPES
from fxfuse.kernels.convolution.geometry import Residue
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.shifts import BANKS, FACTORS, ROWS, SLOTS, Box, Shifts, Spread
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.convolution.tiles import Extents

#: input channels at lags; columns of M
MOST_COLUMNS, MOST_PATCH = 192, 64
#: numbers of a matrix instruction's result
PRODUCTS = ROWS * FACTORS
#: elements of x in a block's shared memory, with what keeps them apart: five blocks share a multiprocessor
TILE_ELEMENTS, LONGEST = 9600, 256
#: parts of x, cuts per dim, and tiles of a part, which kernels divide in float32
MOST_PARTS, MOST_CUTS, MOST_TILES = 128, 9, 2**20
#: from which number of jobs of a sample and group on they take several tiles
ENOUGH_JOBS = 256
#: warps of a block; elements and steps that a part has at most whose products one of them makes alone
WARPS, ALONE, FEW_STEPS = 4, TILE_ELEMENTS // 4, 64
#: into how many pieces rows are cut, so that four are walked along at a time
PIECES = (1, 2, 4)
#: output channels of a block of `moments`
CHANNELS = 16
#: clock cycles of a multiprocessor that a tile takes, and an element of it: slots that issue their instructions
TILE_CYCLES, ELEMENT_CYCLES = 400, 0.1


@dataclasses.dataclass(frozen=True)
class Part:
    """A box of x that no border runs through. ``at``: which one it is per dim; ``tile``: the positions of a tile of it;
    ``jobs``: how many take its tiles. ``alone``: the only one is a warp's; else they are blocks'."""

    at: Box
    size: Box
    tile: Box
    jobs: int
    alone: bool
    spread: Spread


@dataclasses.dataclass(frozen=True)
class Parts:
    """A sample of x, cut for all classes. ``cuts``: per dim, where parts begin, and where the last one ends.

    ``all``: the parts, those of several jobs first, those that warps take alone last.
    """

    cuts: tuple[tuple[int, ...], ...]
    all: tuple[Part, ...]

    @property
    def jobs(self) -> int:
        return sum(p.jobs for p in self.all)

    @property
    def wide(self) -> int:
        """Jobs that are a block's."""
        return sum(p.jobs for p in self.all if not p.alone)

    @property
    def blocks(self) -> int:
        """Of a sample and group."""
        return self.wide + -(-(self.jobs - self.wide) // WARPS)

    @property
    def several(self) -> int:
        """Parts of several jobs."""
        return sum(p.jobs > 1 for p in self.all)

    def packed(self) -> bytes:
        """``Parts`` of ``cuh/correlation.cuh``."""
        begin = [0, *itertools.accumulate(p.jobs for p in self.all)]
        tiles = [d | h << 11 | w << 22 for d, h, w in (p.tile for p in self.all)]
        places = [_digits(*p.at, *p.spread) for p in self.all]
        numbers = [self.blocks, self.wide, self.jobs, self.several, len(self.all)]
        for cut in self.cuts:
            numbers += _filled(cut, MOST_CUTS)
        for values, count in ((begin, MOST_PARTS + 1), (tiles, MOST_PARTS), (places, MOST_PARTS)):
            numbers += _filled(values, count)
        return struct.pack(f"={len(numbers)}i", *numbers)


@dataclasses.dataclass(frozen=True)
class Work:
    """What the kernels do for some sizes.

    ``products``, ``sums``: numbers in float64 that they keep, of jobs, and of parts of several ones. ``blocks``: of the
    largest grid. ``macs``: of the matrix units, idle columns included. ``elements``: of x, as often as tiles read them.
    """

    products: int
    sums: int
    blocks: int
    macs: int
    elements: int


@dataclasses.dataclass(frozen=True)
class Correlation:
    """What is compiled for a layer: made by :meth:`of`. ``output``: the dtype of the values that are measured."""

    layer: Layer
    dtype: torch.dtype
    output: torch.dtype
    bias: torch.dtype

    @staticmethod
    def of(layer: Layer, dtype: torch.dtype, output: torch.dtype, bias: torch.dtype) -> Correlation:
        """Raises Unsupported where x has too many products with itself."""
        made = Correlation(layer, dtype, output, bias)
        if layer.in_channels >= FACTORS or made.columns > MOST_COLUMNS or made.patch > MOST_PATCH:
            raise Unsupported(
                f"x has too many products with itself: {layer.in_channels} input channels (at most {FACTORS - 1}), "
                f"{made.columns} at distances (at most {MOST_COLUMNS}), {made.patch} elements of a patch (at most "
                f"{MOST_PATCH})"
            )
        if made.room((1, 1, 1)) > TILE_ELEMENTS:
            raise Unsupported(f"taps reach too far for a tile of x: {made.reach[1]} positions")
        return made

    @functools.cached_property
    def lags(self) -> tuple[Box, ...]:
        """The distances of two taps of a class, but for those that are another one's negative."""
        return tuple(sorted({lag for r in self.layer.residues for lag in _lags(r)} | {(0, 0, 0)}))

    @functools.cached_property
    def shifts(self) -> Shifts:
        return Shifts.of(self.lags, self.layer.in_channels)

    @property
    def columns(self) -> int:
        return self.layer.in_channels * len(self.lags)

    @property
    def patch(self) -> int:
        """Columns of the largest M."""
        return self.layer.in_channels * max(len(r.taps) for r in self.layer.residues)

    @property
    def entries(self) -> int:
        """Numbers of a job: sums of products, and of x."""
        return self.shifts.results * PRODUCTS

    @functools.cached_property
    def reach(self) -> tuple[Box, Box]:
        """Per dim, how far lags reach back, and by what a tile of x is larger than its positions."""
        (low_d, low_h), (high_d, high_h) = (
            tuple(pick(lag[i] for lag in self.lags) for i in (0, 1)) for pick in (min, max)
        )
        back, ahead = self.shifts.reach
        return (-low_d, -low_h, back), (high_d - low_d, high_h - low_h, back + ahead)

    def elements(self, tile: Box) -> int:
        """Of x, that a tile needs."""
        return self.layer.in_channels * math.prod(t + s for t, s in zip(tile, self.reach[1], strict=True))

    def spread(self, tile: Box) -> Spread:
        """How a tile lies in shared memory; without gaps where it is a warp's."""
        d, h, w = (t + s for t, s in zip(tile, self.reach[1], strict=True))
        return (
            Spread(0, w * h % BANKS, w * h * d % BANKS)
            if self.alone(tile)
            else self.shifts.spread(w, thin=tile[1] == 1)
        )

    def room(self, tile: Box) -> int:
        """Of a tile in shared memory: ``Pitch`` of ``cuh/correlation.cuh``."""
        d, h, w = (t + s for t, s in zip(tile, self.reach[1], strict=True))
        spread = self.spread(tile)
        plane = _spaced((w + spread.gap) * h, spread.plane)
        return self.layer.in_channels * _spaced(plane * d, spread.channel)

    def steps(self, tile: Box) -> int:
        """Steps of a warp that would take all of a tile: ``Walks`` of ``cuh/correlation.cuh``."""
        d, h, w = tile
        return min(-(-d * h * n // SLOTS) * (-(-w // n) + self.shifts.more) for n in PIECES)

    # --- sizes ------------------------------------------------------------------------------------------
    def parts(self, sizes: Extents, extents: Extents) -> Parts:
        """Cut x of these sizes for an output of these ``extents``. Raises Unsupported where parts are too many."""
        return _parts(self, sizes, extents)

    def work(self, batch: int, sizes: Extents, extents: Extents) -> Work:
        """For a batch of such x. Raises Unsupported as :meth:`parts`."""
        parts, which = self.parts(sizes, extents), batch * self.layer.groups
        tiles = [(_count(p.size, p.tile), p.tile) for p in parts.all]
        merging = which * -(-self.layer.out_channels // CHANNELS)
        return Work(
            products=which * parts.jobs * self.entries,
            sums=merging * parts.several * self.entries,
            blocks=max(which * parts.blocks, merging),
            macs=which * sum(c * self.steps(tile) for c, tile in tiles) * self.shifts.results * PRODUCTS * SLOTS,
            elements=which * sum(c * self.elements(tile) for c, tile in tiles),
        )

    def cuts(self, dim: int, size: int, extent: int) -> tuple[int, ...]:
        """Where begins and ends what some class reads of x by one of its taps."""
        found = set()
        for at, delta in {(r.at[dim], t.delta[dim]) for r in self.layer.residues for t in r.taps}:
            count = -(-(extent - at) // self.layer.stride[dim])
            first, last = max(delta, 0), min(count + delta, size)
            found |= {first, last} if first < last else set()
        return tuple(sorted(found)) or (0, size)

    def tile(self, box: Box) -> Box:
        """The positions of a tile of a part of these sizes: those that take the least time."""
        choices = ([*{min(-(-b // n), LONGEST) for n in (*range(1, 9), *(2**k for k in range(4, 12)))}] for b in box)
        fit = (tile for tile in itertools.product(*choices) if self.room(tile) <= TILE_ELEMENTS)
        return min(fit, key=lambda tile: (_count(box, tile) * self.cycles(tile), tile))

    def cycles(self, tile: Box) -> float:
        """Of a multiprocessor."""
        return TILE_CYCLES + self.elements(tile) * ELEMENT_CYCLES + self.steps(tile) * self.shifts.cycles

    def alone(self, box: Box) -> bool:
        """A warp makes the products of such a part."""
        return self.elements(box) <= ALONE and self.steps(box) <= FEW_STEPS

    # --- the source -------------------------------------------------------------------------------------
    def source(self) -> str:
        """Entries ``correlate`` and ``moments``: a function of what is compiled in alone."""
        layer, shifts, (low, span) = self.layer, self.shifts, self.reach
        constants = {
            "in_channels": layer.in_channels,
            "joined": 1,
            "groups": layer.groups,
            "volume": layer.volume,
            "classes": len(layer.residues),
            "copies": shifts.copies,
            "unit": shifts.unit,
            "rows": len(shifts.rows),
            "windows": shifts.windows,
            "ones": shifts.find((0, 0, 0))[2],
            **{f"span_{dim}": s for dim, s in zip("dhw", span, strict=True)},
            **{f"low_{dim}": s for dim, s in zip("dhw", low, strict=True)},
            **{
                f"{name}_{dim}": value
                for name in ("stride", "kernel", "padding", "dilation")
                for dim, value in zip("dhw", getattr(layer, name), strict=True)
            },
        }
        blocks = 5 if shifts.results <= 2 else 3 if shifts.results <= 6 else 2  # that registers are there for
        values = "\n".join(f"  static constexpr int {k} = {v};" for k, v in constants.items())
        taps = [t for r in layer.residues for t in r.taps]
        begin = [0, *itertools.accumulate(len(r.taps) for r in layer.residues)]
        entry = {lag: shifts.entry(lag) for lag in self.lags}
        most = [max(abs(lag[i]) for lag in self.lags) for i in range(3)]
        around = itertools.product(*(range(-m, m + 1) for m in most))
        types = {name: TYPES[DTYPE_NAMES[getattr(self, name)]] for name in ("dtype", "output", "bias")}
        return f"""#include "correlation_moments.cuh"
__constant__ fxfuse::Offset kRows[] = {_offsets((row, 0) for row in shifts.rows)};
__constant__ int kEntries[] = {_list(entry.get((d, h, w), 0) for d, h, w in around)};
__constant__ fxfuse::Offset kTaps[] = {_offsets((t.delta, t.index) for t in taps)};
__constant__ int kTapBegin[] = {_list(begin)};
__constant__ fxfuse::Offset kResidues[] = {_offsets((r.at, 0) for r in layer.residues)};
struct Problem {{
{values}
  static FXFUSE_INLINE fxfuse::Offset row(int i) {{ return kRows[i]; }}
  static FXFUSE_INLINE int entry(const fxfuse::Offset& lag) {{
    const int d = lag.d + {most[0]}, h = lag.h + {most[1]}, w = lag.w + {most[2]};
    return kEntries[(d * {2 * most[1] + 1} + h) * {2 * most[2] + 1} + w];
  }}
  static FXFUSE_INLINE fxfuse::Offset tap(int i) {{ return kTaps[i]; }}
  static FXFUSE_INLINE int tap_begin(int i) {{ return kTapBegin[i]; }}
  static FXFUSE_INLINE fxfuse::Offset residue(int i) {{ return kResidues[i]; }}
}};
extern "C" __global__ void __launch_bounds__(fxfuse::kCorrelationThreads, {blocks})
correlate(const {types["dtype"]}* x, const __grid_constant__ fxfuse::Strides stride, fxfuse::Size sizes,
          const __grid_constant__ fxfuse::Parts parts, double* products) {{
  fxfuse::begin_dependent();
  fxfuse::correlate<Problem>(x, stride, sizes, parts, products);
}}
extern "C" __global__ void __launch_bounds__(fxfuse::kMomentsThreads, 1)
moments(const {types["dtype"]}* x, const {types["dtype"]}* weight, const {types["bias"]}* bias,
        const __grid_constant__ fxfuse::DirectGeometry s, const __grid_constant__ fxfuse::Parts parts, fxfuse::Size out,
        int out_channels, const double* products, double* sums, fxfuse::Moments* moments) {{
  fxfuse::begin_dependent();
  fxfuse::moments_of_products<Problem, {types["output"]}>(x, weight, bias, s, parts, out, out_channels, products, sums,
                                                       moments);
}}
"""


@functools.lru_cache(maxsize=1024)
def _parts(made: Correlation, sizes: Extents, extents: Extents) -> Parts:
    cuts = tuple(made.cuts(i, sizes[i], extents[i]) for i in range(3))
    count = math.prod(len(c) - 1 for c in cuts)
    if count > MOST_PARTS or max(map(len, cuts)) > MOST_CUTS:
        raise Unsupported(f"borders cut x into {count} parts (at most {MOST_PARTS}, {MOST_CUTS - 1} per dim)")
    d, h, w = (range(len(c) - 1) for c in cuts)
    boxes = [(at, _size(cuts, at)) for at in itertools.product(d, h, w)]
    tile_of = {size: size if made.alone(size) else made.tile(size) for size in {size for _, size in boxes}}
    if any(_count(size, tile) >= MOST_TILES for size, tile in tile_of.items()):
        raise Unsupported(f"x of {'x'.join(map(str, sizes))} has more tiles than {MOST_TILES}")
    each = -(-sum(_count(size, tile_of[size]) for _, size in boxes if not made.alone(size)) // ENOUGH_JOBS) or 1
    found = [
        Part(at, size, tile, -(-_count(size, tile) // each), made.alone(size), made.spread(tile))
        for at, size in boxes
        for tile in [tile_of[size]]
    ]
    return Parts(cuts, tuple(sorted(found, key=lambda p: (p.alone, -p.jobs))))


def _size(cuts: Sequence[Sequence[int]], at: Box) -> Box:
    d, h, w = (cut[i + 1] - cut[i] for cut, i in zip(cuts, at, strict=True))
    return d, h, w


def _lags(residue: Residue) -> Iterator[Box]:
    for a, b in itertools.product(residue.taps, repeat=2):
        d, h, w = (y - x for x, y in zip(a.delta, b.delta, strict=True))
        if (d, h, w) >= (0, 0, 0):
            yield d, h, w


def _count(box: Sequence[int], tile: Sequence[int]) -> int:
    return math.prod(-(-b // t) for b, t in zip(box, tile, strict=True))


def _spaced(least: int, residue: int) -> int:
    """The first number from ``least`` on of this residue."""
    return least + (residue - least) % BANKS


def _digits(*values: int) -> int:
    return sum(v << 5 * i for i, v in enumerate(values))


def _filled(values: Sequence[int], count: int) -> list[int]:
    return [*values, *[0] * (count - len(values))]


def _list(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def _offsets(values: Iterable[tuple[Box, int]]) -> str:
    return _list(_list([*at, index]) for at, index in values)
