"""Rows of several positions, number by number, as `prepare` and `again` make them: between guards, each once."""

from __future__ import annotations

import pytest
import torch
from emulator.device import Device, _module, emulated, needs_compiler
from rows import rows_of
from torch import Tensor

from fxfuse.kernels.arguments import I32, I64, Samples
from fxfuse.kernels.convolution_engine import _rows_geometry
from fxfuse.kernels.convolution_kernels import BLOCK, Convolution
from fxfuse.kernels.emit import Epilogue
from fxfuse.kernels.launch import Chain, Launch
from fxfuse.kernels.layer import Layer
from fxfuse.kernels.lies import lines_by_quads

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


def made_rows(device: Device, layer: Layer, x: Tensor, name: str) -> tuple[Tensor, Layer]:
    """(N, D, H, W, numbers) that the kernel of that ``name`` makes of x, and the layer that reads them."""
    made = Convolution.of(layer, F32, F32, F32, Epilogue())
    geometry = _rows_geometry(x, made.made, in_place=False)
    sizes = made.made.layer.row_sizes(tuple(x.shape[2:]))  # type: ignore[arg-type]
    shape = x.shape[0], *sizes, made.made.padded_channels * layer.groups
    strides = torch.empty(shape, device="meta").stride()
    rows = device.empty(shape, strides, torch.float16)
    largest = torch.full((x.shape[0], 32), 2.0**14 / SCALE)  # each in front of what follows it
    above = torch.full((x.shape[0],), 2.0**14 / SCALE).view(torch.int32)
    marks, scale = torch.zeros(x.shape[0], dtype=torch.int32), torch.zeros(x.shape[0])
    told = Samples(*(t.data_ptr() for t in (largest, above, marks, scale)), 32, 1)
    kernel = _module(made.source(), ["prepare", "again"]).kernels[name]
    given: list[object] = [I64(x.data_ptr()), I64(rows.data_ptr()), told, geometry]
    if name == "prepare":
        given += [I64(0), I64(0), I64(0), I32(1), I32(1), *[I32(1)] * 5]  # no block packs weights
    Chain([Launch(kernel, geometry.blocks, BLOCK, given)])(0)
    assert torch.equal(scale, torch.full_like(scale, 1 / SCALE))
    device.check(name)
    return rows, made.made.layer


@pytest.mark.parametrize("kernel", ["prepare", "again"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", LAYERS)
def test_rows(name: str, last: bool, kernel: str) -> None:
    layer, sizes = LAYERS[name]
    x = torch.randn(3, layer.in_channels * layer.groups, *sizes)
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    with emulated() as device:
        rows, one = made_rows(device, layer, x, kernel)
    assert one.beside
    expected = torch.zeros(rows.shape)
    for group in range(layer.groups):
        own = x[:, group * layer.in_channels : (group + 1) * layer.in_channels]
        first = group * rows.shape[-1] // layer.groups
        expected[..., first : first + one.in_channels] = rows_of(one, own).movedim(1, -1) * SCALE
    torch.testing.assert_close(rows, expected.half(), rtol=0, atol=0)


def test_four_at_once() -> None:
    """Only where they are neighbours, and 16 bytes that begin where such reads may."""
    x = torch.zeros(2, 3, 4, 5, 8)
    assert lines_by_quads(x)
    assert not lines_by_quads(x.contiguous(memory_format=torch.channels_last_3d))
    assert not lines_by_quads(torch.zeros(2, 3, 4, 5, 6))
    assert not lines_by_quads(torch.zeros(16 * 60 + 1)[1:].view(2, 3, 4, 5, 8))
    assert not lines_by_quads(torch.zeros(64).as_strided((1, 1, 1, 1, 6), (8, 8, 8, 8, 1)))
