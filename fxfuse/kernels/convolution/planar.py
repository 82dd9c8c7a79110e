"""Kernels for layers of few input channels that read x as it lies: which, and whether they are faster. Pure.

What prepares x for the other kernels reads all of it and writes rows of 16 numbers per position, however few channels
there are; such a kernel reads x alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from fxfuse.kernels.convolution.adapted import seconds_of
from fxfuse.kernels.convolution.geometry import ONE, Pass, Residue, Tap, steps_of_sum, sum_of
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import PLANE_UNIT, Specialisation, Unsupported
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiles import Extents

#: input channels up to which that is looked at; taps that are added up, which lie in constant memory; and shared memory
#: that weights may take
MOST_CHANNELS, MOST_TAPS, MOST_FACTORS = 8, 2**14, 65536
#: how much faster such a kernel must be by estimate; times which where it reduces classes to a maximum, or channels:
#: then it takes longer than the estimate knows. By that it was 1.15 to 1.41 times as fast as a kernel of rows, and
#: took 1.16 to 1.39 times as long
WORTH_IT, REDUCING = 1.03, 1.5
#: rows of matrix instructions per warpgroup, times 64; and accumulators of a thread
TILES, MOST_ACCUMULATORS = (8, 4, 2, 1), 128


def possible(x: Sequence[int | None], strides: Sequence[int], itemsize: int) -> bool:
    """Whether an x (N, C, ...) of numbers of ``itemsize`` bytes may be copied as it lies.

    Also its width: an x of these strides that begins elsewhere is copied first, without holes.
    """
    channels, width, unit = x[1] or 0, x[-1] or 0, PLANE_UNIT // itemsize
    few, *others = channels <= MOST_CHANNELS, width, *strides[:-1]
    return few and strides[-1] == 1 and all(n % unit == 0 for n in others)


def as_planes(
    made: Specialisation,
    samples: int,
    stored: Extents,
    row: int,
    itemsize: int,
    *,
    keeps: bool,
    step: Extents = ONE,
    of: int = 4,
) -> Specialisation:
    """The kernel for a layer like ``made`` that reads x as it lies.

    ``step``: positions per dim whose sum makes one value. ``of``: bytes of a number of x. The others as of
    :func:`~fxfuse.kernels.convolution.adapted.seconds_of`. Raises Unsupported where there is none.
    """
    layer = made.layer
    if step != ONE:
        if not made.merged:
            raise Unsupported("classes that are no sum have no sum of positions")
        if layer.volume * math.prod(step) > MOST_TAPS:
            raise Unsupported(f"{layer.volume} taps of {math.prod(step)} positions are too many (at most {MOST_TAPS})")
        made = dataclasses.replace(made, passes=(_sum_of(layer, step),), step=step)
    if made.exact or made.column_tiles * layer.groups * layer.joined > 1 or layer.beside or made.by_channel:
        raise Unsupported("weights of several tiles of channels do not stay in shared memory")
    ways = [
        dataclasses.replace(made, planar=of, chunk=layer.in_channels, stages=1, x_buffers=2, m_tiles=m_tiles)
        for m_tiles in TILES
        if m_tiles * 2 * made.residues <= 32 and m_tiles * made.residues * made.columns <= 2 * MOST_ACCUMULATORS
        if not (made.pooled and not made.merged) or m_tiles <= made.m_tiles
    ]
    if not ways:
        raise Unsupported(f"{made.residues * made.columns} accumulators of a position are too many")
    if layer.in_channels > MOST_CHANNELS:
        raise Unsupported(
            f"rows of {layer.in_channels} input channels are worth making (planes of at most {MOST_CHANNELS})"
        )
    if ways[0].stage_bytes > MOST_FACTORS:
        raise Unsupported(f"weights take {ways[0].stage_bytes} bytes (at most {MOST_FACTORS})")

    time = functools.partial(seconds_of, samples=samples, stored=stored, row=row, itemsize=itemsize, keeps=keeps)
    best = min(ways, key=time)
    if time(best) == math.inf:
        raise Unsupported("x of a tile does not fit into shared memory")
    return best


def _sum_of(layer: Layer, step: Extents) -> Pass:
    """All classes of so many positions as one class."""
    places = itertools.product(*map(range, step))
    taps = [
        Tap(t.index, (t.delta[0] + d, t.delta[1] + h, t.delta[2] + w))
        for d, h, w in places
        for t in sum_of(layer.residues).taps
    ]
    one = Residue((0, 0, 0), tuple(taps))
    return Pass((one,), steps_of_sum(one, added=True))


@functools.lru_cache(maxsize=1024)
def takes(layer: Layer, samples: int, stored: Extents, step: Extents, itemsize: int) -> bool:
    """Whether there is a kernel that makes a sum of so many positions per dim, of ``samples`` whose sums have the sizes
    ``stored``; of numbers of ``itemsize`` bytes.
    """
    with contextlib.suppress(Unsupported):
        made = specialise(layer, pooled=True, summed=True, contiguous=True, finite=True, stored=stored)
        as_planes(made, samples, stored, stored[2], itemsize, keeps=True, step=step, of=itemsize)
        return True
    return False
