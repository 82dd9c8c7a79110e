"""Statistics of a convolution's output without that output: what is compiled, for a few input channels. Pure.

Over a residue class, ``y = b + w . patch``: the sum of ``(y - b)^2`` is ``w^T M w`` with M the sums of products of
every two elements of a patch. Such a sum depends on the distance of the two, the ``lag``, but for where it begins and
ends: a class has so many positions. So x is cut into parts, boxes that no such border runs through;
``cuh/correlation.cuh`` adds up the products of all lags once per part, in float64 on the matrix units. Those of a class
are sums over the parts that it has. Float64 loses nothing to a mean far from zero, nor to outputs much smaller than the
terms that they are made of. Statistics that may be of outputs that are not finite are made of these.
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
from fxfuse.kernels.convolution import Layer, Unsupported
from fxfuse.kernels.emit import TYPES
from fxfuse.kernels.geometry import Residue
from fxfuse.kernels.tiles import Extents

#: columns of a warp's products: input channels at lags; columns of M
MOST_COLUMNS, MOST_PATCH = 192, 64
#: columns of the other factor: input channels, and ones
FACTORS = 8
#: elements of x and positions in a block's shared memory; sizes of a tile
TILE_ELEMENTS, TILE_POSITIONS, LONGEST = 5888, 1024, 256
#: parts of x, and cuts per dim
MOST_PARTS, MOST_CUTS = 128, 9
#: blocks per sample and group at most; and from which number on they take several tiles
MOST_JOBS, ENOUGH_JOBS = 512, 256
#: what a tile costs beside its elements, in elements
TILE_COST = 512

Box = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A sample of x, cut for all classes. ``cuts``: per dim, where parts begin, and where the last one ends.

    ``tiles``, ``jobs``: per part, w varying fastest, the positions of a tile, and how many blocks take its tiles.
    """

    cuts: tuple[tuple[int, ...], ...]
    tiles: tuple[Box, ...]
    jobs: tuple[int, ...]

    @property
    def boxes(self) -> list[Box]:
        """The sizes of the parts."""
        return _boxes(self.cuts)

    def packed(self) -> bytes:
        """``Parts`` of ``cuh/correlation.cuh``."""
        begin = [0, *itertools.accumulate(self.jobs)]
        tiles = [d | h << 11 | w << 22 for d, h, w in self.tiles]
        numbers = [begin[-1], *(len(c) - 1 for c in self.cuts)]
        for cut in self.cuts:
            numbers += _filled(cut, MOST_CUTS)
        numbers += [*_filled(begin, MOST_PARTS + 1), *_filled(tiles, MOST_PARTS)]
        return struct.pack(f"={len(numbers)}i", *numbers)


@dataclasses.dataclass(frozen=True)
class Work:
    """What the kernels do for some sizes.

    ``products``, ``sums``: numbers in float64 that they keep, of jobs, and of classes and channels. ``blocks``: of the
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

    @property
    def columns(self) -> int:
        return self.layer.in_channels * len(self.lags)

    @property
    def row_tiles(self) -> int:
        """Matrix instructions per four positions."""
        return -(-self.columns // 16)

    @property
    def patch(self) -> int:
        """Columns of the largest M."""
        return self.layer.in_channels * max(len(r.taps) for r in self.layer.residues)

    @property
    def entries(self) -> int:
        """Sums of a part: of all products, and of x."""
        return self.columns * (self.layer.in_channels + 1)

    @functools.cached_property
    def reach(self) -> tuple[Box, Box]:
        """Per dim, how far lags reach back, and by what a tile of x is larger than its positions."""
        low, high = (tuple(pick(lag[i] for lag in self.lags) for i in range(3)) for pick in (min, max))
        return tuple(-a for a in low), tuple(b - a for a, b in zip(low, high, strict=True))  # type: ignore[return-value]

    def elements(self, tile: Box) -> int:
        """Of x, that a tile needs."""
        return self.layer.in_channels * math.prod(t + s for t, s in zip(tile, self.reach[1], strict=True))

    def room(self, tile: Box) -> int:
        """Of a tile in shared memory: ``Pitch`` of ``cuh/correlation.cuh``."""
        d, h, w = (t + s for t, s in zip(tile, self.reach[1], strict=True))
        row = w + (6 - w) % 16
        plane = row * h + (2 - row * h) % 16
        return self.layer.in_channels * (plane * d + (4 - plane * d) % 16)

    # --- sizes ------------------------------------------------------------------------------------------
    def parts(self, sizes: Extents, extents: Extents) -> Parts:
        """Cut x of these sizes for an output of these ``extents``. Raises Unsupported where parts are too many."""
        return _parts(self, sizes, extents)

    def work(self, batch: int, sizes: Extents, extents: Extents) -> Work:
        """For a batch of such x. Raises Unsupported as :meth:`parts`."""
        layer, parts, which = self.layer, self.parts(sizes, extents), batch * self.layer.groups
        tiles = [_count(box, tile) for box, tile in zip(parts.boxes, parts.tiles, strict=True)]
        jobs, classes = sum(parts.jobs), len(layer.residues)
        return Work(
            products=which * jobs * self.entries,
            sums=which * classes * layer.out_channels * 2,
            blocks=which * max(jobs, classes, layer.out_channels),
            macs=which * sum(map(math.prod, parts.boxes)) * self.row_tiles * 16 * FACTORS,
            elements=which * sum(c * self.elements(tile) for c, tile in zip(tiles, parts.tiles, strict=True)),
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
        """The positions of a tile of a part of these sizes: those that read the least of x."""
        choices = ([*{min(b, LONGEST), *(2**k for k in range(8) if 2**k < b)}] for b in box)
        fit = (
            tile
            for tile in itertools.product(*choices)
            if math.prod(tile) <= TILE_POSITIONS and self.room(tile) <= TILE_ELEMENTS
        )
        return min(fit, key=lambda tile: (_count(box, tile) * (self.elements(tile) + TILE_COST), tile))

    # --- the source -------------------------------------------------------------------------------------
    def source(self) -> str:
        """Entries ``correlate``, ``square`` and ``moments``: a function of what is compiled in alone."""
        layer, (low, span) = self.layer, self.reach
        constants = {
            "in_channels": layer.in_channels,
            "joined": 1,
            "groups": layer.groups,
            "volume": layer.volume,
            "classes": len(layer.residues),
            "lags": len(self.lags),
            "columns": self.columns,
            "entries": self.entries,
            **{f"span_{dim}": s for dim, s in zip("dhw", span, strict=True)},
            **{f"low_{dim}": s for dim, s in zip("dhw", low, strict=True)},
            **{
                f"{name}_{dim}": value
                for name in ("stride", "kernel", "padding", "dilation")
                for dim, value in zip("dhw", getattr(layer, name), strict=True)
            },
        }
        blocks = 3 if self.row_tiles <= 3 else 2 if self.row_tiles <= 6 else 1  # that registers are there for
        values = "\n".join(f"  static constexpr int {k} = {v};" for k, v in constants.items())
        taps = [t for r in layer.residues for t in r.taps]
        begin = [0, *itertools.accumulate(len(r.taps) for r in layer.residues)]
        index = {lag: i for i, lag in enumerate(self.lags)}
        around = itertools.product(*(range(-a, s - a + 1) for a, s in zip(low, span, strict=True)))
        types = {name: TYPES[DTYPE_NAMES[getattr(self, name)]] for name in ("dtype", "output", "bias")}
        return f"""#include "correlation.cuh"
__constant__ fxfuse::Offset kLags[] = {_offsets((lag, 0) for lag in self.lags)};
__constant__ int kLagIndex[] = {_list(index.get((d, h, w), 0) for d, h, w in around)};
__constant__ fxfuse::Offset kTaps[] = {_offsets((t.delta, t.index) for t in taps)};
__constant__ int kTapBegin[] = {_list(begin)};
__constant__ fxfuse::Offset kResidues[] = {_offsets((r.at, 0) for r in layer.residues)};
struct Problem {{
{values}
  static FXFUSE_INLINE fxfuse::Offset lag(int i) {{ return kLags[i]; }}
  static FXFUSE_INLINE int lag_index(const fxfuse::Offset& lag) {{
    return kLagIndex[((lag.d + low_d) * (span_h + 1) + lag.h + low_h) * (span_w + 1) + lag.w + low_w];
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
extern "C" __global__ void __launch_bounds__(fxfuse::kCorrelationThreads, 1)
square(const {types["dtype"]}* weight, const __grid_constant__ fxfuse::Parts parts, fxfuse::Size sizes,
       fxfuse::Size out, int out_channels, const double* products, double2* sums) {{
  fxfuse::begin_dependent();
  fxfuse::square<Problem>(weight, parts, sizes, out, out_channels, products, sums);
}}
extern "C" __global__ void __launch_bounds__(fxfuse::kMomentsThreads)
moments(const {types["dtype"]}* x, const {types["dtype"]}* weight, const {types["bias"]}* bias,
        const __grid_constant__ fxfuse::DirectGeometry s, fxfuse::Size out, int out_channels, const double2* sums,
        fxfuse::Moments* moments) {{
  fxfuse::begin_dependent();
  fxfuse::moments_of_sums<Problem, {types["output"]}>(x, weight, bias, s, out, out_channels, sums, moments);
}}
"""


@functools.lru_cache(maxsize=1024)
def _parts(made: Correlation, sizes: Extents, extents: Extents) -> Parts:
    cuts = tuple(made.cuts(i, sizes[i], extents[i]) for i in range(3))
    count = math.prod(len(c) - 1 for c in cuts)
    if count > MOST_PARTS or max(map(len, cuts)) > MOST_CUTS:
        raise Unsupported(f"borders cut x into {count} parts (at most {MOST_PARTS}, {MOST_CUTS - 1} per dim)")
    boxes = _boxes(cuts)
    tile_of = {box: made.tile(box) for box in {*boxes}}
    counts = [_count(box, tile_of[box]) for box in boxes]
    each = -(-sum(counts) // ENOUGH_JOBS)
    return Parts(cuts, tuple(tile_of[box] for box in boxes), tuple(-(-c // each) for c in counts))


def _boxes(cuts: Sequence[Sequence[int]]) -> list[Box]:

    d, h, w = ([b - a for a, b in itertools.pairwise(c)] for c in cuts)
    return [*itertools.product(d, h, w)]


def _lags(residue: Residue) -> Iterator[Box]:
    for a, b in itertools.product(residue.taps, repeat=2):
        d, h, w = (y - x for x, y in zip(a.delta, b.delta, strict=True))
        if (d, h, w) >= (0, 0, 0):
            yield d, h, w


def _count(box: Sequence[int], tile: Sequence[int]) -> int:
    return math.prod(-(-b // t) for b, t in zip(box, tile, strict=True))


def _filled(values: Sequence[int], count: int) -> list[int]:
    return [*values, *[0] * (count - len(values))]


def _list(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"


def _offsets(values: Iterable[tuple[Box, int]]) -> str:
    return _list(_list([*at, index]) for at, index in values)
