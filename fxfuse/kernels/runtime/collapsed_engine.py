"""Run the kernels of a collapsed mean on a CUDA GPU: what :mod:`fxfuse.kernels.stages.collapsed` plans, packed once."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.codegen.operands import Operands, Place
from fxfuse.kernels.convolution.arguments import Divisor
from fxfuse.kernels.runtime import memory
from fxfuse.kernels.runtime.launch import Kernel, sender, stream_of
from fxfuse.kernels.stages.collapsed import MOST_BOXES, MOST_SEGMENTS, MOST_SLOTS, WARPS, Summed, Sums
from fxfuse.kernels.stages.contraction import Contraction

Values = dict[str, Tensor]
Run = Callable[[Values], None]

SUM_BLOCK, CONTRACT_BLOCK = 256, 512


def prepare_sums(step: Sums, device: torch.device, kernels: Mapping[str, Kernel], follows: bool) -> Run:
    """The launches of a :class:`Sums`, for any thread.

    ``follows``: as of :class:`~fxfuse.kernels.runtime.launch.Chain`.
    """
    index, packed = device.index, _sums(step)
    shape = tuple(s or 0 for s in step.kind.shape)
    strides, planned = dense(shape, step.made_layout), dense(step.given.shape, step.layout)
    aligned = step.count * step.given.dtype.itemsize
    first = sender(
        kernels["tap_sums"], step.blocks, SUM_BLOCK, ("qq", packed), shared=step.cells * WARPS * 4, follows=follows
    )
    several, boxes = step.slots > 1, len(step.outer.firsts)
    elements = step.slot * boxes
    told = struct.pack("=3i4x", step.slot, max(step.outer.out_stride, 1), elements) + _boxes(step.outer)
    second = sender(kernels["add_slots"], -(-elements // SUM_BLOCK), SUM_BLOCK, ("qq", told), follows=True)

    given, made, room = step.value, step.stored, (step.slots * step.slot,)

    def run(values: Values) -> None:
        value, stream = values[given], stream_of(index)
        if value.stride() != planned:
            value = _as_planned(value, planned)
        at = value.data_ptr()
        if at % aligned:
            value = value.clone()
            at = value.data_ptr()
        out = values.get(made)
        if out is None:
            values[made] = out = memory.empty(shape, strides, torch.float32)
        if several:
            slots = memory.empty(room, (1,), torch.float32)
            first(stream, at, slots.data_ptr())
            second(stream, slots.data_ptr(), out.data_ptr())
        else:
            first(stream, at, out.data_ptr())

    return run


def prepare_contraction(
    step: Contraction, device: torch.device, kernels: Mapping[str, Kernel], places: Mapping[str, Place]
) -> Run:
    """The launch of a :class:`Contraction`, for any thread. ``places``: where operands lie, as far as it is known.

    It does not begin before the sums are there: blocks that wait take the place of some that read x, and a call took
    46 us instead of 37 on an H100.
    """
    index = device.index
    planned = dense(step.weights.shape, step.layout)
    sizes = step.samples, step.channels, step.columns, step.groups, step.width
    table = [tap | number << 16 for tap, number in step.table]
    packed = struct.pack(f"=3q5if{len(table)}I", *planned[:2], planned[-1], *sizes, step.factor, *table)
    packed += bytes(-len(packed) % 8)
    shape, strides, dtype = tuple(s or 0 for s in step.kind.shape), step.strides, step.kind.dtype
    after = Operands(step.after, places)
    launch = sender(kernels["contract_taps"], step.blocks, CONTRACT_BLOCK, ("qqq", packed, *after.parts))
    given, weights, made = step.value, step.weight, step.stored

    def run(values: Values) -> None:
        sums, weight = values[given].contiguous(), values[weights]
        if weight.stride() != planned:
            weight = _as_planned(weight, planned)
        told = after.tell(values)
        out = values.get(made)
        if out is None:
            values[made] = out = memory.empty(shape, strides, dtype)
        launch(stream_of(index), sums.data_ptr(), weight.data_ptr(), out.data_ptr(), *told)

    return run


def _as_planned(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``value`` with these strides, wherever it has more than one element."""
    if all(s == 1 or a == b for s, a, b in zip(value.shape, value.stride(), strides, strict=True)):
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


# --- parameters, as the structs of cuh/tap_sums.cuh ---------------------------------------------------
def _sums(step: Sums) -> bytes:
    """``SumsArguments`` without the addresses."""
    numbers = *step.strides, *step.out_strides, step.outer.stride, step.slot, step.inner_out
    rows = step.rows[0] * step.rows[1]
    sizes = rows, step.rows[1], step.slots, step.tiles, step.size, step.team, step.across, step.units
    begins = _filled(step.outer.bounds, MOST_SLOTS + 1)
    divisors = bytes(Divisor.of(step.rows[1])) + bytes(Divisor.of(step.units))
    head = struct.pack(f"=7q8i16s{len(begins)}i", *numbers, *sizes, divisors, *begins)
    return head + bytes(-len(head) % 8) + b"".join(map(_summed, (step.b, step.c, step.inner)))


def _summed(dim: Summed) -> bytes:
    sizes = (Divisor * MOST_SEGMENTS)(*(Divisor.of(b - a) for a, b in itertools.pairwise(dim.bounds)))
    bounds = _filled(dim.bounds, MOST_SEGMENTS + 1)
    return struct.pack(f"=qi{len(bounds)}i", dim.stride, dim.segments, *bounds) + bytes(sizes) + _boxes(dim)


def _boxes(dim: Summed) -> bytes:
    firsts, lasts = (_filled(v, MOST_BOXES) for v in (dim.firsts, dim.lasts))
    return struct.pack(f"=qi{MOST_BOXES}B{MOST_BOXES}B4x", dim.out_stride, len(dim.firsts), *firsts, *lasts)


def _filled(values: Sequence[int], size: int) -> list[int]:
    return [*values, *[0] * (size - len(values))]
