"""Whether the engine's kernel or torch's own convolution is the faster: rules read off a sweep over layers.

The sweep is ``benchmarks/layers.py``; its results lie in ``benchmarks/results/h100_layers.json``. An estimate
of cuDNN's time would be a guess, so layers of the kinds that lost are refused, and the rest is taken.
"""

from __future__ import annotations

import math

import torch

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.convolution import Specialisation
from fxfuse.kernels.geometry import ONE
from fxfuse.kernels.specialise import specialise
from fxfuse.kernels.steps import Launch
from fxfuse.kernels.tiling import seconds, tile

#: below this estimate a call is launches and nothing else, and cuDNN has fewer of them
LEAST_SECONDS = 1.8e-5
#: the same where other operators are behind the convolution, which the kernel takes as well
LEAST_SECONDS_CHAIN = 1.6e-5
#: part of a tile's rows that are positions of the output
LEAST_FIT = 0.55
#: the same for grouped convolutions, of which cuDNN makes little
LEAST_SECONDS_GROUPED = 1.6e-5
#: taps of a kernel from which on 16-bit convolutions of stride 1 win over cuDNN's; and where there are fewer output
#: channels than cuDNN's tiles have
LARGE_KERNEL, LARGE_KERNEL_NARROW, NARROW = 64, 27, 64


def slower(kernel: Launch, made: Specialisation, batch: int, sizes: tuple[int, int, int]) -> str | None:
    """Why torch's own convolution is expected to be at least as fast, or None. ``sizes`` of x, three of them."""
    layer, extents = made.layer, kernel.sizes
    row = extents[2] if kernel.layout == "contiguous" else 0
    last = kernel.layout == "channels_last"
    if batch == 0 or 0 in extents:
        return "there is nothing to compute"
    itemsize = kernel.kind.dtype.itemsize
    if kernel.step != ONE:
        return None  # of all that cuDNN makes, little is stored
    estimate = seconds(_apart(kernel, made), batch, sizes, extents, row, itemsize)
    enough = math.prod(layer.kernel) > max(4, math.prod(layer.stride))
    if layer.groups * layer.joined > 1 and enough and estimate > LEAST_SECONDS_GROUPED:
        return None
    folds = kernel.fold is not None
    little = bool(kernel.combine) or (kernel.fold is not None and not kernel.fold.keeps)  # of it is stored
    chain = bool(kernel.combine) or kernel.gathers or folds or len(kernel.stages) > 2
    if estimate < (LEAST_SECONDS_CHAIN if chain else LEAST_SECONDS):
        return f"the layer is small: {estimate * 1e6:.0f} us by estimate, less than launches are worth"
    if math.prod(layer.kernel) < math.prod(layer.stride) and not little:
        return f"a kernel of {layer.kernel} and a stride of {layer.stride} leave outputs that no tap reaches"
    step = layer.stride if not kernel.combine else (1, 1, 1)
    d, h, w = (-(-e // s) for e, s in zip(extents, step, strict=True))
    tiling = tile(made, (d, h, w), row, itemsize)
    whole_sets = -(-batch // made.samples) * made.samples
    if tiling.fit((d, h, w)) * batch / whole_sets < LEAST_FIT and not made.exact:
        return f"an output of {extents} leaves most rows of the tiles unused"
    narrow = kernel.dtype is not torch.float32
    if layer.stride[2] > 2 and (narrow or not last) and not little:
        return f"a stride of {layer.stride[2]} along w scatters what is stored"
    if layer.out_channels <= 4 and layer.channels * layer.joined >= 32:
        return f"{layer.out_channels} output channels leave the matrix units idle"
    if math.prod(layer.kernel) <= 4 and not (kernel.combine or folds):
        return f"a kernel of {layer.kernel} is bound by memory, in cuDNN as here"
    large = LARGE_KERNEL_NARROW if layer.out_channels < NARROW else LARGE_KERNEL
    if (
        narrow
        and math.prod(layer.stride) == 1
        and math.prod(layer.kernel) < large
        and not (kernel.combine or kernel.gathers or folds)
    ):
        return f"cuDNN convolves {DTYPE_NAMES[kernel.dtype]} with stride 1 as fast"
    return None


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
