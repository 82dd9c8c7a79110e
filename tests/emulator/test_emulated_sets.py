"""Convolutions of which samples lie side by side in the rows of a matrix instruction."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from emulator.device import emulated, needs_compiler
from torch import Tensor

from fxfuse.kernels.convolution import Specialisation
from fxfuse.kernels.convolution_engine import Calls
from fxfuse.kernels.convolution_kernels import Convolution
from fxfuse.kernels.emit import Epilogue
from fxfuse.kernels.layer import Layer

pytestmark = needs_compiler

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE, TWO, NONE = (1, 1, 1), (2, 2, 2), (0, 0, 0)
LIMIT = {F32: 2e-3, F16: 4e-3, BF16: 3e-2}


def convolved(
    layer: Layer,
    x: Tensor,
    sets: dict[str, object],
    *,
    exact: bool = False,
    last: bool = False,
    more: tuple[int, int, int] = NONE,
) -> tuple[Tensor, Tensor, Convolution]:
    """What kernels of ``sets`` make of x, and the same in float64. ``more``: the output's padding."""
    torch.manual_seed(1)
    w = torch.randn(layer.in_channels * layer.groups, layer.out_channels, *layer.kernel).to(x.dtype)
    b = torch.randn(layer.out_channels * layer.groups).to(x.dtype)
    geometry = zip(x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel, more, strict=True)
    extents = tuple((n - 1) * s - 2 * p + e * (k - 1) + m + 1 for n, s, p, e, k, m in geometry)
    layout = "channels_last" if last else "contiguous"
    of = Convolution.of(layer, x.dtype, x.dtype, x.dtype, Epilogue(), layout, exact, extents)
    of = dataclasses.replace(of, made=dataclasses.replace(of.made, by_channel=False, **sets))
    shape = (x.shape[0], layer.out_channels * layer.groups, *extents)
    memory = torch.channels_last_3d if last else torch.contiguous_format
    with emulated(5) as given:
        out = given.empty(shape, torch.empty(shape, device="meta").to(memory_format=memory).stride(), x.dtype)
        Calls(of, extents).run(x, w, b, out)
    how = layer.stride, layer.padding, more, layer.groups, layer.dilation
    return out, F.conv_transpose3d(x.double(), w.double(), b.double(), *how), of


def test_first() -> None:
    layer = Layer(16, 24, 1, (4, 4, 4), TWO, ONE, ONE)
    torch.manual_seed(0)
    x = torch.randn(17, 16, 4, 4, 4)
    for inner in (1, 2):
        got, expected, made = convolved(layer, x, {"samples": 16, "inner": inner})
        assert (got.double() - expected).abs().max() < 2e-3 * expected.abs().max()
