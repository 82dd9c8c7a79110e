"""What a region costs on an H100, step by step: launches, bytes, multiply-adds, seconds by estimate. Pure.

The chain as the model wrote it is counted operator by operator; the plan as :mod:`~fxfuse.kernels.execute` decides
it for contiguous inputs. Seconds are estimates, and for torch's operators a lower bound: the memory traffic at copy
bandwidth, or the products at the rate of the matrix units, whichever takes longer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from fxfuse.instr import TensorType
from fxfuse.kernels import execute
from fxfuse.kernels.chains import elements
from fxfuse.kernels.convolution import CONSUMERS, Specialisation
from fxfuse.kernels.cost import MACHINES, Operator, operators
from fxfuse.kernels.engine import THREADS, Convolution
from fxfuse.kernels.execute import Strides
from fxfuse.kernels.schedule import Launch, Schedule
from fxfuse.kernels.tail import Bundle, Gather, Map, Step, Torch
from fxfuse.kernels.tail_engine import source_of
from fxfuse.kernels.tiling import seconds
from fxfuse.program import Program
from fxfuse.region import Region

#: bytes per second that an H100 copies
BANDWIDTH = MACHINES["cuda"].bandwidth
#: multiply-adds per second of 16-bit products, measured on an H100 (751 TFLOP/s): kernels of ours make TF32's
#: products of those, and float32's of three; and of TF32 products, as torch's operators make them
HALF_RATE, TF32_RATE = 3.75e14, MACHINES["cuda"].macs
#: multiply-adds per second of float32 without matrix units (67 TFLOP/s, as specified)
FLOAT_RATE = 3.35e13
#: seconds that one more kernel in a queue takes at least
LAUNCH = 2e-6

Types = Mapping[str, TensorType]


@dataclasses.dataclass(frozen=True)
class Part:
    """One step of a plan.

    ``what``: its stages. ``by``: "kernel" for a kernel of ours that stands for operators of the chain, "helper" for
    small ones of ours, "torch" for torch's operators. ``launches``: on the GPU, helpers included (of torch's
    operators one each). ``read``, ``written``: bytes, workspaces included.
    ``seconds``: an estimate; ``floor``: what its traffic and its products take at least. ``facts``: names and
    values, for a person to read. ``source``: CUDA C++, "" for torch's.
    """

    what: str
    by: str
    launches: int
    read: int
    written: int
    macs: int
    seconds: float
    floor: float
    facts: tuple[tuple[str, str], ...] = ()
    source: str = ""

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0


@dataclasses.dataclass(frozen=True)
class Account:
    """What a region costs before and after.

    ``before``: the model's chain, operator by operator, as torch runs it; ``parts``: the plan. ``refusal``: why
    torch's operators run all of it, or its convolution; None where a kernel of ours makes that. ``given``,
    ``made``: bytes of the region's inputs and outputs. ``floor``: seconds that any implementation of the rewritten
    chain takes: its inputs read once and its outputs written once, or its products, whichever takes longer.
    """

    before: Part
    parts: tuple[Part, ...]
    refusal: str | None
    given: int
    made: int
    floor: float

    @property
    def kernels(self) -> int:
        """Kernels of ours that stand for operators of the chain."""
        return sum(p.by == "kernel" for p in self.parts)

    @property
    def launches(self) -> int:
        return sum(p.launches for p in self.parts)

    @property
    def bytes(self) -> int:
        """Read and written by the plan."""
        return sum(p.bytes for p in self.parts)

    @property
    def macs(self) -> int:
        return sum(p.macs for p in self.parts)

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.parts)

    @property
    def saved(self) -> int:
        """Bytes read and written by torch, operator by operator, and not by the plan; negative where it moves more."""
        return self.before.bytes - self.bytes

    @property
    def unwritten(self) -> int:
        """Bytes of intermediates that the plan never writes; 0 where it writes as much."""
        return max(0, self.before.written - sum(p.written for p in self.parts))


@functools.lru_cache(maxsize=256)
def account(region: Region, strides: Strides = None, device: torch.device | None = None) -> Account | None:
    """The account of ``region``, for the sizes that it names; None where one is not known.

    ``strides``, ``device``: of its inputs, as for :func:`fxfuse.kernels.execute.describe`.
    """
    if operators(region.rewritten) is None:
        return None
    plan = execute.planned(region, strides, device)
    return account_of(region, plan.schedule, plan.convolution, plan.refusal)


def account_of(
    region: Region, schedule: Schedule | None, convolution: Convolution | None, refusal: str | None
) -> Account:
    """The account of a region, whose sizes are known, by a plan. ``schedule`` None: torch's operators run it all."""
    program, exact = region.rewritten, region.precision == "ieee"
    before, after = _torch(region.original, exact), _torch(program, exact)
    parts = (after,) if schedule is None else _parts(program, schedule, convolution, exact)
    types = _types(program)
    given, made = (_bytes(types, dict.fromkeys(names)) for names in (dict(program.inputs), program.outputs))
    rate = HALF_RATE / 3 if exact else HALF_RATE
    floor = max((given + made) / BANDWIDTH, after.macs / rate)
    return Account(before, tuple(p for p in parts if p.launches), refusal, given, made, floor)


def _parts(program: Program, schedule: Schedule, convolution: Convolution | None, exact: bool) -> tuple[Part, ...]:
    found, types = [], dict(program.inputs)
    for step in schedule.ahead:
        found.append(_part(step, types, exact))
        types.update(_made(step))
    if schedule.kernel is not None and convolution is not None:
        found.append(_convolution(schedule.kernel, convolution, types))
        types[schedule.kernel.stored] = schedule.kernel.kind
    for step in schedule.steps:
        found.append(_part(step, types, exact))
        types.update(_made(step))
    return tuple(found)


# --- the convolution ------------------------------------------------------------------------------
def _convolution(kernel: Launch, engine: Convolution, types: Types) -> Part:
    """The kernel and its helpers: x and the weights are written, and read again, as rows of 16-bit numbers."""
    made, layer, x = engine.made, engine.made.layer, types[kernel.x]
    scaled = kernel.dtype is torch.float32
    n, _, *sizes = (s or 0 for s in x.shape)
    rows = n * math.prod(sizes) * made.padded_channels * layer.groups * made.parts * 2
    packed = layer.groups * made.column_tiles * made.weight_bytes
    moments = n * layer.out_channels * layer.groups * 16 if kernel.gathers else 0
    stored = _size(kernel.kind) if kernel.keeps else 0
    # x is read once to be measured, where samples are scaled, and once to be made rows
    read = _bytes(types, kernel.reads) + (_size(x) if scaled else 0) + rows + packed
    written = rows + packed + stored + moments
    weight = layer.in_channels * layer.groups * layer.out_channels * layer.volume
    macs = n * math.prod(kernel.extents) // math.prod(layer.stride) * weight

    row = kernel.sizes[2] if kernel.layout == "contiguous" else 0
    itemsize = kernel.kind.dtype.itemsize
    helpers = (scaled or kernel.bias is not None) + (scaled and kernel.keeps) + kernel.gathers
    return Part(
        what=" > ".join(kernel.stages),
        by="kernel",
        launches=2 + helpers,
        read=read,
        written=written,
        macs=macs,
        seconds=seconds(made, n, _three(sizes), kernel.sizes, row, itemsize),
        floor=max((read + written) / BANDWIDTH, macs * (3 if made.exact else 1) / HALF_RATE),
        facts=(*_tiles(kernel, engine, n), ("arithmetic", _arithmetic(kernel, made)), *_results(kernel)),
        source=engine.source(engine.tiling(kernel.sizes)[1]),
    )


def _tiles(kernel: Launch, engine: Convolution, batch: int) -> Iterator[tuple[str, str]]:
    made, (tiling, store) = engine.made, engine.tiling(kernel.sizes)
    step = (1, 1, 1) if made.pooled else made.layer.stride
    d, h, w = (-(-e // s) for e, s in zip(kernel.sizes, step, strict=True))
    count = batch * made.layer.groups * made.column_tiles * math.prod(tiling.counts)
    if tiling.linear:
        shape = f"{tiling.tile[1]} consecutive positions of {tiling.tile[0]} planes and their border"
    else:
        size, box = (" x ".join(map(str, s)) for s in (tiling.tile, tiling.box))
        shape = f"{size} positions, a warpgroup's {box}"
    yield "tile", f"{shape}; {100 * tiling.fit((d, h, w)):.0f} % of the rows are used"
    yield "tiles", f"{count}"
    yield "stores", store.value
    yield "output channels", f"{made.columns} per tile, {made.column_tiles} of them per group"
    yield "input channels", f"{made.chunk} per row of shared memory, {made.padded_channels} with padding"
    residues, passes = made.residues, len(made.passes)
    yield "residue classes", f"{residues} at the same time, {passes} {'pass' if passes == 1 else 'passes'}"
    yield "threads", f"{THREADS} per block: {CONSUMERS} warpgroups that multiply, one that copies"
    yield "shared memory", f"{made.dynamic_bytes / 1024:.0f} KiB per block: {made.stages} stages, {made.x_buffers} of x"


def _arithmetic(kernel: Launch, made: Specialisation) -> str:
    if kernel.dtype is not torch.float32:
        return f"{str(kernel.dtype).removeprefix('torch.')} products, float32 sums"
    return "float32 of two 16-bit parts: three products" if made.exact else "TF32's accuracy of 16-bit products"


def _results(kernel: Launch) -> Iterator[tuple[str, str]]:
    made = [*([f"{kernel.kind}, {kernel.layout}"] if kernel.keeps else []), *(["statistics"] if kernel.gathers else [])]
    yield "results", " and ".join(made)
    if kernel.apart is not None:
        yield "reduced by a kernel of its own", kernel.apart


# --- the other steps ------------------------------------------------------------------------------
def _part(step: Step, types: Types, exact: bool) -> Part:
    if isinstance(step, Torch):
        return _torch(step.program, exact)
    if isinstance(step, Bundle):
        what, moved = " > ".join(i.op for i in step.body), (_bytes(types, step.made.reads), sum(map(_size, step.kinds)))
        return _memory_bound(what, 1, *moved, (), source_of(step), "helper")
    if isinstance(step, Gather):
        return _gather(step)
    facts = (("stores", f"{step.kind}, {step.layouts[1]}"),)
    moved = _bytes(types, step.reads), _size(step.kind)
    return _memory_bound(" > ".join(step.stages), 1, *moved, facts, source_of(step))


def _gather(step: Gather) -> Part:
    read = _size(step.kind) if step.layout else 0
    written = _bytes(_made(step), step.makes)
    launches = len(step.instrs) + (2 if step.layout else 0)
    what, by = ("statistics", "kernel") if step.layout else ("statistics, added up", "helper")
    return _memory_bound(what, launches, read, written, (), source_of(step), by)


def _memory_bound(
    what: str,
    launches: int,
    read: int,
    written: int,
    facts: tuple[tuple[str, str], ...],
    source: str,
    by: str = "kernel",
) -> Part:
    floor = (read + written) / BANDWIDTH
    return Part(what, by, launches, read, written, 0, floor + launches * LAUNCH, floor, facts, source)


def _torch(program: Program, exact: bool) -> Part:
    found = operators(program)
    assert found is not None  # the sizes of the region are known
    run = [o for o in found if o.read or o.written]
    floor = sum(_least(o, exact) for o in run)
    return Part(
        what=" > ".join(o.instr.op for o in run),
        by="torch",
        launches=len(run),
        read=sum(o.read for o in run),
        written=sum(o.written for o in run),
        macs=sum(o.macs for o in run),
        seconds=floor + len(run) * LAUNCH,
        floor=floor,
    )


def _least(operator: Operator, exact: bool) -> float:
    wide = FLOAT_RATE if exact else TF32_RATE
    rate = HALF_RATE if operator.results[0].dtype.itemsize == 2 else wide
    return max((operator.read + operator.written) / BANDWIDTH, operator.macs / rate)


# --- sizes ----------------------------------------------------------------------------------------
def _types(program: Program) -> dict[str, TensorType]:
    """The types of all values of a program of known sizes."""
    found = operators(program)
    assert found is not None
    made = ((out, kind) for o in found for out, kind in zip(o.instr.outs, o.results, strict=True))
    return {**dict(program.inputs), **dict(made)}


def _made(step: Step) -> dict[str, TensorType]:
    """The types of what a step makes."""
    if isinstance(step, Bundle):
        return dict(zip(step.makes, step.kinds, strict=True))
    if isinstance(step, Torch):
        types = _types(step.program)
        return {name: types[name] for name in step.makes}
    if isinstance(step, Map):
        return {step.stored: step.kind}
    n, c, *spatial = step.kind.shape
    ones = (1,) * len(spatial)
    shapes = ((1 if dict(i.attributes)["batch"] else n, c, *ones) for i in step.instrs for _ in i.outs)
    return {name: TensorType(torch.float32, shape) for name, shape in zip(step.makes, shapes, strict=True)}


def _three(sizes: Sequence[int | None]) -> tuple[int, int, int]:
    d, h, w = (1, 1, 1, *(s or 0 for s in sizes))[-3:]
    return d, h, w


def _size(kind: TensorType) -> int:
    return elements(kind) * kind.dtype.itemsize


def _bytes(types: Types, names: Iterable[str]) -> int:
    return sum(_size(types[n]) for n in names)
