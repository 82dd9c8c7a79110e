"""Rows of several positions, number by number, as `prepare` and `again` make them: between guards, each once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from emulator.device import Device, _module, emulated, needs_compiler
from rows import rows_of
from torch import Tensor

from fxfuse.kernels.convolution.arguments import I32, I64, Samples
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import BLOCK, Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.lies import lines_by_quads
from fxfuse.kernels.runtime.convolution_engine import _rows_geometry
from fxfuse.kernels.runtime.launch import Chain, Launch

pytestmark = needs_compiler

F32, ONE = torch.float32, (1, 1, 1)
#: a power of two that values are multiplied by
SCALE = 2.0**12
#: layers, and sizes of x: quads that end with a row of x and do not, more rows than x has and fewer
LAYERS = {
    "along w": (Layer(3, 16, 1, (3, 3, 3), ONE, ONE, ONE), (2, 3, 8)),
    "along w, fewer": (Layer(3, 16, 1, (3, 3, 3), ONE, (2, 2, 2), ONE), (2, 2, 7)),
    "along h and w": (Layer(3, 16, 1, (3, 3, 3), (2, 2, 2), ONE, ONE), (2, 5, 12)),
    "all dims": (Layer(1, 8, 1, (3, 3, 3), (2, 2, 2), (0, 1, 2), ONE), (3, 4, 9)),
    "holes, groups": (Layer(4, 40, 3, (3, 3, 3), ONE, ONE, (1, 1, 5)), (2, 3, 16)),
}


def rows_by(device: Device, made: Convolution, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(N, D, H, W, numbers) that the kernel of that ``name`` makes of x, and the samples' marks. Scaled, of float32."""
    layer, scaled = made.made.layer, x.dtype is F32
    geometry = _rows_geometry(x, made.made, in_place=False)
    sizes = layer.row_sizes(tuple(x.shape[2:]))  # type: ignore[arg-type]
    shape = x.shape[0], *sizes, made.made.padded_channels * layer.groups
    strides = torch.empty(shape, device="meta").stride()
    rows = device.empty(shape, strides, torch.float16 if scaled else x.dtype)
    largest = torch.full((x.shape[0], 32), 2.0**14 / SCALE)  # each in front of what follows it
    above = torch.full((x.shape[0],), 2.0**14 / SCALE).view(torch.int32)
    marks, scale = torch.zeros(x.shape[0], dtype=torch.int32), torch.zeros(x.shape[0])
    told = Samples(*(t.data_ptr() for t in (largest, above, marks, scale)), 32, 1)
    kernel = _module(made.source(), ["prepare", "again"] if scaled else ["prepare"]).kernels[name]
    given: list[object] = [I64(x.data_ptr()), I64(rows.data_ptr()), told, geometry]
    if name == "prepare":
        given += [I64(0), I64(0), I64(0), I32(1), I32(1), *[I32(1)] * 5]  # no block packs weights
        given += [] if scaled else [I64(0), I64(0), I32(0)]  # nor is there a bias
    Chain([Launch(kernel, geometry.blocks, BLOCK, given)])(0)
    assert torch.equal(scale, torch.full_like(scale, 1 / SCALE if scaled else 0))
    device.check(name)
    return rows, marks


def expected_rows(made: Convolution, x: Tensor) -> Tensor:
    one = made.made.layer
    shape = *one.row_sizes(tuple(x.shape[2:])), made.made.padded_channels * one.groups  # type: ignore[arg-type]
    expected = torch.zeros(x.shape[0], *shape)
    for group, own in enumerate(x.float().chunk(one.groups, 1)):
        first = group * made.made.padded_channels
        expected[..., first : first + one.in_channels] = rows_of(one, own).movedim(1, -1)
    return expected


@pytest.mark.parametrize("kernel", ["prepare", "again"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", LAYERS)
def test_rows(name: str, last: bool, kernel: str) -> None:
    layer, sizes = LAYERS[name]
    x = torch.randn(3, layer.in_channels * layer.groups, *sizes)
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    made = Convolution.of(layer, F32, F32, F32, Epilogue())
    with emulated() as device:
        rows, _ = rows_by(device, made, x, kernel)
    assert made.made.layer.beside
    torch.testing.assert_close(rows, (expected_rows(made, x) * SCALE).half(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_16_bit_numbers(name: str, last: bool, dtype: torch.dtype) -> None:
    """As they are; a sample that is not finite is marked, and no other."""
    layer, sizes = LAYERS[name]
    x = torch.randn(3, layer.in_channels * layer.groups, *sizes).to(dtype)
    x[1, -1, -1, -1, -1] = math.inf
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    of_float32 = Convolution.of(layer, F32, F32, F32, Epilogue())
    watched = dataclasses.replace(of_float32.made, watched=True)
    made = dataclasses.replace(of_float32, made=watched, dtype=dtype, output=dtype, bias=dtype)
    with emulated() as device:
        rows, marks = rows_by(device, made, x, "prepare")
    expected = expected_rows(made, x.masked_fill(~x.isfinite(), 0)).to(dtype)
    torch.testing.assert_close(rows.masked_fill(rows.isinf(), 0), expected, rtol=0, atol=0)
    assert (marks != 0).tolist() == [False, True, False]


def test_four_at_once() -> None:
    """Only where they are neighbours, and bytes of four that begin where such reads may."""
    x = torch.zeros(2, 3, 4, 5, 8)
    assert lines_by_quads(x)
    halves = torch.zeros(16 * 60 + 4, dtype=torch.float16)
    assert lines_by_quads(halves[4:].view(2, 3, 4, 5, 8))
    assert not lines_by_quads(halves[2:-2].view(2, 3, 4, 5, 8))
    assert not lines_by_quads(x.contiguous(memory_format=torch.channels_last_3d))
    assert not lines_by_quads(torch.zeros(2, 3, 4, 5, 6))
    assert not lines_by_quads(torch.zeros(16 * 60 + 1)[1:].view(2, 3, 4, 5, 8))
    assert not lines_by_quads(torch.zeros(64).as_strided((1, 1, 1, 1, 6), (8, 8, 8, 8, 1)))
