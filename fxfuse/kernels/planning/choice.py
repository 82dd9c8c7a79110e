"""Whether the engine's kernel or torch's own convolution is the faster: rules read off a sweep over layers.

The sweep is ``benchmarks/layers.py``; its results lie in ``benchmarks/results/h100_layers.json``. Layers of the kinds
that lost are refused, and the rest is taken. Of cuDNN's time there is an estimate for stride 1 alone, where its kernels
come near to what the matrix units give.
"""

from __future__ import annotations

import math

import torch

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.convolution.geometry import ONE
from fxfuse.kernels.convolution.specialisation import Specialisation
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiling import seconds, tile
from fxfuse.kernels.stages.steps import Launch

#: below this estimate a call is launches and nothing else, and cuDNN has fewer of them: for a convolution alone; where
#: other operators are behind it, which the kernel takes as well; for a grouped one, of which cuDNN makes little
LEAST_SECONDS, LEAST_SECONDS_CHAIN, LEAST_SECONDS_GROUPED = 1.8e-5, 1.6e-5, 1.6e-5
#: in channels_last_3d, for 16-bit numbers where a kernel has no more taps than its stride has outputs, so that cuDNN
#: multiplies, and that is all
LEAST_SECONDS_APART = 2.7e-5
#: output channels up to which cuDNN has other kernels than for many, which float32 with many products per output makes
#: fast
FEW, MANY_PRODUCTS = 4, 10_000
#: part of a tile's rows that are positions of the output, below which float32 with stride 1 is compared, too
LEAST_FIT = 0.55
#: cuDNN with stride 1 at its best: operations per second by the bytes of an element; input channels that it multiplies
#: at once, and columns of its tiles; bytes per second as it brings contiguous tensors to channels_last_3d and back
CUDNN_RATE, CUDNN_DEPTH, CUDNN_COLUMNS, CUDNN_TRANSPOSES = {2: 6e14, 4: 4e14}, 32, 128, 2.4e12
#: seconds of its shortest calls for contiguous tensors, which are several kernels
CUDNN_LEAST = 3e-5
#: part of that time from which on the kernel's estimate is as long; and where x is multiplied as it lies
AS_FAST, AS_FAST_IN_PLACE = 0.9, 0.85


def slower(kernel: Launch, made: Specialisation, batch: int, sizes: tuple[int, int, int]) -> str | None:
    """Why torch's own convolution is expected to be at least as fast, or None. ``sizes`` of x, three of them."""
    layer, extents = made.layer, kernel.sizes
    row = extents[2] if kernel.layout == "contiguous" else 0
    last = kernel.layout == "channels_last"
    if batch == 0 or 0 in extents:
        return "there is nothing to compute"
    if kernel.step != ONE:
        return None  # of all that cuDNN makes, little is stored
    itemsize = kernel.kind.dtype.itemsize
    estimate = seconds(_apart(kernel, made), batch, sizes, extents, row, itemsize)  # as if rows were made of x
    taps, steps, grouped = math.prod(layer.kernel), math.prod(layer.stride), layer.groups * layer.joined > 1
    if grouped and taps > max(4, steps) and estimate > LEAST_SECONDS_GROUPED:
        return None
    chain = bool(kernel.combine) or kernel.gathers or kernel.reduces or len(kernel.stages) > 2
    narrow = kernel.dtype is not torch.float32
    least = LEAST_SECONDS_APART if narrow and last and taps <= steps else LEAST_SECONDS
    if estimate < (LEAST_SECONDS_CHAIN if chain else least):
        return f"the layer is small: {estimate * 1e6:.0f} us by estimate, less than launches are worth"
    channels = layer.channels * layer.joined
    if layer.out_channels <= FEW and not narrow:
        idle = f"{layer.out_channels} output channels leave the matrix units idle"
        if channels * taps > MANY_PRODUCTS * steps or (made.exact and (layer.out_channels == 1 or steps == 1)):
            return idle
    if kernel.combine or kernel.reduces or steps > 1:
        return None
    if taps == 1 and 2 * layer.out_channels <= channels and not (narrow and last) and not kernel.gathers:
        return f"a kernel of {layer.kernel} is bound by reading its input, in cuDNN as here"
    if (taps == 1 and last) or kernel.gathers or made.exact or (grouped and kernel.in_place):
        return None
    if not narrow and _fit(kernel, made, batch) >= LEAST_FIT:
        return None
    ours, fast = estimate, AS_FAST
    if kernel.in_place:
        ours, fast = seconds(made, batch, sizes, extents, row, itemsize, in_place=True), AS_FAST_IN_PLACE
    if ours > fast * _cudnn(kernel, made, batch, sizes):
        return f"cuDNN convolves {DTYPE_NAMES[kernel.dtype]} with stride 1 as fast"
    return None


def _fit(kernel: Launch, made: Specialisation, batch: int) -> float:
    """Part of the tiles' rows that are positions of the output."""
    d, h, w = kernel.sizes
    row = w if kernel.layout == "contiguous" else 0
    tiling = tile(made, (d, h, w), row, kernel.kind.dtype.itemsize)
    return tiling.fit((d, h, w)) * batch / (-(-batch // made.samples) * made.samples)


def _cudnn(kernel: Launch, made: Specialisation, batch: int, sizes: tuple[int, int, int]) -> float:
    """Seconds that cuDNN takes at least for a convolution of stride 1."""
    layer, itemsize = made.layer, kernel.dtype.itemsize
    outputs, channels = batch * math.prod(kernel.sizes), layer.channels * layer.joined
    depth, columns = -(-channels // CUDNN_DEPTH) * CUDNN_DEPTH, -(-layer.out_channels // CUDNN_COLUMNS) * CUDNN_COLUMNS
    products = layer.groups * outputs * depth * columns * math.prod(layer.kernel)
    found = 2 * products / CUDNN_RATE[itemsize]
    if kernel.layout == "channels_last":
        return found
    elements = layer.groups * (batch * math.prod(sizes) * channels + outputs * layer.out_channels)
    return max(found + 2 * itemsize * elements / CUDNN_TRANSPOSES, CUDNN_LEAST)  # read and written


def _apart(kernel: Launch, made: Specialisation) -> Specialisation:
    """The kernel with all residue classes and taps, which tells how large a layer is: cuDNN makes all of them."""
    if not (made.merged or made.layer.beside or made.planar):
        return made
    return specialise(
        made.layer.apart,
        pooled=made.pooled,
        exact=made.exact,
        contiguous=kernel.layout == "contiguous",
        finite=kernel.dtype is torch.float32,
        stored=kernel.sizes,
        itemsize=kernel.kind.dtype.itemsize,
    )
