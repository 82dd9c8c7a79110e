"""Which kernel a layer gets: of those that `passes` makes for it, with as many rows and buffers, the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math

from fxfuse.kernels.convolution.geometry import Pass, steps_of
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.passes import Classes, buffers_of, columns_of, holding, pool_cycles, stacked
from fxfuse.kernels.convolution.sets import copy_cycles
from fxfuse.kernels.convolution.specialisation import (
    CONSUMERS,
    MOST_TILES,
    ROWS,
    STAGE_BYTES,
    Along,
    Specialisation,
    Unsupported,
)
from fxfuse.kernels.convolution.tiles import Extents, best_fit
from fxfuse.kernels.convolution.tiling import (
    ALONG_CYCLES,
    CLOCK,
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
        classes, running = Classes(layer, merged, exact), pooled and not merged
        if folded:
            return holding(classes, running=running, before=before, rows=rows, finite=finite)
        return stacked(classes, running=running, anywhere=sectors and not running, finite=finite)

    columns, passes = accumulators(merged)
    if merged and not finite:  # no weights are added: the same products, of narrower instructions
        with contextlib.suppress(Unsupported):
            other = accumulators(False)
            of = functools.partial(pool_cycles, layer, exact=exact)
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
        for m_tiles, stages, (chunk, x_buffers) in itertools.product(
            tiles, (4, 3), buffers_of(layer.in_channels, exact)
        )
        if m_tiles < 4 or x_buffers > 1  # two tiles of half the size hide each other's copies
        if stack * columns * chunk * 2 <= STAGE_BYTES
    ]
    return _Kernels(tuple(made))


@functools.lru_cache(maxsize=1024)
def kernels_of_sets(usual: Specialisation, finite: bool) -> tuple[Specialisation, ...]:
    """Kernels for the layer of a ``usual`` one, of which samples lie side by side, as ``sets.py`` has them.

    ``finite``: as of :func:`specialise`.
    """
    layer, classes = usual.layer, Classes(usual.layer, False, usual.exact)
    memory = buffers_of(layer.in_channels, usual.exact)
    width = max(8, -(-layer.out_channels // 8) * 8)
    found = []
    for stack, columns in itertools.product(classes.stacks, {columns_of(width, m) for m in (32, 64, 128, 256)}):
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
            for stages, (chunk, x_buffers) in itertools.product((4, 3), buffers_of(layer.in_channels, exact))
            if along * columns * chunk * 2 <= STAGE_BYTES
        ]
    return _Kernels(tuple(m for m in found if min(best_fit(m, extents) for extents in _TYPICAL) > 0))


def _whole_rows(
    layer: Layer, stored: Extents, itemsize: int, *, pooled: bool, exact: bool, finite: bool
) -> Specialisation:
    """The fastest kernel for outputs of a size whose tiles have whole rows along w; arguments as of :func:`specialise`.

    All classes along w are in a pass, or, where they are pooled, all that there are.
    """
    classes, width = Classes(layer, False, exact), max(8, -(-layer.out_channels // 8) * 8)
    every, most = math.prod(layer.stride), 128 if exact else 256
    held = -(-stored[2] // (1 if pooled else layer.stride[2]) // 8)  # blocks of eight positions along w
    ways = [(m, Along.SHARED) for m in (4, 2, 1)] + [(held, Along.HELD)] * (held * CONSUMERS <= MOST_TILES)
    found: list[Specialisation] = []
    for stack, columns in itertools.product(classes.stacks, {columns_of(width, m) for m in (8, 16, 32, 64, 128)}):
        if stack % layer.stride[2] or (pooled and stack != every) or stack * columns > most:
            continue
        passes = classes.passes(stack, columns, finite=finite, running=pooled)
        found += [
            Specialisation(layer, chunk, columns, passes, m_tiles, stages, buffers, pooled, exact, along=along)
            for (m_tiles, along), stages, (chunk, buffers) in itertools.product(
                ways, (4, 3), buffers_of(layer.in_channels, exact)
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
