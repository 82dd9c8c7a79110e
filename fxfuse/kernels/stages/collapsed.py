"""The first kernel of a collapsed mean, sums of the input over boxes. Pure: to a printable step, or None for torch.

The mean of a transposed convolution needs no convolution (:mod:`fxfuse.patterns.means`): ``tap_sums`` reads the input
once, ``contract_taps`` multiplies what little is left (:mod:`fxfuse.kernels.stages.contraction`).

Boxes along one dim share most of their elements. Their borders cut the dim into segments, and those of several dims
cut the tensor into cells: each element is added to one cell, and a box is the sum of its cells.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.chains import STORED, dense, elements, layout_of
from fxfuse.kernels.cost import MACHINES

#: as in ``cuh/tap_sums.cuh``
WARPS, LOADS = 8, 8
MOST_SEGMENTS, MOST_BOXES, MOST_SLOTS = 24, 16, 64
#: bytes that a thread reads at once
VECTOR_BYTES = 16
#: elements of a tensor, which a kernel counts in 32 bits
MOST_ELEMENTS = 2**31 - 1
#: bytes of shared memory for the cells of a block
MOST_SHARED = 48 * 1024
#: blocks that keep a GPU busy; elements of a slot from which on it is worth a block of its own
ENOUGH_BLOCKS, LEAST_SLOT = 1024, 8192
#: seconds of a block of sums, of which a GPU runs so many at a time; and what torch takes beyond reading the value
BLOCK_SECONDS, RESIDENT, SUMS_BY_TORCH = 1.5e-6, 396, 2e-5

Box = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Summed:
    """A dim that is summed, with strides in elements: of the value, and of its boxes in the result.

    Segment i is ``[bounds[i], bounds[i + 1])``; box i is of segments ``[firsts[i], lasts[i])``.
    """

    stride: int
    out_stride: int
    bounds: tuple[int, ...]
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]

    @property
    def segments(self) -> int:
        return len(self.bounds) - 1


@dataclasses.dataclass(frozen=True)
class Sums:
    """``tap_sums`` of ``value``, which is dense: one kernel, and one more that adds slots where there are several.

    ``rows``: sizes of up to two dims that are kept, with their strides in the value and in the result. A block sums a
    slot of ``outer``, which are its segments, and all of ``b``, ``c`` and the inner dim, which has ``size``
    elements one behind the other: the result ``keeps`` it, ``inner_out`` apart, or it is summed as ``inner`` says.
    ``count`` elements are read at once; ``2**across`` threads take neighbours, ``2**team`` warps a row. ``units``:
    how many of their reads are a line, if it need not be cut. ``slot``: results of each slot. The result is dense: as
    the value, where it has some of its positions, or else contiguous.
    """

    instr: Instr
    value: str
    given: TensorType
    layout: str
    stored: str
    kind: TensorType
    rows: tuple[int, int]
    strides: tuple[int, int]
    out_strides: tuple[int, int]
    outer: Summed
    b: Summed
    c: Summed
    inner: Summed
    size: int
    keeps: bool
    inner_out: int
    count: int
    across: int
    team: int
    units: int
    slot: int

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.value,)

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.stored,)

    @property
    def body(self) -> tuple[Instr, ...]:
        return (self.instr,)

    @property
    def made_layout(self) -> str:
        return _made_layout(self.instr, self.given, self.layout)

    @property
    def slots(self) -> int:
        return self.outer.segments

    @property
    def launches(self) -> int:
        return 1 if self.slots == 1 else 2

    @property
    def columns(self) -> int:
        """Elements of a line that a warp reads at once."""
        return self.count << self.across

    @property
    def cells(self) -> int:
        """Numbers that a row's block, or its tile of an inner dim that is kept, holds."""
        return self.b.segments * self.c.segments * (self.columns if self.keeps else self.inner.segments)

    @property
    def tiles(self) -> int:
        return -(-self.size // self.columns) if self.keeps else 1

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.rows) // (WARPS >> self.team)) * self.tiles * self.slots

    def __str__(self) -> str:
        boxes = math.prod(len(set(b)) for b in dict(self.instr.attributes)["boxes"])
        over = "1 box" if boxes == 1 else f"{boxes} boxes"
        apart = "" if self.slots == 1 else f", in {self.slots} slots that a second one adds"
        return f"one kernel: tap_sums of {self.value} over {over}{apart} -> {self.kind}"


# --- sums -----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Axis:
    """A dim, or neighbouring ones as one. ``boxes``: None where it is kept. ``behind``: results behind it."""

    size: int
    stride: int
    out_stride: int
    boxes: tuple[Box, ...] | None

    def over(self, inner: _Axis) -> _Axis | None:
        """This axis and ``inner``, the next one in memory, as one; None where they are two."""
        if self.stride != inner.size * inner.stride:
            return None
        if self.boxes is None and inner.boxes is None and self.out_stride == inner.size * inner.out_stride:
            return dataclasses.replace(inner, size=self.size * inner.size)
        if self.boxes is not None and inner.boxes == ((0, inner.size),):
            boxes = tuple((low * inner.size, high * inner.size) for low, high in self.boxes)
            return dataclasses.replace(self, size=self.size * inner.size, stride=inner.stride, boxes=boxes)
        return None


def sums_of(instr: Instr, value: TensorType, strides: Sequence[int], kind: TensorType) -> Sums | None:
    """The step for ``tap_sums`` of a ``value`` with these strides, whose result is of type ``kind``; None for torch."""
    layout = layout_of(value.shape, strides)
    if layout is None or value.dtype not in STORED or not 0 < elements(value) <= MOST_ELEMENTS:
        return None
    if not 0 < elements(kind) <= MOST_ELEMENTS:
        return None
    attributes = dict(instr.attributes)
    boxes = {d: tuple(b) for d, b in zip(attributes["dims"], attributes["boxes"], strict=True)}
    if any(len(b) > MOST_BOXES for b in boxes.values()):
        return None
    axes = _axes(value, kind, (layout, _made_layout(instr, value, layout)), boxes)
    last = axes.pop()
    kept, summed = [a for a in axes if a.boxes is None], [a for a in axes if a.boxes is not None]
    if len(kept) > 2 or len(summed) > 3:
        return None
    found = _Drawing(instr, value, layout, kind, kept, summed, last)
    made = next((made for made in found.ways() if made is not None), None)
    return made if made is not None and _worth_sums(made) else None


def _worth_sums(made: Sums) -> bool:
    """Whether the blocks have enough to do: many short rows are a matter of how many start in a second."""
    read = elements(made.given) * made.given.dtype.itemsize / MACHINES["cuda"].bandwidth
    return made.blocks / RESIDENT * BLOCK_SECONDS <= read + SUMS_BY_TORCH


def _made_layout(instr: Instr, value: TensorType, layout: str) -> str:
    return layout if len(dict(instr.attributes)["dims"]) < len(value.shape) - 2 else "contiguous"


def _axes(
    value: TensorType, kind: TensorType, layouts: tuple[str, str], boxes: dict[int, tuple[Box, ...]]
) -> list[_Axis]:
    """The axes of a dense value in the order in which they lie in memory, the slowest first."""
    sizes, results = ([s or 0 for s in k.shape] for k in (value, kind))
    strides, out_strides = dense(sizes, layouts[0]), dense(results, layouts[1])
    order = [*range(len(sizes))] if layouts[0] == "contiguous" else [0, *range(2, len(sizes)), 1]
    found: list[_Axis] = []
    for d in reversed(order):
        ranges = None if d not in boxes else boxes[d] if results[d] > 1 else boxes[d][:1]
        if sizes[d] == 1 and (ranges is None or len(ranges) == 1):
            continue
        axis = _Axis(sizes[d], strides[d], out_strides[d], ranges)
        merged = axis.over(found[0]) if found else None
        found = [axis, *found] if merged is None else [merged, *found[1:]]
    return found or [_Axis(1, 1, 1, ((0, 1),))]


def _segments(boxes: Sequence[Box], stride: int, out_stride: int) -> Summed:
    bounds = sorted({border for box in boxes for border in box})
    at = {border: i for i, border in enumerate(bounds)}
    return Summed(stride, out_stride, tuple(bounds), *zip(*((at[low], at[high]) for low, high in boxes), strict=True))


_NONE = Summed(0, 0, (0, 1), (0,), (1,))


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    first, second = (*[fill] * (2 - len(values)), *values)
    return first, second


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Makes a :class:`Sums` of axes; ``last`` is the inner one."""

    instr: Instr
    value: TensorType
    layout: str
    kind: TensorType
    kept: list[_Axis]
    summed: list[_Axis]
    last: _Axis

    def ways(self) -> list[Sums | None]:
        """The best first: one pass in blocks enough, else in slots of the slowest dim that is summed."""
        whole = self.made(None, self.summed, self.last, 1) if len(self.summed) < 3 else None
        blocks = ENOUGH_BLOCKS if whole is None else whole.blocks
        # as many slots as are worth it
        most = min(-(-ENOUGH_BLOCKS // max(blocks, 1)), elements(self.value) // (blocks * LEAST_SLOT), MOST_SLOTS)
        sliced = None
        if self.summed:
            sliced = self.made(self.summed[0], self.summed[1:], self.last, max(1, most))
        elif self.last.boxes == ((0, self.last.size),) and most > 1:
            sliced = self._divided(most)
        return [sliced, whole] if most > 1 or whole is None else [whole, sliced]

    def _divided(self, most: int) -> Sums | None:
        """The inner dim, which is one box, as two."""
        count = self._count(self.last.size)
        parts = next((p for p in range(most, 1, -1) if self.last.size % (p * count) == 0), 1)
        if parts == 1:
            return None
        size = self.last.size // parts
        inner = dataclasses.replace(self.last, size=size, boxes=((0, size),))
        outer = _Axis(parts, size, elements(self.kind), ((0, parts),))
        return self.made(outer, [], inner, parts)

    def _count(self, size: int) -> int:
        """Elements that are read at once, of a line of ``size``."""
        return math.gcd(size, VECTOR_BYTES // self.value.dtype.itemsize)

    def made(self, outer: _Axis | None, summed: Sequence[_Axis], last: _Axis, slots: int) -> Sums | None:
        cut = [_NONE] * (2 - len(summed)) + [_segments(a.boxes or (), a.stride, a.out_stride) for a in summed]
        keeps, count = last.boxes is None, self._count(last.size)
        inner = _NONE if last.boxes is None else _segments(last.boxes, 1, last.out_stride)
        first = _NONE if outer is None else _segments(outer.boxes or (), outer.stride, outer.out_stride)
        if max(s.segments for s in (*cut, inner, first)) > MOST_SEGMENTS:
            return None
        first = _in_slots(first, slots)
        if first.segments > MOST_SLOTS:
            return None
        low, high = (0, last.size) if keeps else (inner.bounds[0] // count * count, inner.bounds[-1])
        reads = -(-(high - low) // count)
        across = min(5, (reads - 1).bit_length())
        while keeps and across and _shared(cut, count << across) > MOST_SHARED:
            across -= 1
        if _shared(cut, count << across if keeps else inner.segments) > MOST_SHARED:
            return None
        whole = keeps or (inner.segments == 1 and inner.bounds[0] % count == 0 and inner.bounds[1] % count == 0)
        units = 0 if not whole else 1 if keeps else -(-reads >> across)
        made = Sums(
            instr=self.instr,
            value=next(self.instr.reads()),
            given=self.value,
            layout=self.layout,
            stored=self.instr.outs[0],
            kind=self.kind,
            rows=_two([a.size for a in self.kept], 1),
            strides=_two([a.stride for a in self.kept], 0),
            out_strides=_two([a.out_stride for a in self.kept], 0),
            outer=first,
            b=cut[0],
            c=cut[1],
            inner=inner,
            size=last.size if keeps else -(-high // count) * count,
            keeps=keeps,
            inner_out=last.out_stride,
            count=count,
            across=across,
            team=_team(first.bounds, cut, min(reads, 1 << across) if keeps else reads),
            units=units,
            slot=elements(self.kind) // len(first.firsts),
        )
        return _per_slot(made) if made.slots > 1 else made


def _in_slots(outer: Summed, slots: int) -> Summed:
    """The dim with its segments cut into about ``slots`` of about the same size."""
    step = max(1, (outer.bounds[-1] - outer.bounds[0]) // slots)
    begins, at = [outer.bounds[0]], [0]
    for low, high in itertools.pairwise(outer.bounds):
        parts = max(1, (high - low) // step)
        begins += [low + (high - low) * (i + 1) // parts for i in range(parts)]
        at.append(len(begins) - 1)
    firsts, lasts = (tuple(at[i] for i in ends) for ends in (outer.firsts, outer.lasts))
    return dataclasses.replace(outer, bounds=tuple(begins), firsts=firsts, lasts=lasts)


def _per_slot(made: Sums) -> Sums:
    """The strides of results where each slot has its own, without the outer dim's boxes."""
    boxes, own = len(made.outer.firsts), made.outer.out_stride

    def less(stride: int) -> int:
        return stride // boxes if stride > own else stride

    b, c, inner = (dataclasses.replace(s, out_stride=less(s.out_stride)) for s in (made.b, made.c, made.inner))
    rows = _two([less(s) for s in made.out_strides], 0)
    return dataclasses.replace(made, out_strides=rows, b=b, c=c, inner=inner, inner_out=less(made.inner_out))


def _shared(cut: Sequence[Summed], numbers: int) -> int:
    return math.prod(s.segments for s in cut) * numbers * WARPS * 4


def _team(slots: Sequence[int], cut: Sequence[Summed], reads: int) -> int:
    """The logarithm of the warps of a row, whose lines are of ``reads``: each has turns or cells enough."""
    deep = max(high - low for low, high in itertools.pairwise(slots))
    lines = deep * math.prod(s.bounds[-1] - s.bounds[0] for s in cut)
    turns, cells = lines * reads // (32 * LOADS), math.prod(s.segments for s in cut) // 4
    return min(WARPS.bit_length() - 1, max(turns, cells).bit_length())
