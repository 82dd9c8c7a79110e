"""Run the steps behind a convolution on a CUDA GPU: kernels compiled and loaded once, launches on torch's stream.

A prepared step is a function of a dict of values, to which it adds what it makes; an output of the region that is there
already is filled. It is prepared for shapes and strides, and holds nothing that a call changes: several threads may run
it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor

from fxfuse.instr import DTYPE_NAMES, Instr, TensorType
from fxfuse.kernels.codegen.chains import dense, layouts_of
from fxfuse.kernels.codegen.operands import Operands, Place, addresses, told_by
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.convolution.workspace import ALIGNMENT
from fxfuse.kernels.runtime import memory
from fxfuse.kernels.runtime.collapsed_engine import prepare_contraction, prepare_sums
from fxfuse.kernels.runtime.launch import Kernel, Module, sender, stream_of
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.emit_tail import (
    rows_at_once,
    vector,
)
from fxfuse.kernels.stages.merge import MERGE_BLOCK, MERGED, pieces
from fxfuse.kernels.stages.merged import Merged, form_of_statistics, front_of, merged_name, statistics_name
from fxfuse.kernels.stages.sources import source_of
from fxfuse.kernels.stages.steps import Bundle, Gather, Map, Step
from fxfuse.program import Program

Values = dict[str, Tensor]
Run = Callable[[Values], None]

BLOCK, FINISH_BLOCK = 256, 128
#: positions per thread of a map over channels, elements per thread that measures
ROWS, MEASURED = 8, 32


def prepare(
    step: Step,
    device: torch.device,
    places: Mapping[str, Place],
    tensors: Set[str],
    *,
    follows: bool = False,
    merged: Merged | None = None,
) -> Run:
    """Compile and load what ``step`` needs on ``device``, the current one.

    ``places``: where values lie, as far as it is known. ``tensors``: those that are read as tensors, not only as
    operands of kernels. ``follows``: as of :class:`~fxfuse.kernels.runtime.launch.Chain`. ``merged``: the parts that
    a step takes, where the kernel that makes its value gathers on its way.
    """
    if isinstance(step, Map):
        return _prepare_map(step, device, places, follows)
    if isinstance(step, Gather):
        return _prepare_gather(step, device, tensors, follows, merged)
    if isinstance(step, Bundle):
        return _prepare_bundle(step, device, places, follows)
    if isinstance(step, Sums):
        return prepare_sums(step, device, load(source_of(step), ("tap_sums", "add_slots"), device), follows)
    if isinstance(step, Contraction):
        kernels = load(source_of(step), ("contract_taps",), device)
        return prepare_contraction(step, device, kernels, places)
    return by_torch(step.program)


def by_torch(program: Program) -> Run:
    """``program`` by torch's operators."""
    names = [n for n, _ in program.inputs]

    def run(values: Values) -> None:
        results = program.run([values[n] for n in names], reuse=True)
        values.update(zip(program.outputs, results, strict=True))

    return run


@functools.lru_cache(maxsize=1024)
def _module(source: str, names: tuple[str, ...], device: int, arch: str) -> Module:
    return Module(compile_cubin(source, arch).code, names)


def architecture(device: torch.device) -> str:
    """What kernels are compiled for on ``device``: "sm_90a" on Hopper."""
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def load(source: str, names: tuple[str, ...], device: torch.device) -> Mapping[str, Kernel]:
    """The kernels of a source by name, compiled for ``device``, the current one."""
    return _module(source, names, device.index, architecture(device)).kernels


def _sizes(kind: TensorType) -> tuple[int, int, int, int, int]:
    """(N, C, D, H, W) with dims of size 1 for those that are not there."""
    n, c, *spatial = (s or 0 for s in kind.shape)
    d, h, w = (*[1] * (3 - len(spatial)), *spatial)
    return n, c, d, h, w


def _laid_out(value: Tensor, layout: str, planned: tuple[int, ...]) -> Tensor:
    """``value`` as it was planned: torch's operators may lay out what they make in another way than they said."""
    if layout in layouts_of(value.shape, value.stride()):
        return value
    return torch.empty_strided(value.shape, planned, dtype=value.dtype, device=value.device).copy_(value)


# --- maps -----------------------------------------------------------------------------------------
def _prepare_map(step: Map, device: torch.device, places: Mapping[str, Place], follows: bool) -> Run:
    index = device.index
    source = source_of(step)
    size, block = _sizes(step.given), BLOCK
    n, c, d, h, w = size
    if step.window is not None:
        kernel = load(source, ("pool",), device)["pool"]
        spatial = step.kind.shape[2 - len(step.given.shape) :]
        made = _sizes(dataclasses.replace(step.kind, shape=(n, c, *spatial)))
        threads = math.prod(made[2:])  # of all positions
        if step.rows is not None:
            lanes = step.rows.lanes(rows_at_once(DTYPE_NAMES[step.given.dtype], step.rows))
            threads = n * c * made[2] * made[3] * lanes
        elif step.fold is not None:
            threads *= n * step.fold.slices(step.window)
        else:
            threads *= -(-n * c // step.window.planes(step.layouts))
        grid: tuple[int, int, int] = (-(-threads // BLOCK), 1, 1)
        sizes: tuple[int, ...] = (*size, *made)
    elif step.fold is not None:
        kernel = load(source, ("fold",), device)["fold"]
        lanes = step.fold.lanes(*(layout != "contiguous" for layout in step.layouts))
        grid = (-(-n * d * h * w * lanes // BLOCK), 1, 1)
        sizes = (*size, 0)
    elif step.rows is not None:
        kernel = load(source, ("rows",), device)["rows"]
        lanes = step.rows.lanes(rows_at_once(DTYPE_NAMES[step.given.dtype], step.rows))
        block = step.rows.threads
        grid = (-(-math.prod(size) // (step.rows.length * (block // lanes))), 1, 1)
        sizes = (*size, step.rows.length)
    else:
        kernels = load(source, ("whole", "any"), device)
        count = vector(DTYPE_NAMES[step.given.dtype])
        whole = (d * h * w if step.layouts[0] == "contiguous" else c) % count == 0
        kernel = kernels["whole" if whole else "any"]
        if step.layouts[0] == "contiguous":
            grid = (-(-math.prod(size) // (BLOCK * count)), 1, 1)
        else:
            units = c // count if whole else c
            across = min(units, BLOCK)
            grid = (-(-d * h * w // (BLOCK // across * ROWS)), n, -(-units // across))
        sizes = (*size, 0)
    shape, strides, dtype = tuple(s or 0 for s in step.kind.shape), tuple(step.strides), step.kind.dtype
    both = step.window is not None and (step.fold is not None or step.rows is not None)
    expressions = (step.before, *([] if step.pointwise else [step.after]), *([step.behind] if both else []))
    operands = [Operands(e, places) for e in expressions]
    packed = struct.pack(f"={len(sizes)}i", *sizes)
    launch = sender(kernel, grid, block, ("qq", packed, *(p for o in operands for p in o.parts)), follows=follows)

    given, stored, planned = step.value, step.stored, dense(step.given.shape, step.layouts[0])
    tell = told_by(operands)

    viewed = tuple(s or 0 for s in step.given.shape) if step.viewed else None

    def run(values: Values) -> None:
        value = values[given]
        if viewed is not None:
            value = value.reshape(viewed)
        if value.stride() != planned:
            value = _laid_out(value, step.layouts[0], planned)
        at = value.data_ptr()
        if at % 16:
            value = value.clone()
            at = value.data_ptr()
        told = tell(values)
        out = values.get(stored)
        if out is None:
            values[stored] = out = memory.empty(shape, strides, dtype)
        launch(stream_of(index), at, out.data_ptr(), *told)

    return run


# --- small tensors --------------------------------------------------------------------------------
def _prepare_bundle(step: Bundle, device: torch.device, places: Mapping[str, Place], follows: bool) -> Run:
    kernel = load(source_of(step), ("bundle",), device)["bundle"]
    makes, index = step.makes, device.index
    known = {} if step.doubtful else {n: (places[n].base, places[n].offset) for n in step.made.reads if n in places}
    reads = [known.get(n, (n, 0)) for n in step.made.reads]
    forms = [
        (name, tuple(s or 0 for s in kind.shape), strides, kind.dtype)
        for name, kind, strides in zip(makes, step.kinds, step.strides, strict=True)
    ]
    inside = {n: places[n] for n in makes if n in places and places[n].base != n}
    room, end = next((p.base for p in inside.values()), ""), max((p.end for p in inside.values()), default=0)
    size = (-(-end // ALIGNMENT) * ALIGNMENT,)
    #: offsets in the room; None for what is a tensor of its own
    made = [(*form, inside[form[0]].offset if form[0] in inside else None) for form in forms]
    numbers, blocks, doubtful = step.made.numbers, -(-step.made.elements // BLOCK), step.doubtful
    launch = sender(kernel, blocks, BLOCK, ("q" * (len(reads) + len(makes)), numbers), follows=follows)
    tell = addresses(reads)

    def by_torch(values: Values) -> None:
        results = step.program.run([values[n] for n in step.reads])
        whole = memory.empty(size, (1,), torch.uint8)
        for (name, shape, strides, dtype, offset), result in zip(made, results, strict=True):
            if offset is None:
                own = values.get(name)
                values[name] = (memory.empty(shape, strides, dtype) if own is None else own).copy_(result)
            else:
                whole[offset:].view(dtype).as_strided(shape, strides).copy_(result)
        if room:
            values[room] = whole

    def run(values: Values) -> None:
        for name, planned in doubtful:
            if values[name].stride() != planned:
                by_torch(values)
                return
        begin = 0
        if room:
            values[room] = whole = memory.empty(size, (1,), torch.uint8)
            begin = whole.data_ptr()
        at = []
        for name, shape, strides, dtype, offset in made:
            if offset is None:
                own = values.get(name)
                if own is None:
                    values[name] = own = memory.empty(shape, strides, dtype)
                at.append(own.data_ptr())
            else:
                at.append(begin + offset)
        launch(stream_of(index), *tell(values), *at)

    return run


# --- statistics -----------------------------------------------------------------------------------
#: ``Partials`` of ``cuh/statistics.cuh``: parts, counts, slots, channels
PARTIALS = "qqii"


def _prepare_gather(step: Gather, device: torch.device, tensors: Set[str], follows: bool, merged: Merged | None) -> Run:
    entries = ("measure", "merge") if step.layout else ()
    kernels = load(source_of(step), (*entries, *(f"finish_{kind}" for kind in step.gathers)), device)
    measure, front = None, front_of(step, tensors)
    if step.layout:
        measure, merged = _prepare_measure(step, kernels, device, follows, front)
    assert merged is not None
    assert merged.front == front
    name, value = merged_name(step.value), step.value
    finishes = []
    for i, instr in enumerate(step.instrs):
        kernel, behind = kernels[f"finish_{instr.op}"], follows or measure is not None or i > 0
        finishes.append(_prepare_finish(instr, step.kind, kernel, device, tensors, behind, merged, i))

    def run(values: Values) -> None:
        given = measure(values[value]) if measure is not None else values.pop(name)
        for finish in finishes:
            finish(values, given)

    return run


def _prepare_finish(
    instr: Instr,
    kind: TensorType,
    kernel: Kernel,
    device: torch.device,
    tensors: Set[str],
    follows: bool,
    merged: Merged,
    number: int,
) -> Callable[[Values, Tensor], None]:
    """``number``: of the instruction among those that are made of the same tensor."""
    n, c, *_ = _sizes(kind)
    attributes = {"batch": False, "groups": c, "eps": 0.0, **dict(instr.attributes)}
    batch, groups = attributes["batch"], attributes["groups"]
    shape, strides = form_of_statistics(instr, kind)
    rows = shape[1]
    index, begin = device.index, dict(merged.places)[instr.op]
    name, taken_apart = statistics_name(instr), not tensors.isdisjoint(instr.outs)
    numbers = [struct.pack("=i", v) for v in (n, c, c // groups, int(batch), merged.pieces)]
    told = *numbers, struct.pack("=d", float(attributes["eps"]))
    launch = sender(kernel, rows * groups, FINISH_BLOCK, *"qq", *told, follows=follows)
    in_front = merged.front > 0 and number == 0

    def run(values: Values, given: Tensor) -> None:
        results = given if in_front else memory.empty(shape, strides, torch.float32)
        launch(stream_of(index), given.data_ptr() + begin, results.data_ptr())
        values[name] = results
        if taken_apart:
            values.update(zip(instr.outs, results.unbind(), strict=True))

    return run


def _prepare_measure(
    step: Gather, kernels: Mapping[str, Kernel], device: torch.device, follows: bool, front: int
) -> tuple[Callable[[Tensor], Tensor], Merged]:
    n, c, d, h, w = _sizes(step.kind)
    positions = d * h * w
    lanes = 1 if step.layout == "contiguous" else 32  # channels of a block
    slots = -(-positions // (MEASURED * BLOCK // lanes))
    blocks = n * slots * (c if lanes == 1 else -(-c // lanes))
    index = device.index
    partials = PARTIALS[:2], struct.pack(f"={PARTIALS[2:]}", slots, c)
    first = sender(kernels["measure"], blocks, BLOCK, "q", partials, struct.pack("=i", positions), follows=follows)
    count = pieces(n, c, slots)
    blocks_merge = n * count * -(-c // MERGED)
    second = sender(kernels["merge"], blocks_merge, MERGE_BLOCK, partials, struct.pack("=i", count), "q", follows=True)

    planned, merged = dense(step.kind.shape, step.layout), Merged.of(step.kind, step.gathers, count, front)
    room, before_counts = (n * slots * (2 * c + 1),), n * slots * c * 8

    def run(value: Tensor) -> Tensor:
        if value.stride() != planned:
            value = _laid_out(value, step.layout, planned)
        parts = memory.empty(room, (1,), torch.float32)
        made, at, stream = memory.empty(merged.room, (1,), torch.float64), parts.data_ptr(), stream_of(index)
        counts = at + before_counts
        first(stream, value.data_ptr(), at, counts)
        second(stream, at, counts, made.data_ptr() + front)
        return made

    return run, merged
