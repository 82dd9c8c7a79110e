"""How a kernel divides a layer: residue classes into passes, channels into tiles, both into stages of memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from fxfuse.kernels.convolution.geometry import Pass, Residue, Step, steps_of, steps_of_sum, sum_of
from fxfuse.kernels.convolution.instructions import PARTS, PRODUCTS, cycles, held
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import CONSUMERS, RUN_CYCLES, TURN_CYCLES, Unsupported
from fxfuse.kernels.convolution.tiles import Extents
from fxfuse.kernels.convolution.tiling import CLOCK, PARTIAL_SECTOR, POOLED, STORE_RATE

#: 64 rows of a warpgroup, about
USUAL_TILES = 2
#: part of the 32-byte sectors of a row of 64 floats that it fills only in part, where rows begin anywhere
PARTIAL_ROW = 0.2


@dataclasses.dataclass(frozen=True)
class Classes:
    """What has accumulators of its own: every residue class of a position, or, ``merged``, the sum of all of them.

    ``exact``: as of :func:`~fxfuse.kernels.convolution.specialise.specialise`.
    """

    layer: Layer
    merged: bool
    exact: bool

    @property
    def stride(self) -> Extents:
        """Classes per dim."""
        return (1, 1, 1) if self.merged else self.layer.stride

    @property
    def stacks(self) -> tuple[int, ...]:
        """How many of them may have accumulators at the same time: all along w, in a plane, or in all dims."""
        _, h, w = self.stride
        return tuple(s for s in dict.fromkeys((1, w, h * w, math.prod(self.stride))) if s <= 16)

    def passes(self, stack: int, columns: int, *, finite: bool, running: bool = False) -> tuple[Pass, ...]:
        """Passes of ``stack`` classes. ``finite``: x has no Inf nor NaN. ``running``: little is stored."""
        if self.merged:
            one = sum_of(self.layer.residues)
            return (Pass((one,), steps_of_sum(one, added=finite)),)
        return _passes(self, stack, columns, finite, running)


def stacked(classes: Classes, *, running: bool, anywhere: bool, finite: bool) -> tuple[int, tuple[Pass, ...]]:
    """Output channels of a tile, and how many residue classes have accumulators at the same time.

    ``running``: the epilogue keeps a running value of them. ``anywhere``: rows of the output begin anywhere in a
    sector of memory, so that a pass should have many of them.
    """
    layer, stride = classes.layer, classes.stride
    width = max(8, -(-layer.out_channels // 8) * 8)
    plane = stride[2] * stride[1]
    choices = []
    for stack in classes.stacks:
        # neighbours along w in one thread make a store of two
        if not (running or stride[2] != 2 or stack % 2 == 0):
            continue
        most = {64, 64 if running else 128, 128 // stack if anywhere else 64}
        for columns in {columns_of(width, m) for m in most}:
            if stack * columns > 128:
                continue
            passes = classes.passes(stack, columns, finite=finite, running=running)
            multiply = _cycles_of(classes, columns, running, passes) * -(-width // columns)
            seconds = multiply * layer.in_channels / 16 / CLOCK
            if anywhere:
                partial = 0.0 if stack % plane == 0 else PARTIAL_ROW if stack % stride[2] == 0 else 1.0
                written = 64 * math.prod(stride) * width * 4
                seconds += written / STORE_RATE * (1 + PARTIAL_SECTOR * partial)
            # windows are as wide of few classes, which leave room for more rows
            choices.append((seconds, stack if classes.exact else -stack, columns, passes))
    _, _, columns, passes = min(choices, key=lambda c: c[:3])
    return columns, passes


def check_holding(layer: Layer, *, pooled: bool, merged: bool, exact: bool, before: bool, rows: bool) -> None:
    """Raise Unsupported where no tile holds all channels, for a reduction of them.

    ``merged``: a pool may be made by the matrix units. ``rows``: w varies fastest in what is stored. The others: see
    :func:`~fxfuse.kernels.convolution.specialise.specialise`.
    """
    running = pooled and not merged
    holding(Classes(layer, merged, exact), running=running, before=before, rows=rows, finite=False)


def holding(classes: Classes, *, running: bool, before: bool, rows: bool, finite: bool) -> tuple[int, tuple[Pass, ...]]:
    """Output channels and passes of a tile that holds all channels. Arguments as of :func:`check_holding`."""
    layer, stride = classes.layer, classes.stride
    columns = max(8, -(-layer.out_channels // 8) * 8)
    most = (64 if before or classes.exact else 128) if running else 256
    if layer.groups > 1:
        raise Unsupported(f"{layer.groups} groups of channels lie in as many tiles")
    if columns > most:
        raise Unsupported(f"{layer.out_channels} channels have more accumulators than a tile holds ({most} channels)")
    if classes.exact:
        columns = held(columns, most)
    pairs = rows and not running and stride[2] == 2  # neighbours along w in one thread make a store of two
    for wide in (128, 256):  # half as wide an instruction leaves room for two tiles of rows
        found = []
        for stack in classes.stacks:
            if stack * columns <= wide and not (pairs and stack % 2):
                passes = classes.passes(stack, columns, finite=finite and not running)
                found.append((cycles(passes, columns, exact=classes.exact), -stack, passes))
        if found:
            return columns, min(found, key=lambda f: f[:2])[2]
    raise Unsupported(f"{layer.out_channels} channels of two neighbours have more accumulators than a tile holds")


def pool_cycles(layer: Layer, columns: int, passes: tuple[Pass, ...], *, merged: bool, exact: bool) -> float:
    """Of a multiprocessor, for 64 positions and a group's channels: products, and a pool outside the matrix units."""
    multiply = cycles(passes, columns, exact=exact) * -(-layer.in_channels // 16) * (PRODUCTS if exact else 1)
    accumulators = 0 if merged else 64 * columns * len(layer.residues)
    return -(-layer.out_channels // columns) * max(multiply, multiply / CONSUMERS + accumulators * POOLED)


def _passes(classes: Classes, stack: int, columns: int, finite: bool, running: bool) -> tuple[Pass, ...]:
    """Passes of ``stack`` residue classes, in an order in which instructions always begin at the first one.

    ptxas keeps the accumulators of one instruction in one place: runs that begin anywhere would be copied
    to and fro. Where no order helps, classes in between are multiplied with zeros if x is finite, or else
    every class gets instructions of its own. Where little is stored, and x is finite, all classes of a pass are
    multiplied together if that takes less than waiting for each run.
    """
    every = classes.layer.residues
    groups = [every[i : i + stack] for i in range(0, len(every), stack)]
    time = functools.partial(_cycles_of, classes, columns, running)
    ways = []
    for order in _orders(groups, stack):
        ordered = [tuple(g[i] for i in order) for g in groups]
        whole = tuple(Pass(r, steps_of(r, whole=True)) for r in ordered)
        if finite:
            ways += [tuple(Pass(r, steps_of(r, filled=True)) for r in ordered), *([whole] if running else [])]
        passes = tuple(Pass(r, steps_of(r)) for r in ordered)
        if all(s.first == 0 for p in passes for s in p.steps):
            return whole if finite and running and time(whole) < time(passes) else passes
    alone = tuple(
        Pass(g, tuple(sorted(
            (Step(s.delta, s.first + i, (tap,)) for s in steps_of(g) for i, tap in enumerate(s.taps)),
            key=lambda s: (s.first, s.delta),
        ))) for g in groups
    )  # fmt: skip
    return min([*ways, alone], key=time)


def _cycles_of(classes: Classes, columns: int, running: bool, passes: tuple[Pass, ...]) -> float:
    """Of instructions for 64 positions and 16 input channels; where little is stored, with their part of what runs wait
    for. Elsewhere stores take that time, too: groups of few channels took 476 us in one run, 449 in eight.
    """
    channels, exact = classes.layer.in_channels, classes.exact
    chunk, _ = buffers_of(channels, exact)[0]
    runs = [{(s.first, s.count) for s in p.steps} for p in passes]
    turns = not exact and chunk >= channels and all(r == runs[0] for r in runs)
    waits = sum(map(len, runs)) * (TURN_CYCLES if turns else RUN_CYCLES) if running else 0
    together = chunk // PARTS * PRODUCTS if exact else chunk
    return cycles(passes, columns, exact=exact) + waits / (CONSUMERS * USUAL_TILES * together // 16)


def _orders(groups: list[tuple[Residue, ...]], stack: int) -> list[tuple[int, ...]]:
    """Orders of the classes of a pass; first those that leave neighbours along w next to each other."""
    by_taps = tuple(sorted(range(stack), key=lambda i: -sum(len(g[i].taps) for g in groups)))
    if stack > 4:
        return [tuple(range(stack)), by_taps]

    def parted(order: tuple[int, ...]) -> int:
        return sum(a // 2 != b // 2 for a, b in zip(order[::2], order[1::2], strict=False))

    return sorted(itertools.permutations(range(stack)), key=parted)


def columns_of(width: int, most: int) -> int:
    """Output channels per tile: at most ``most``, as few padded ones as possible, then as many as possible."""
    return min(range(8, min(width, most) + 1, 8), key=lambda c: (-(-width // c) * c + 8 * -(-width // c), -c))


def buffers_of(channels: int, exact: bool) -> list[tuple[int, int]]:
    """(chunk, buffers of x)"""
    padded, parts = -(-channels // 16) * 16, PARTS if exact else 1
    chunks = (chunk for chunk in (64, 32, 16) if chunk // parts >= 16 and padded % (chunk // parts) == 0)
    return [(chunk, buffers) for chunk in chunks for buffers in (2, 1)]
