"""Run the steps behind a convolution on a CUDA GPU: kernels compiled and loaded once, launches on torch's stream.

A prepared step is a function of a dict of values, to which it adds what it makes. It is prepared for shapes and
strides, and holds nothing that a call changes: several threads may run it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxfuse.instr import DTYPE_NAMES, Instr, TensorType
from fxfuse.kernels.emit_tail import emit_fold, emit_map, emit_pool, emit_statistics, vector
from fxfuse.kernels.engine import MERGE_BLOCK, MERGED
from fxfuse.kernels.expression import Expression
from fxfuse.kernels.jit import compile_cubin
from fxfuse.kernels.launch import Kernel, Launch, Module
from fxfuse.kernels.tail import Gather, Map, Step, Torch

Values = dict[str, Tensor]
Run = Callable[[Values], None]

BLOCK, FINISH_BLOCK = 256, 128
#: positions per thread of a map over channels, elements per thread that measures
ROWS, MEASURED = 8, 32
_I, _L, _D = ctypes.c_int, ctypes.c_int64, ctypes.c_double


def prepare(step: Step, device: torch.device) -> Run:
    """Compile and load what ``step`` needs on ``device``, the current one."""
    if isinstance(step, Map):
        return _prepare_map(step, device)
    if isinstance(step, Gather):
        return _prepare_gather(step, device)
    return _torch(step)


def source_of(step: Step) -> str:
    """The CUDA C++ of a step's kernels; empty for torch's."""
    if isinstance(step, Gather):
        return emit_statistics(DTYPE_NAMES[step.kind.dtype], step.layout or "contiguous")
    if isinstance(step, Torch):
        return ""
    dtype, output = DTYPE_NAMES[step.given.dtype], DTYPE_NAMES[step.kind.dtype]
    if step.window is not None:
        return emit_pool(dtype, output, step.layouts, step.before, step.window, step.after)
    if step.fold is not None:
        return emit_fold(dtype, output, step.layouts, step.before, step.fold, step.after)
    return emit_map(dtype, output, step.layouts[0], step.before)


def kind_of(step: Step) -> str:
    """What a step's kernels are about, in a word."""
    if isinstance(step, Gather):
        return "statistics"
    if isinstance(step, Torch):
        return "torch"
    return "pool" if step.window is not None else "fold" if step.fold is not None else "map"


def _torch(step: Torch) -> Run:
    program = step.program
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


def _load(source: str, names: tuple[str, ...], device: torch.device) -> Mapping[str, Kernel]:
    return _module(source, names, device.index, architecture(device)).kernels


def _sizes(kind: TensorType) -> tuple[int, int, int, int, int]:
    """(N, C, D, H, W) with dims of size 1 for those that are not there."""
    n, c, *spatial = (s or 0 for s in kind.shape)
    d, h, w = (*[1] * (3 - len(spatial)), *spatial)
    return n, c, d, h, w


# --- maps -----------------------------------------------------------------------------------------
def pack(expression: Expression | None, values: Mapping[str, Tensor]) -> bytes:
    """The fields of an expression's struct, 8 bytes each."""
    if expression is None or not expression.fields:
        return b""
    fields = []
    for field in expression.fields:
        tensor = values[field.value]
        if field.axis is None:
            fields.append(tensor.data_ptr())
        else:
            fields.append(0 if tensor.shape[field.axis] == 1 else tensor.stride(field.axis))
    return struct.pack(f"<{len(fields)}q", *fields)


def _prepare_map(step: Map, device: torch.device) -> Run:
    source = source_of(step)
    size, made = _sizes(step.given), _sizes(step.kind)
    n, c, d, h, w = size
    if step.window is not None:
        kernel = _load(source, ("pool",), device)["pool"]
        grid: tuple[int, int, int] = (-(-math.prod(made) // BLOCK), 1, 1)
        head = struct.Struct("<qq10i")
        sizes: tuple[int, ...] = (*size, *made)
    elif step.fold is not None:
        kernel = _load(source, ("fold",), device)["fold"]
        lanes = step.fold.lanes(*(layout != "contiguous" for layout in step.layouts))
        grid = (-(-n * d * h * w * lanes // BLOCK), 1, 1)
        head = struct.Struct("<qq6i")
        sizes = (*size, 0)
    else:
        kernels = _load(source, ("whole", "any"), device)
        count = vector(DTYPE_NAMES[step.given.dtype])
        whole = (d * h * w if step.layouts[0] == "contiguous" else c) % count == 0
        kernel = kernels["whole" if whole else "any"]
        if step.layouts[0] == "contiguous":
            grid = (-(-math.prod(size) // (BLOCK * count)), 1, 1)
        else:
            units = c // count if whole else c
            across = min(units, BLOCK)
            grid = (-(-d * h * w // (BLOCK // across * ROWS)), n, -(-units // across))
        head = struct.Struct("<qq6i")
        sizes = (*size, 0)
    shape = [s or 0 for s in step.kind.shape]

    def run(values: Values) -> None:
        value = values[step.value]
        if value.data_ptr() % 16:
            value = value.clone()
        out = torch.empty_strided(shape, step.strides, dtype=step.kind.dtype, device=device)
        parts = [head.pack(value.data_ptr(), out.data_ptr(), *sizes), pack(step.before, values).ljust(8, b"\0")]
        if step.window is not None or step.fold is not None:
            parts.append(pack(step.after, values).ljust(8, b"\0"))
        _launch(kernel, grid, BLOCK, [ctypes.create_string_buffer(b"".join(parts))], device)
        values[step.stored] = out

    return run


def _launch(
    kernel: Kernel, grid: tuple[int, int, int], block: int, arguments: Sequence[object], device: torch.device
) -> None:
    Launch(kernel, grid, block, arguments)(torch._C._cuda_getCurrentRawStream(device.index))


# --- statistics -----------------------------------------------------------------------------------
class Partials(ctypes.Structure):
    """``Partials`` of ``cuh/statistics.cuh``."""

    _fields_ = [("parts", _L), ("counts", _L), ("slots", _I), ("channels", _I)]


def moments_of(kind: TensorType, device: torch.device) -> Tensor:
    """Room for the moments of every sample and channel of a value."""
    return torch.empty(kind.shape[0] or 0, kind.shape[1] or 0, 2, dtype=torch.float64, device=device)


def moments_name(value: str) -> str:
    """The name under which a value's moments are handed from the kernel that makes them to :class:`Gather`."""
    return f"moments of {value}"


def _prepare_gather(step: Gather, device: torch.device) -> Run:
    kernels = _load(source_of(step), ("measure", "merge", "finish"), device)
    measure = _prepare_measure(step, kernels, device) if step.layout else None
    name = moments_name(step.value)
    n, c, d, h, w = _sizes(step.kind)

    def run(values: Values) -> None:
        moments = measure(values[step.value]) if measure is not None else values.pop(name)
        for instr in step.instrs:
            finish(instr, values, moments)

    def finish(instr: Instr, values: Values, moments: Tensor) -> None:
        attributes = dict(instr.attributes)
        batch, members = attributes["batch"], c // attributes["groups"]
        rows = 1 if batch else n
        shape = (3, rows, c, *(1 for _ in step.kind.shape[2:]))
        results = torch.empty(shape, dtype=torch.float32, device=device)
        at, size = results.data_ptr(), rows * c * 4
        arguments: list[object] = [
            _L(moments.data_ptr()),
            _L(at),
            _L(at + size),
            _L(at + 2 * size),
            _I(n),
            _I(c),
            _I(members),
        ]
        arguments += [_I(batch), _D(d * h * w), _D(attributes["eps"])]
        _launch(kernels["finish"], (rows * attributes["groups"], 1, 1), FINISH_BLOCK, arguments, device)
        values.update(zip(instr.outs, results, strict=True))

    return run


def _prepare_measure(step: Gather, kernels: Mapping[str, Kernel], device: torch.device) -> Callable[[Tensor], Tensor]:
    n, c, d, h, w = _sizes(step.kind)
    positions = d * h * w
    lanes = 1 if step.layout == "contiguous" else 32  # channels of a block
    slots = -(-positions // (MEASURED * BLOCK // lanes))
    blocks = n * slots * (c if lanes == 1 else -(-c // lanes))

    def run(value: Tensor) -> Tensor:
        parts = torch.empty(n * slots * (2 * c + 1), dtype=torch.float32, device=device)
        counts = parts.data_ptr() + n * slots * c * 8
        partials = Partials(parts.data_ptr(), counts, slots, c)
        _launch(kernels["measure"], (blocks, 1, 1), BLOCK, [_L(value.data_ptr()), partials, _I(positions)], device)
        moments = moments_of(step.kind, device)
        grid = (n * -(-c // MERGED), 1, 1)
        _launch(kernels["merge"], grid, MERGE_BLOCK, [partials, _L(moments.data_ptr())], device)
        return moments

    return run
