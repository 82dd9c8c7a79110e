"""Run a :class:`Correlation` on a Hopper GPU: the workspace and the two launches of a call."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.convolution.correlation import CHANNELS, TILE_ELEMENTS, Correlation
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.convolution.tiles import Extents
from fxfuse.kernels.runtime import memory
from fxfuse.kernels.runtime.launch import Module, sender, stream_of

KERNELS = ("correlate", "moments")
#: threads of their blocks
BLOCK, MOMENTS_BLOCK = 128, 512
#: blocks of a grid
MOST = 2**31 - 1
#: ``Strides``, ``DirectGeometry`` and ``Size`` of ``cuh/``
_STRIDES, _DIRECT, _SIZES = struct.Struct("=5q"), struct.Struct("=5q4i3q"), struct.Struct("=3i")

#: fills the moments (N, 1, Cout, 3), in float64, at an address, from x (N, Cin, D, H, W), the weights and the bias
Run = Callable[[Tensor, Tensor, Tensor | None, int], None]


def prepare(made: Correlation, x: Tensor, extents: Extents, *, follows: bool = False) -> Run:
    """The launches for x of these sizes and strides, and an output of these ``extents``.

    ``follows``: as of ``Chain``. They are queued on the current stream of the current device, x's. For any thread.
    Raises Unsupported where there is no plan for the sizes, or more blocks than a grid has.
    """
    layer, index = made.layer, x.device.index
    n, _, d, h, w = x.shape
    parts, work = made.parts((d, h, w), extents), made.work(n, (d, h, w), extents)
    if work.blocks > MOST:
        raise Unsupported(f"{tuple(x.shape)} takes {work.blocks} blocks (at most {MOST})")
    kernels = _module(made.source(), KERNELS, index).kernels
    strides, table = _STRIDES.pack(*x.stride()), parts.packed()
    sizes, out = _SIZES.pack(d, h, w), _SIZES.pack(*extents)
    direct = _DIRECT.pack(*x.stride(), d, h, w, n, 0, 0, layer.out_channels * layer.groups)
    which, channels = n * layer.groups, struct.pack("=i", layer.out_channels)
    correlate = sender(
        kernels["correlate"], parts.blocks * which, BLOCK, "q", strides, sizes, table, "q",
        shared=TILE_ELEMENTS * 4, follows=follows,
    )  # fmt: skip
    finish = sender(
        kernels["moments"], which * -(-layer.out_channels // CHANNELS), MOMENTS_BLOCK,
        "q", "q", "q", direct, table, out, channels, "q", "q", "q", follows=True,
    )  # fmt: skip

    words, before_sums = (work.products + work.sums,), work.products * 8

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, moments: int) -> None:
        stream, weight = stream_of(index), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        room = memory.empty(words, (1,), torch.float64)
        products = room.data_ptr()
        sums = products + before_sums
        x_at, weight_at, bias_at = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        correlate(stream, x_at, products)
        finish(stream, x_at, weight_at, bias_at, products, sums, moments)

    return run


@functools.lru_cache(maxsize=1024)
def _module(source: str, names: tuple[str, ...], device: int) -> Module:
    with torch.cuda.device(device):
        return Module(compile_cubin(source).code, names)
