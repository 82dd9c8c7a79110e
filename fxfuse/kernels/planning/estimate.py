"""What the parts of a plan do and how long they take on an H100, by estimate: bytes, multiply-adds, seconds. Pure.

Seconds of torch's operators are a lower bound: the memory traffic at copy bandwidth, or the products at the rate of
the matrix units, whichever takes longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.chains import elements
from fxfuse.kernels.codegen.emit_persistent import Persistent
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.codegen.statistics import KINDS
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.geometry import three_of
from fxfuse.kernels.convolution.kernels import Convolution, sampled
from fxfuse.kernels.convolution.specialisation import Shared, Specialisation
from fxfuse.kernels.convolution.tiles import Extents
from fxfuse.kernels.convolution.tiling import ALONG_CYCLES, POOLED, seconds
from fxfuse.kernels.cost import MACHINES, Operator, operators
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.steps import Bundle, Gather, Launch, Map, Schedule, Step, Torch
from fxfuse.program import Program

#: bytes per second that an H100 copies
BANDWIDTH = MACHINES["cuda"].bandwidth
#: multiply-adds per second of 16-bit products, measured on an H100 (751 TFLOP/s): kernels of ours make TF32's
#: products of those, and float32's of three; and of TF32 products, as torch's operators make them
HALF_RATE, TF32_RATE = 3.75e14, MACHINES["cuda"].macs
#: multiply-adds per second of float32 without matrix units (67 TFLOP/s, as specified)
FLOAT_RATE = 3.35e13
#: multiply-adds per second of the matrix units in float64 (67 TFLOP/s, as specified), and how much of that is expected
DOUBLE_RATE, DOUBLE_PART = 3.35e13, 0.7
#: seconds that an element of a tile of x takes until it lies in shared memory, and that moments of its products take
TILED, SQUARED = 5e-13, 6e-6
#: the same where it is one of a row that a softmax goes through twice, read off one of float16 on an H100
STREAMED = 4e-12
#: seconds that one more kernel in a queue takes at least
LAUNCH = 2e-6
#: clock cycles of a multiprocessor that an accumulator costs a convolution's kernel beyond its products and its store,
#: for every addition's worth of a pointwise chain. Read off chains on an H100 (benchmarks/results/h100_ways.json): few
#: warps hide little of a latency; and around a reduction along w, of which several rows are computed at once
POINTWISE, POINTWISE_ALONG = 0.02, 0.01

Types = Mapping[str, TensorType]


@dataclasses.dataclass(frozen=True)
class Work:
    """``launches``: on the GPU, helpers included (of torch's operators one each). ``read``, ``written``: bytes,
    workspaces included. ``seconds``: an estimate; ``floor``: what traffic and products take at least.
    """

    launches: int
    read: int
    written: int
    macs: int
    seconds: float
    floor: float

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0


def works(
    given: Types,
    schedule: Schedule,
    convolution: Convolution | None,
    measuring: Convolution | Correlation | None = None,
    *,
    exact: bool,
) -> Iterator[tuple[Launch | Step, Work]]:
    """The parts of a plan in the order in which they run, and what each does.

    ``given``: the types of the inputs, of known sizes. ``convolution``, ``measuring``: the kernels of the launches of
    those names. ``exact``: torch's operators have float32's accuracy, not TF32's.
    """
    types = dict(given)
    runs = (
        (None, None, schedule.ahead),
        (schedule.measuring, measuring, schedule.between),
        (schedule.kernel, convolution, schedule.steps),
    )
    for kernel, engine, steps in runs:
        if kernel is not None and engine is not None:
            if isinstance(engine, Correlation):
                yield kernel, _correlation(kernel, engine, types)
            else:
                yield kernel, _convolution(kernel, engine.made, types)
            types[kernel.stored] = kernel.kind
        for step in steps:
            yield step, by_torch(step.program, exact) if isinstance(step, Torch) else _by_kernel(step, types)
            types.update(_made(step))


# --- the convolution ------------------------------------------------------------------------------
def _convolution(kernel: Launch, made: Specialisation, types: Types) -> Work:
    """The kernel and its helpers: x and the weights are written, and read again, as rows of 16-bit numbers.

    What a first run has written of them is only read.
    """
    layer, x = made.layer, types[kernel.x]
    scaled = kernel.dtype is torch.float32 and not made.planar
    n, _, *sizes = (s or 0 for s in x.shape)
    as_it_lies = made.planar or (kernel.in_place and not made.pads)
    width = 0 if as_it_lies else made.padded_channels * layer.groups * made.parts * 2
    rows = n * math.prod(layer.row_sizes(three_of(sizes))) * width
    packed = layer.groups * made.column_tiles * made.weight_bytes
    merged = n * layer.out_channels * layer.groups * _merged_bytes(kernel)
    stored = size_of(kernel.kind) if kernel.keeps else 0
    # where samples are scaled, a part of x is read to be measured, all of it to be made rows, and some once more
    every = sampled(n, math.prod(sizes) * (x.shape[1] or 0))
    rows_there, all_there = kernel.shares is not Shared.NOTHING, kernel.shares is Shared.ALL
    there = {*([kernel.x] if rows_there else []), *([kernel.weight, kernel.bias] if all_there else [])}
    read = bytes_of(types, (n for n in kernel.reads if n not in there)) + rows + packed
    read += size_of(x) // every if scaled and not rows_there else 0
    written = (0 if rows_there else rows) + (0 if all_there else packed) + stored + merged
    weight = layer.channels * layer.groups * layer.out_channels * made.products
    macs = n * math.prod(kernel.extents) // (math.prod(layer.stride) * math.prod(made.step)) * weight
    looks = made.watched or made.planar  # and marks samples, which are none before
    prepares = (0 if all_there or made.planar else 1 + scaled) + (looks and not rows_there)
    again = scaled and every > 1 and not rows_there
    return Work(
        launches=1 + prepares + again + ((scaled or looks) and kernel.keeps) + bool(kernel.gathers),
        read=read,
        written=written,
        macs=macs,
        seconds=launch_seconds(kernel, made, n, three_of(sizes)),
        floor=max((read + written) / BANDWIDTH, macs * made.products_of_parts / HALF_RATE),
    )


def _correlation(kernel: Launch, made: Correlation, types: Types) -> Work:
    """Two kernels. Products of every job are written, and read again."""
    n, _, *sizes = (s or 0 for s in types[kernel.x].shape)
    work = made.work(n, three_of(sizes), kernel.extents)
    kept = (work.products + work.sums) * torch.float64.itemsize
    read = bytes_of(types, kernel.reads) + kept
    written = kept + n * made.layer.out_channels * made.layer.groups * _merged_bytes(kernel)
    traffic = (read + written) / BANDWIDTH
    products = work.macs / (DOUBLE_RATE * DOUBLE_PART)
    return Work(
        launches=2,
        read=read,
        written=written,
        macs=work.macs,
        seconds=traffic + products + work.elements * TILED + SQUARED + 2 * LAUNCH,
        floor=max(traffic, work.macs / DOUBLE_RATE),
    )


def _merged_bytes(kernel: Launch) -> int:
    """Of a sample and channel, where the slots of a sample are one piece."""
    return sum(8 * KINDS[kind].merged for kind in kernel.gathers)


def launch_seconds(kernel: Launch, made: Specialisation, batch: int, sizes: Extents) -> float:
    """Of the kernel and its helpers, for x of these ``sizes``."""
    row = kernel.sizes[2] if kernel.layout == "contiguous" and kernel.keeps else 0
    itemsize = kernel.kind.dtype.itemsize
    epilogue = _epilogue(kernel, made)
    return seconds(
        made,
        batch,
        sizes,
        kernel.sizes,
        row,
        itemsize,
        keeps=kernel.keeps,
        epilogue=epilogue,
        shares=kernel.shares,
        in_place=kernel.in_place,
    )


def _epilogue(kernel: Launch, made: Specialisation) -> float:
    """Cycles per accumulator: of a pool's result, the part that falls on one."""
    flop = POINTWISE if made.along is None else POINTWISE_ALONG
    body = next((r.body for r in (kernel.fold, kernel.along) if r is not None), None)
    before, after, behind = (_flops(e) * flop for e in (kernel.before, kernel.after, kernel.behind))
    before += _flops(body) * flop
    if made.along is not None:
        return (
            ALONG_CYCLES[made.along]
            + before
            + after
            + behind / (math.prod(kernel.layer.stride) if kernel.combine else 1)
        )
    after += behind if kernel.fold is None or kernel.fold.keeps else behind / kernel.fold.channels
    gathered = sum(KINDS[kind].cycles for kind in kernel.gathers)
    if not kernel.combine or made.merged:
        return before + after + gathered
    classes = math.prod(kernel.layer.stride)
    if kernel.monotone:  # of the largest value and of the smallest one, which is found beside it
        return POOLED + (2 * before + after + gathered) / classes
    return POOLED + before + (after + gathered) / classes


def _flops(expression: Expression | Persistent | None) -> int:
    return 0 if expression is None else expression.flops


# --- the steps around it --------------------------------------------------------------------------
def _by_kernel(step: Map | Gather | Bundle | Sums | Contraction, types: Types) -> Work:
    if isinstance(step, Sums):
        return _sums(step)
    if isinstance(step, Contraction):
        return _contraction(step, types)
    if isinstance(step, Bundle):
        return _memory_bound(1, bytes_of(types, step.made.reads), sum(map(size_of, step.kinds)))
    if isinstance(step, Map):
        again = step.rows is not None and step.rows.keeps and not step.rows.held
        read = bytes_of(types, step.reads) + (size_of(types[step.value]) if again else 0)
        work = _memory_bound(1, read, size_of(step.kind))
        if again and step.rows is not None and step.rows.combine.endswith("Softmax"):
            return dataclasses.replace(work, seconds=max(work.seconds, elements(types[step.value]) * STREAMED))
        return work
    read = size_of(step.kind) if step.layout else 0
    return _memory_bound(len(step.instrs) + (2 if step.layout else 0), read, bytes_of(_made(step), step.makes))


def _sums(step: Sums) -> Work:
    """x is read once; the results of slots are written, and read again."""
    apart = step.slots * step.slot * 4 if step.slots > 1 else 0
    return _memory_bound(step.launches, size_of(step.given) + apart, size_of(step.kind) + apart)


def _contraction(step: Contraction, types: Types) -> Work:
    read, written = bytes_of(types, step.reads), size_of(step.kind)
    macs = step.samples * step.channels * step.groups * len(step.table) * step.columns
    floor = max((read + written) / BANDWIDTH, macs / FLOAT_RATE)
    return Work(1, read, written, macs, floor + LAUNCH, floor)


def _memory_bound(launches: int, read: int, written: int) -> Work:
    floor = (read + written) / BANDWIDTH
    return Work(launches, read, written, 0, floor + launches * LAUNCH, floor)


def by_torch(program: Program, exact: bool) -> Work:
    """A program of known sizes, operator by operator."""
    run = run_by(program)
    floor = sum(_least(o, exact) for o in run)
    return Work(
        launches=len(run),
        read=sum(o.read for o in run),
        written=sum(o.written for o in run),
        macs=sum(o.macs for o in run),
        seconds=floor + len(run) * LAUNCH,
        floor=floor,
    )


def run_by(program: Program) -> list[Operator]:
    """The operators of a program of known sizes that launch something."""
    found = operators(program)
    assert found is not None
    return [o for o in found if o.read or o.written]


def _least(operator: Operator, exact: bool) -> float:
    wide = FLOAT_RATE if exact else TF32_RATE
    rate = HALF_RATE if operator.results[0].dtype.itemsize == 2 else wide
    return max((operator.read + operator.written) / BANDWIDTH, operator.macs / rate)


# --- sizes ----------------------------------------------------------------------------------------
def types_of(program: Program) -> dict[str, TensorType]:
    """The types of all values of a program of known sizes."""
    found = operators(program)
    assert found is not None
    made = ((out, kind) for o in found for out, kind in zip(o.instr.outs, o.results, strict=True))
    return {**dict(program.inputs), **dict(made)}


def _made(step: Step) -> dict[str, TensorType]:
    """The types of what a step makes."""
    if isinstance(step, Torch):
        types = types_of(step.program)
        return {name: types[name] for name in step.makes}
    if isinstance(step, (Map, Sums, Contraction)):
        return {step.stored: step.kind}
    if isinstance(step, Bundle):
        return dict(zip(step.makes, step.kinds, strict=True))
    n, c, *spatial = step.kind.shape
    ones = (1,) * len(spatial)
    shapes = ((1 if dict(i.attributes).get("batch") else n, c, *ones) for i in step.instrs for _ in i.outs)
    return {name: TensorType(torch.float32, shape) for name, shape in zip(step.makes, shapes, strict=True)}


def size_of(kind: TensorType) -> int:
    """Bytes of a tensor."""
    return elements(kind) * kind.dtype.itemsize


def bytes_of(types: Types, names: Iterable[str]) -> int:
    """Bytes of all of them."""
    return sum(size_of(types[n]) for n in names)
