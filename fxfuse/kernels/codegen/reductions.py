"""What one kernel reduces: windows of a pool, all channels, or rows of last elements. Pure: from instructions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.emit_persistent import Persistent
from fxfuse.kernels.codegen.folds import combine_of, dims_of, keeps, number_of, struct_of
from fxfuse.kernels.codegen.persistent import body_of

#: elements of the windows that a thread takes at once, where those are several; and of how many planes
MOST_TOGETHER, MOST_PLANES = 32, 4


@dataclasses.dataclass(frozen=True)
class Window:
    """A pool, per spatial dim (three of them). ``combine``: "Maximum" or "Sum".

    Output o looks at ``kernel`` inputs from ``o*stride - padding`` on, ``dilation`` apart, as far as there are
    any. A sum is divided by ``divisor``; for 0 by the inputs that it has, for -1 by those that it has with
    padding. ``adaptive``: windows are ``[o*L // O, ceil((o+1)*L / O))`` instead. ``whole``: no window reaches beyond
    the inputs.
    """

    combine: str
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    divisor: int = 1
    adaptive: bool = False
    whole: bool = False

    def planes(self, layouts: tuple[str, str]) -> int:
        """How many planes a thread takes, of small windows several: their places are the same. ``layouts``: of the
        value, of the result."""
        looked_at = math.prod(self.kernel)
        if self.adaptive or layouts != ("contiguous", "contiguous") or looked_at > MOST_TOGETHER:
            return 1
        return min(MOST_TOGETHER // looked_at, MOST_PLANES)


#: channels that threads hold in all
MOST_CHANNELS = 256
#: channels that a thread holds; threads that share those of a position behind a pool
MOST_CHANNELS_EACH, MOST_SLICES = 64, 8


@dataclasses.dataclass(frozen=True)
class Fold:
    """A reduction over ``channels``: of ``combine``, as ``cuh/fold.cuh`` names it. ``number``: one that it needs.

    ``body``: instead of that, what a program makes of the channels.
    """

    combine: str
    channels: int
    number: float | None = None
    body: Persistent | None = None

    @property
    def keeps(self) -> bool:
        """Whether every channel has a result."""
        return _keeps(self)

    @property
    def op(self) -> str:
        """The struct, of ``cuh/fold.cuh`` or of the ``body``."""
        return struct_of(self.combine, self.number) if self.body is None else self.body.name

    def lanes(self, last: bool, last_made: bool) -> int:
        """Threads per position: where channels are neighbours on both sides, neighbouring threads take them."""
        each, most = (4, 32) if last and (last_made or not self.keeps) else (MOST_CHANNELS_EACH, 4)
        return min(most, 1 << (-(-self.channels // each) - 1).bit_length())

    @property
    def once(self) -> bool:
        """Whether it asks for every channel once, and makes one value of them."""
        return self.combine in ("Sum", "Mean", "Maximum", "Minimum")

    def slices(self, window: Window) -> int:
        """Threads per position of what a pool makes, which is reduced at once."""
        each = -(-self.channels // window.planes(("contiguous", "contiguous")))
        return min(MOST_SLICES, 1 << (each - 1).bit_length())


#: reductions of rows that need not be held: they take one more element at a time
_STREAMED = ("Sum", "Mean", "Maximum", "Minimum", "LogSumExp", "Softmax", "LogSoftmax")

#: elements of a row from which on a block takes it, and not a part of a warp; or a block of more threads; rows that are
#: enough for blocks
LONG_ROW, VERY_LONG_ROW, ENOUGH_ROWS = 1024, 2**16, 128
#: threads of a block that takes a row, elements of which each may hold so many
BLOCK_LANES, MOST_HELD = 256, 64
#: elements of a row whose results a block also pools, in shared memory
MOST_POOLED = 512
#: neighbours of a row that a thread of a convolution's epilogue reads at once, elements of it that it holds about, and
#: at most; threads that may share a row
ALONG_COUNT, ALONG_EACH, MOST_ALONG_EACH, ALONG_LANES = 4, 8, 16, (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A reduction over the last dims of a contiguous value, of ``combine``.

    ``length``: elements that are reduced, one behind the other: a row. ``line``: it is all of the last dim alone.
    ``number``, ``body``: as of a Fold.
    """

    combine: str
    length: int
    line: bool = False
    number: float | None = None
    body: Persistent | None = None

    @property
    def keeps(self) -> bool:
        """Whether every element has a result."""
        return _keeps(self)

    @property
    def op(self) -> str:
        """The struct, as of a Fold; or, of a row that is not ``held``, of ``cuh/map_rows.cuh``."""
        if self.body is not None:
            return self.body.name
        return struct_of(self.combine, self.number) if self.held else f"fxfuse::Row{self.combine}"

    @property
    def long(self) -> bool:
        """Whether a block takes a row, and not a part of a warp."""
        return self.length >= LONG_ROW

    @property
    def held(self) -> bool:
        """Whether a row lies in registers of its threads, and is read once."""
        return self.length <= BLOCK_LANES * MOST_HELD

    def poolable(self, window: Window) -> bool:
        """Whether a kernel pools what it makes of rows of w as well: of short ones, and of windows that are whole."""
        return self.keeps and self.line and self.length <= MOST_POOLED and window.whole

    @property
    def shares(self) -> tuple[int, int, int] | None:
        """In a convolution's epilogue the threads that share a row, the neighbours that each takes at once, and how
        often; None of what is no row of w, or too long, or leaves one value.
        """
        count = math.gcd(ALONG_COUNT, self.length)
        ways = [(lanes, count, -(-self.length // (lanes * count))) for lanes in ALONG_LANES]
        ways = [way for way in ways if way[1] * way[2] <= MOST_ALONG_EACH]
        if not (self.keeps and self.line and ways):
            return None
        return min(ways, key=lambda way: (math.prod(way), abs(way[1] * way[2] - ALONG_EACH)))

    @property
    def threads(self) -> int:
        """Of a block: few blocks go through rows that are very long, and the L2 cache keeps them for the way back."""
        return 4 * BLOCK_LANES if self.length >= VERY_LONG_ROW else BLOCK_LANES

    def lanes(self, count: int) -> int:
        """Threads per row, each of which reads ``count`` elements at once."""
        return self.threads if self.long else min(32, _power_from(-(-self.length // count)))

    def each(self, count: int) -> int:
        """How often a thread reads, of a row that is held: a power of two, which more lengths than one have."""
        return _power_from(-(-self.length // (count * self.lanes(count))))


def fold_of(reduction: Instr, kind: TensorType) -> Fold | None:
    """The reduction of a (N, C, *spatial) value over its channels; None for others."""
    combine, channels = combine_of(reduction, kind), kind.shape[1]
    if combine is None or dims_of(reduction, kind) != (1,) or not channels:
        return None
    return Fold(combine, channels, number_of(reduction, kind.dtype), body_of(reduction))


def inner_of(reduction: Instr, kind: TensorType) -> tuple[Fold, TensorType] | None:
    """The reduction of a contiguous value over dims that follow each other, between others, as one over channels of
    the same elements in three dims, and those; None for others."""
    dims, combine, shape = dims_of(reduction, kind), combine_of(reduction, kind), [s or 0 for s in kind.shape]
    if combine is None or not dims or dims != tuple(range(dims[0], dims[-1] + 1)) or not math.prod(shape):
        return None
    first, last = dims[0], dims[-1] + 1
    if first == 0 or last == len(shape):
        return None
    sizes = tuple(math.prod(part) for part in (shape[:first], shape[first:last], shape[last:]))
    return Fold(combine, sizes[1], number_of(reduction, kind.dtype), body_of(reduction)), TensorType(kind.dtype, sizes)


def _keeps(of: Fold | Rows) -> bool:
    return keeps(of.combine) if of.body is None else of.body.keeps


def _power_from(value: int) -> int:
    """The first power of two that is not less."""
    return 1 << (value - 1).bit_length()


def rows_of(reduction: Instr, kind: TensorType) -> Rows | None:
    """The reduction of a value over its last dims, with rows enough for a GPU; None for others."""
    combine = combine_of(reduction, kind)
    if combine is None:
        return None
    dims, rank, shape = dims_of(reduction, kind), len(kind.shape), [s or 0 for s in kind.shape]
    if dims != tuple(range(rank - len(dims), rank)) or not math.prod(shape):
        return None
    length = math.prod(shape[rank - len(dims) :])
    rows = Rows(combine, length, length == shape[-1], number_of(reduction, kind.dtype), body_of(reduction))
    enough = math.prod(shape) // length >= ENOUGH_ROWS or not rows.long
    return rows if enough and (rows.held or combine in _STREAMED) else None


def holds_rows(kind: TensorType, dims: tuple[int, ...]) -> bool:
    """Whether threads hold in registers what is reduced over ``dims`` of a value (N, C, *spatial), not all of space."""
    rank, shape = len(kind.shape), [s or 0 for s in kind.shape]
    if not 3 <= rank <= 5 or not math.prod(shape) or dims != tuple(range(dims[0], dims[-1] + 1)) or dims[0] == 0:
        return False
    length = math.prod(shape[d] for d in dims)
    if dims[-1] < rank - 1:
        return length <= MOST_CHANNELS
    enough = math.prod(shape) // length >= ENOUGH_ROWS or length < LONG_ROW
    return dims[0] > 2 and enough and length <= BLOCK_LANES * MOST_HELD


def window_of(pool: Instr, rank: int) -> Window | None:
    """The pool over ``rank`` spatial dims as a window; None for one that kernels do not make."""
    attributes = dict(pool.attributes)

    def three(values: Collection[int], fill: int) -> tuple[int, int, int]:
        d, h, w = (*[fill] * (3 - len(values)), *values)
        return d, h, w

    one, zero = (1, 1, 1), (0, 0, 0)
    combine = "Maximum" if "max" in pool.op else "Sum"
    if pool.op.startswith("adaptive"):
        if len(attributes["size"]) != rank:
            return None  # no dim of samples
        return Window(combine, one, one, zero, one, 0, adaptive=True)
    kernel, stride, padding = (attributes[k] for k in ("kernel", "stride", "padding"))
    if len(kernel) != rank:
        return None
    dilation = attributes.get("dilation", (1,) * rank)
    divisor, whole = 1, not any(padding) and not attributes["ceil_mode"]
    if combine == "Sum":
        divisor = attributes["divisor_override"] or (-1 if attributes["count_include_pad"] else 0)
        if rank == 1 and attributes["divisor_override"]:
            return None
        if whole and divisor <= 0:
            divisor = math.prod(kernel)
    dims = three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1)
    return Window(combine, *dims, divisor, whole=whole)
