"""Rows of x that hold the channels of several positions: for layers of so few channels that rows are mostly padding.

A matrix instruction multiplies 16 numbers of a row. Where three of them are channels, those of the neighbours that
other taps read take no more room, and one product stands for those taps. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Specialisation, Unsupported
from fxfuse.kernels.convolution.specialise import sample_seconds, specialise
from fxfuse.kernels.convolution.tiles import Extents
from fxfuse.kernels.convolution.tiling import PROCESSORS, ROWS_RATE

#: numbers in a row, at most, where it holds several positions: what an instruction multiplies
MOST_NUMBERS = 16
#: how much faster a kernel must be by estimate for that: its rows take more instructions to make
WORTH_IT = 1.03
#: positions of a sample for which that is estimated
TYPICAL = (32, 32, 32)


def fastest(layer: Layer, *, stored: Extents | None, **how: Any) -> Specialisation:
    """The kernel for a layer of finite values, rows of several positions among the ways: sizes do not tell which.

    Arguments as of :func:`~fxfuse.kernels.specialise.specialise`, and what it raises.
    """
    others = [*side_by_side(layer)]
    if others:
        found = {one: _seconds(one, **how) for one in (layer, *others)}
        best = min(found, key=found.__getitem__)
        layer = best if found[best] * WORTH_IT < found[layer] else layer
    return specialise(layer, finite=True, stored=stored, **how)


def _seconds(layer: Layer, *, contiguous: bool, itemsize: int, **how: Any) -> float:
    """Of one multiprocessor, for a sample of typical size, its rows included; infinite where there is no kernel."""
    try:
        made = specialise(layer, finite=True, contiguous=contiguous, itemsize=itemsize, **how)
    except Unsupported:
        return math.inf
    rows = math.prod(layer.row_sizes(TYPICAL)) * made.padded_channels * made.parts * 2
    stride = (1, 1, 1) if made.pooled else layer.stride
    d, h, w = (n * s for n, s in zip(TYPICAL, stride, strict=True))
    return sample_seconds(made, (d, h, w), contiguous, itemsize) + rows * PROCESSORS / ROWS_RATE


def side_by_side(layer: Layer) -> Iterator[Layer]:
    """The layer with positions along w in a row; along h, too; and along all dims."""
    before = layer
    for dims in ((2,), (1, 2), (0, 1, 2)) if layer.joined == 1 else ():
        found = layer.side_by_side(dims)
        if found.in_channels <= MOST_NUMBERS and len(found.offsets) > len(before.offsets):
            yield found
            before = found
