"""Which kernel a layer gets: residue classes per pass, channel tiles, rows and buffers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math

from fxfuse.kernels.convolution.geometry import Pass, Residue, Step, steps_of, steps_of_sum, sum_of
from fxfuse.kernels.convolution.instructions import PARTS, PRODUCTS, cycles, held
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.sets import copy_cycles
from fxfuse.kernels.convolution.specialisation import (
    CONSUMERS,
    MOST_TILES,
    ROWS,
    RUN_CYCLES,
    STAGE_BYTES,
    TURN_CYCLES,
    Along,
    Specialisation,
    Unsupported,
)
from fxfuse.kernels.convolution.tiles import Extents, best_fit
from fxfuse.kernels.convolution.tiling import (
    ALONG_CYCLES,
    CLOCK,
    PARTIAL_SECTOR,
    POOLED,
    STORE_RATE,
    multiply_seconds,
    store_seconds,
    tile,
)

#: sizes of outputs for which a specialisation, which knows no sizes, is chosen: powers of two, and with a border
_TYPICAL = ((32, 32, 32), (34, 34, 34), (48, 48, 48), (66, 66, 66))
#: how much faster another kernel must be for sizes that the usual one fits badly
WORTH_COMPILING = 1.08
#: rows of matrix instructions for each that is an output channel, up to which channels are made rows; and the residue
#: classes along w
MOST_FILLED, MOST_ALONG = 1.5, 4
#: residue classes along a dim, which a kernel counts in 8 bits
MOST_STRIDE = 256
#: 64 rows of a warpgroup, about
USUAL_TILES = 2
#: part of the 32-byte sectors of a row of 64 floats that it fills only in part, where rows begin anywhere
PARTIAL_ROW = 0.2


@dataclasses.dataclass(frozen=True)
class _Classes:
    """What has accumulators of its own: every residue class of a position, or, ``merged``, the sum of all of them.

    ``exact``: as of :func:`specialise`.
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernels:
    """Those of a layer out of which sizes choose."""

    made: tuple[Specialisation, ...]

    @functools.cached_property
    def usual(self) -> Specialisation | None:
        """The fastest for typical sizes; None where shared memory does not suffice."""
        best = max(self.made, key=_usual_rate, default=None)
        return None if best is None or _usual_rate(best) == 0 else best


@functools.lru_cache(maxsize=1024)
def _kernels(
    layer: Layer,
    rows: bool,
    sectors: bool,
    folded: bool,
    one: bool,
    *,
    pooled: bool,
    exact: bool,
    before: bool,
    summed: bool,
    finite: bool,
) -> _Kernels:
    """Kernels whose matrix rows are positions. ``rows``: stores go along w; ``sectors``: they begin anywhere in one.

    The others as of :func:`specialise`.
    """
    merged = summed

    def accumulators(merged: bool) -> tuple[int, tuple[Pass, ...]]:
        classes, running = _Classes(layer, merged, exact), pooled and not merged
        if folded:
            return _holding(classes, running=running, before=before, rows=rows, finite=finite)
        return _stacked(classes, running=running, anywhere=sectors and not running, finite=finite)

    columns, passes = accumulators(merged)
    if merged and not finite:  # no weights are added: the same products, of narrower instructions
        with contextlib.suppress(Unsupported):
            other = accumulators(False)
            of = functools.partial(_pool_cycles, layer, exact=exact)
            if of(*other, merged=False) < of(columns, passes, merged=True):
                merged, (columns, passes) = False, other
    stack = max(len(p.residues) for p in passes)
    # a store has one bit for every row of a thread and residue class
    tiles = [
        m
        for m in (4, 2, 1)
        if m * 2 * stack <= 32
        and not (pooled and not merged and m * columns > (64 if before else 128))
        and m * stack * columns <= (128 if exact and folded and m > 1 else 256)
        and not (exact and pooled and not merged and m * (stack + 1) * columns > 256)  # beside windows
    ]
    made = [
        Specialisation(layer, chunk, columns, passes, m_tiles, stages, x_buffers, pooled, exact, one, merged)
        for m_tiles, stages, (chunk, x_buffers) in itertools.product(tiles, (4, 3), _memory(layer.in_channels, exact))
        if m_tiles < 4 or x_buffers > 1  # two tiles of half the size hide each other's copies
        if stack * columns * chunk * 2 <= STAGE_BYTES
    ]
    return _Kernels(tuple(made))


@functools.lru_cache(maxsize=1024)
def kernels_of_sets(usual: Specialisation, finite: bool) -> tuple[Specialisation, ...]:
    """Kernels for the layer of a ``usual`` one, of which samples lie side by side, as ``sets.py`` has them.

    ``finite``: as of :func:`specialise`.
    """
    layer, classes = usual.layer, _Classes(usual.layer, False, usual.exact)
    memory = _memory(layer.in_channels, usual.exact)
    width = max(8, -(-layer.out_channels // 8) * 8)
    found = []
    for stack, columns in itertools.product(classes.stacks, {_columns(width, m) for m in (32, 64, 128, 256)}):
        tiles = [m for m in (4, 2, 1) if m * stack * columns <= 256 and m * 2 * stack <= 32]
        if not tiles:
            continue
        passes = classes.passes(stack, columns, finite=finite)
        even = len({(len(p.steps), sum(s.count for s in p.steps)) for p in passes}) == 1
        for m_tiles, stages, (chunk, x_buffers) in itertools.product(tiles, (4, 3), memory):
            if stack * columns * chunk * 2 > STAGE_BYTES:
                continue
            made = dataclasses.replace(
                usual, chunk=chunk, columns=columns, passes=passes, m_tiles=m_tiles, stages=stages, x_buffers=x_buffers
            )
            by_pass = even and len(passes) > 1 and not made.resident and any(p.steps for p in passes)
            found += [dataclasses.replace(made, by_pass=each) for each in ((False, True) if by_pass else (False,))]
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def specialise(
    layer: Layer,
    *,
    pooled: bool,
    exact: bool = False,
    before: bool = False,
    summed: bool = False,
    contiguous: bool = False,
    finite: bool = False,
    folded: bool = False,
    one: bool = False,
    along: bool = False,
    keeps: bool = True,
    stored: Extents | None = None,
    itemsize: int = 4,
) -> Specialisation:
    """The kernel for a layer. ``pooled``: all residue classes of a position become one value per channel.

    ``exact``: float32's own accuracy, from two 16-bit parts and sums that are kept outside the matrix units.
    ``before``: an expression is computed in front of the pool, which needs registers, too. ``summed``: that value is
    the sum of what was convolved, so that the matrix units may make it.
    ``contiguous``: the output's w varies fastest in memory, not its channels. ``finite``: x has no Inf nor NaN,
    so that it may be multiplied with zeros, and with sums of weights. ``folded``: channels are reduced, so that one
    tile holds all of them; ``one``: to one value, which is all that is stored. ``along``: rows are reduced along w, in
    front of a pool. ``keeps``: something is stored, and not
    only looked at for statistics. ``stored``, ``itemsize``: of the stored tensor. A layer has few kernels: sizes decide
    only whether rows fill sectors, and where the usual kernel fits badly.

    Raises Unsupported where shared memory, or the accumulators of a reduction, do not suffice, and for wider strides
    than a kernel's tables hold.
    """
    if max(layer.stride) > MOST_STRIDE:
        raise Unsupported(
            f"a stride of {max(layer.stride)} has more residue classes than are told apart ({MOST_STRIDE})"
        )
    if along:
        return _whole_rows(layer, stored or _TYPICAL[0], itemsize, pooled=pooled, exact=exact, finite=finite)
    rows = contiguous and not one
    sectors = rows and (stored is None or stored[2] * itemsize % 32 != 0)
    more = {"pooled": pooled, "exact": exact, "before": before, "summed": summed, "finite": finite}
    usual = _chosen(_kernels(layer, rows, sectors, folded, one, **more), stored, contiguous, itemsize)
    if stored is not None and (contiguous or not keeps) and not (pooled or folded):
        turned = _chosen(_by_channel(layer, exact=exact), stored, contiguous, itemsize)
        if turned is not None:
            seconds = sample_seconds(turned, stored, contiguous, itemsize)
            if seconds < math.inf and (usual is None or seconds <= sample_seconds(usual, stored, contiguous, itemsize)):
                return turned
    if usual is None:
        raise Unsupported(
            f"a kernel of {layer.kernel} with dilation {layer.dilation} reaches too far for shared memory"
        )
    return usual


@functools.lru_cache(maxsize=1024)
def _by_channel(layer: Layer, *, exact: bool) -> _Kernels:
    """Kernels whose matrix rows are output channels, and classes along w in one thread.

    None where the channels leave many rows empty, and none where those classes differ in what they read: every run of
    instructions is waited for.
    """
    along = layer.stride[2]
    filled = -(-layer.out_channels // ROWS) * ROWS
    if along > MOST_ALONG or filled > MOST_FILLED * layer.out_channels:
        return _Kernels(())
    groups = (layer.residues[i : i + along] for i in range(0, len(layer.residues), along))
    passes = tuple(Pass(g, steps_of(g)) for g in groups)
    if any(s.count != along for p in passes for s in p.steps):
        return _Kernels(())
    found = []
    for columns, m_tiles in itertools.product((ROWS, *([2 * ROWS] if filled % (2 * ROWS) == 0 else [])), (4, 2, 1)):
        if along * columns // ROWS * m_tiles > (2 if exact else 4):  # accumulators
            continue
        found += [
            Specialisation(layer, chunk, columns, passes, m_tiles, stages, x_buffers, False, exact, by_channel=True)
            for stages, (chunk, x_buffers) in itertools.product((4, 3), _memory(layer.in_channels, exact))
            if along * columns * chunk * 2 <= STAGE_BYTES
        ]
    return _Kernels(tuple(m for m in found if min(best_fit(m, extents) for extents in _TYPICAL) > 0))


def _whole_rows(
    layer: Layer, stored: Extents, itemsize: int, *, pooled: bool, exact: bool, finite: bool
) -> Specialisation:
    """The fastest kernel for outputs of a size whose tiles have whole rows along w; arguments as of :func:`specialise`.

    All classes along w are in a pass, or, where they are pooled, all that there are.
    """
    classes, width = _Classes(layer, False, exact), max(8, -(-layer.out_channels // 8) * 8)
    every, most = math.prod(layer.stride), 128 if exact else 256
    held = -(-stored[2] // (1 if pooled else layer.stride[2]) // 8)  # blocks of eight positions along w
    ways = [(m, Along.SHARED) for m in (4, 2, 1)] + [(held, Along.HELD)] * (held * CONSUMERS <= MOST_TILES)
    found: list[Specialisation] = []
    for stack, columns in itertools.product(classes.stacks, {_columns(width, m) for m in (8, 16, 32, 64, 128)}):
        if stack % layer.stride[2] or (pooled and stack != every) or stack * columns > most:
            continue
        passes = classes.passes(stack, columns, finite=finite, running=pooled)
        found += [
            Specialisation(layer, chunk, columns, passes, m_tiles, stages, buffers, pooled, exact, along=along)
            for (m_tiles, along), stages, (chunk, buffers) in itertools.product(
                ways, (4, 3), _memory(layer.in_channels, exact)
            )
            if m_tiles * stack * columns <= most and stack * columns * chunk * 2 <= STAGE_BYTES
            if m_tiles * 2 * layer.stride[2] <= 32  # bits
        ]
    seconds = {one: _row_seconds(one, stored, itemsize) for one in found}
    best = min(found, key=seconds.__getitem__, default=None)
    if best is None or seconds[best] == math.inf:
        raise Unsupported(f"no tile holds whole rows of {stored[2]} elements along w")
    return best


def _row_seconds(made: Specialisation, stored: Extents, itemsize: int) -> float:
    """As :func:`sample_seconds`, with what reductions take, and copies of x, one for every tile of channels."""
    seconds = sample_seconds(made, stored, True, itemsize)
    if seconds == math.inf or made.along is None:
        return seconds
    positions = positions_of(made, stored)
    tiling = tile(made, positions, stored[2], itemsize)
    accumulators = math.prod(tiling.counts) * made.rows * made.columns * sum(len(p.residues) for p in made.passes)
    each = copy_cycles(made, tiling, positions) + accumulators * ALONG_CYCLES[made.along]
    return seconds + made.column_tiles * each / CLOCK


def _chosen(kernels: _Kernels, stored: Extents | None, contiguous: bool, itemsize: int) -> Specialisation | None:
    """The fastest for typical sizes, or one that suits ``stored`` much better; None where shared memory does not
    suffice. Arguments as of :func:`specialise`.
    """
    made, usual = kernels.made, kernels.usual
    if usual is not None and stored is not None:
        seconds = {m: sample_seconds(m, stored, contiguous, itemsize) for m in made}
        best = min(made, key=seconds.__getitem__)
        if seconds[best] * WORTH_COMPILING < seconds[usual]:
            return best
    return usual


def _pool_cycles(layer: Layer, columns: int, passes: tuple[Pass, ...], *, merged: bool, exact: bool) -> float:
    """Of a multiprocessor, for 64 positions and a group's channels: products, and a pool outside the matrix units."""
    multiply = cycles(passes, columns, exact=exact) * -(-layer.in_channels // 16) * (PRODUCTS if exact else 1)
    accumulators = 0 if merged else 64 * columns * len(layer.residues)
    return -(-layer.out_channels // columns) * max(multiply, multiply / CONSUMERS + accumulators * POOLED)


def _stacked(classes: _Classes, *, running: bool, anywhere: bool, finite: bool) -> tuple[int, tuple[Pass, ...]]:
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
        for columns in {_columns(width, m) for m in most}:
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
    :func:`specialise`.
    """
    running = pooled and not merged
    _holding(_Classes(layer, merged, exact), running=running, before=before, rows=rows, finite=False)


def _holding(
    classes: _Classes, *, running: bool, before: bool, rows: bool, finite: bool
) -> tuple[int, tuple[Pass, ...]]:
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


def _passes(classes: _Classes, stack: int, columns: int, finite: bool, running: bool) -> tuple[Pass, ...]:
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


def _cycles_of(classes: _Classes, columns: int, running: bool, passes: tuple[Pass, ...]) -> float:
    """Of instructions for 64 positions and 16 input channels; where little is stored, with their part of what runs wait
    for. Elsewhere stores take that time, too: groups of few channels took 476 us in one run, 449 in eight.
    """
    channels, exact = classes.layer.in_channels, classes.exact
    chunk, _ = _memory(channels, exact)[0]
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


def _columns(width: int, most: int) -> int:
    """Output channels per tile: at most ``most``, as few padded ones as possible, then as many as possible."""
    return min(range(8, min(width, most) + 1, 8), key=lambda c: (-(-width // c) * c + 8 * -(-width // c), -c))


def _memory(channels: int, exact: bool) -> list[tuple[int, int]]:
    """(chunk, buffers of x)"""
    padded, parts = -(-channels // 16) * 16, PARTS if exact else 1
    chunks = (chunk for chunk in (64, 32, 16) if chunk // parts >= 16 and padded % (chunk // parts) == 0)
    return [(chunk, buffers) for chunk in chunks for buffers in (2, 1)]


def _usual_rate(made: Specialisation) -> float:
    """How fast a kernel is on outputs of typical sizes, relative to others for a layer; 0 where some do not fit."""
    fit = [best_fit(made, extents) for extents in _TYPICAL]
    return sum(fit) / len(fit) * _speed(made) / _cycles(made) if min(fit) > 0 else 0.0


def _cycles(made: Specialisation) -> float:
    """Of the matrix units for 64 positions and all channels of a group."""
    return max(made.pass_cycles, 1.0) * made.column_tiles


def _speed(made: Specialisation) -> float:
    """How fast a kernel's instructions are, relative to others for the same layer: read off runs on an H100."""
    together = made.m_tiles * made.chunk // 16  # instructions of a step
    if made.by_channel:  # of up to 256 columns each
        together = made.accumulators[0] * made.m_tiles * made.chunk // 16
    speed = {1: 0.7, 2: 0.85, 4: 0.97}.get(together, 1.0)
    if made.exact and made.by_channel:  # 48 channels took longer than products alone tell
        speed *= 0.9
    speed *= (0.85 if made.m_tiles == 1 else 1.0) * (1.0 if made.stages > 3 else 0.97)
    if len(made.passes) > 1:  # x should stay
        waits = 0.96 if made.resident else 0.97
        return speed * (1.0 if made.resident else 0.85) * (1.0 if made.x_buffers > 1 else waits)
    return speed * (1.0 if made.x_buffers > 1 else 0.95)


def sample_seconds(made: Specialisation, stored: Extents, contiguous: bool, itemsize: int) -> float:
    """About the time of a sample and tile of channels on one multiprocessor."""
    positions, row = positions_of(made, stored), stored[2] if contiguous else 0
    try:
        tiling = tile(made, positions, row, itemsize)
    except Unsupported:
        return math.inf
    multiply = multiply_seconds(made, tiling, positions) * made.column_tiles
    return multiply / _speed(made) + store_seconds(made, tiling, positions, row, itemsize)


def positions_of(made: Specialisation, stored: Extents) -> Extents:
    """Of every residue class per dim, or, where these are pooled, of the stored tensor."""
    stride = (1, 1, 1) if made.pooled else made.layer.stride
    d, h, w = (-(-e // s) for e, s in zip(stored, stride, strict=True))
    return d, h, w
