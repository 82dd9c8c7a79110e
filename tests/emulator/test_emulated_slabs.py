"""Convolutions that multiply no padding along d: what they give, and how many products that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, emulated, needs_compiler
from orientation import by_channel_always, by_channel_never, chosen_anew
from test_emulated_folds import LIMIT, assert_near, run_prepared
from torch import Tensor, nn

from fxfuse.kernels.convolution import specialisation
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import CONSUMERS, Specialisation
from fxfuse.kernels.convolution.tiles import Tiling, first_planes
from fxfuse.kernels.runtime.convolution_engine import Calls

pytestmark = needs_compiler

F32, F16 = torch.float32, torch.float16
ONE, NONE = (1, 1, 1), (0, 0, 0)


@pytest.fixture(autouse=True)
def slabs_always() -> Iterator[None]:
    """Slabs are told apart in small layers, too."""
    runs = mock.patch.object(specialisation, "RUN_CYCLES", specialisation.TURN_CYCLES)
    with mock.patch.object(specialisation, "BATCH", 0), runs, chosen_anew():
        yield


def made_for(
    layer: Layer, x: Tensor, *, exact: bool, by_channel: bool, by_slab: bool = False
) -> tuple[Convolution, tuple[int, ...]]:
    """The kernels, and the sizes of what they give. ``by_slab``: x has one buffer, and is copied slab by slab."""
    geometry = zip(x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel, strict=True)
    extents = tuple((n - 1) * s - 2 * p + e * (k - 1) + 1 for n, s, p, e, k in geometry)
    with by_channel_always() if by_channel else by_channel_never():
        made = Convolution.of(layer, x.dtype, x.dtype, x.dtype, Epilogue(), exact=exact, extents=extents)
    if by_slab:
        made = dataclasses.replace(made, made=dataclasses.replace(made.made, x_buffers=1))
    assert made.made.by_channel == by_channel and made.made.slabs > 1 and (made.made.by_slab or not by_slab)
    return made, extents


def check(
    layer: Layer,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    *,
    exact: bool = False,
    by_channel: bool = False,
    by_slab: bool = False,
    seed: int = 7,
) -> tuple[Specialisation, Tiling]:
    """What the kernels give is torch's, of no more products than that needs."""
    torch.manual_seed(0)
    x = torch.randn(2, layer.in_channels * layer.groups, *sizes).to(dtype)
    w = torch.randn(layer.in_channels * layer.groups, layer.out_channels, *layer.kernel).to(dtype)
    b = torch.randn(layer.out_channels * layer.groups).to(dtype)
    made, extents = made_for(layer, x, exact=exact, by_channel=by_channel, by_slab=by_slab)
    shape = (2, layer.out_channels * layer.groups, *extents)
    with emulated(seed) as given:
        out = given.empty(shape, torch.empty(shape, device="meta").stride(), dtype)
        Calls(made, extents).run(x, w, b, out)
    how = layer.stride, layer.padding, 0, layer.groups, layer.dilation
    expected = F.conv_transpose3d(x.double(), w.double(), b.double(), *how)
    limit = 2e-6 if exact else 2e-3 if dtype is F32 else 4e-3
    assert (out.double() - expected).abs().max() < limit * expected.abs().max()
    tiling, _ = made.tiling(extents)
    wanted, every = products(made.made, tiling, sizes[0])
    assert given.products == 2 * layer.groups * made.made.column_tiles * wanted
    assert wanted < every
    return made.made, tiling


def products(made: Specialisation, tiling: Tiling, depth: int) -> tuple[int, int]:
    """Matrix instructions of a sample, group and tile of channels: of steps that read planes of x, and of all."""
    wanted = every = 0
    for first in range(0, tiling.counts[0] * tiling.tile[0], tiling.tile[0]):
        for step in (s for p in made.passes for s in p.steps):
            planes = range(first + step.delta[0], first + step.delta[0] + tiling.tile[0])
            width, columns = made.window(step.count), step.count * made.columns
            count = columns // 64 if made.by_channel else made.m_tiles
            if made.exact:
                count *= (made.m_tiles * 64 if made.by_channel else columns) // width
            wanted, every = wanted + any(0 <= plane < depth for plane in planes) * count, every + count
    each = CONSUMERS * math.prod(tiling.counts[1:]) * made.padded_channels * made.products_of_parts // 16
    return wanted * each, every * each


#: layer, sizes of x, dtype, float32's own accuracy
CASES: dict[str, tuple[Layer, tuple[int, int, int], torch.dtype, bool]] = {
    "padding at both ends": (Layer(16, 64, 1, (5, 3, 3), ONE, NONE, ONE), (3, 6, 19), F16, False),
    "a plane": (Layer(16, 64, 1, (4, 1, 3), ONE, NONE, ONE), (1, 5, 20), F16, False),
    "chunks, tiles of channels": (Layer(40, 136, 1, (3, 3, 2), ONE, NONE, ONE), (4, 5, 19), F16, False),
    "float32, padded": (Layer(24, 64, 1, (5, 2, 2), ONE, (1, 0, 1), ONE), (5, 5, 19), F32, False),
    "float32's own accuracy": (Layer(24, 64, 1, (5, 2, 2), ONE, NONE, ONE), (3, 5, 9), F32, True),
    "groups": (Layer(8, 64, 2, (5, 2, 3), ONE, (1, 0, 1), ONE), (4, 5, 19), F16, False),
    "dilation": (Layer(16, 64, 1, (3, 2, 2), ONE, NONE, (3, 1, 1)), (4, 4, 19), F16, False),
    "passes": (Layer(16, 64, 1, (5, 2, 3), (2, 1, 1), NONE, ONE), (3, 5, 19), F16, False),
    "positions that read nothing": (Layer(16, 64, 1, (2, 2, 2), ONE, NONE, (5, 1, 1)), (2, 4, 20), F16, False),
}  # fmt: skip
#: those of which positions are rows: classes along w read different elements
STRIDED: dict[str, tuple[Layer, tuple[int, int, int], torch.dtype, bool]] = {
    "passes": (Layer(16, 24, 1, (4, 3, 3), (2, 2, 2), ONE, ONE), (3, 15, 16), F16, False),
    "passes, chunks": (Layer(72, 24, 1, (5, 3, 3), (2, 2, 2), NONE, ONE), (2, 15, 15), F32, False),
    "classes without taps": (Layer(16, 24, 1, (3, 2, 2), (2, 2, 2), NONE, (4, 1, 1)), (2, 16, 16), F16, False),
    "a stride beyond the kernel": (Layer(16, 16, 1, (3, 1, 1), (2, 3, 2), NONE, ONE), (2, 3, 9), F16, False),
}  # fmt: skip


@pytest.mark.parametrize("by_channel", [False, True], ids=["positions", "channels"])
@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_multiplied(name: str, by_channel: bool) -> None:
    layer, sizes, dtype, exact = CASES[name]
    check(layer, sizes, dtype, exact=exact, by_channel=by_channel)


@pytest.mark.parametrize("name", STRIDED)
def test_padding_is_not_multiplied_in_passes(name: str) -> None:
    layer, sizes, dtype, exact = STRIDED[name]
    check(layer, sizes, dtype, exact=exact)


#: layer of several chunks of channels, sizes of x, dtype, whether channels are rows, planes that come together
APART: dict[str, tuple[Layer, tuple[int, int, int], torch.dtype, bool, int]] = {
    "planes": (Layer(48, 64, 1, (5, 3, 3), ONE, NONE, ONE), (6, 14, 20), F16, True, 1),
    "two planes at once": (Layer(48, 136, 1, (3, 3, 2), ONE, NONE, ONE), (5, 6, 22), F16, True, 2),
    "positions": (Layer(48, 24, 1, (5, 3, 3), ONE, NONE, ONE), (3, 6, 20), F16, False, 1),
    "float32's own accuracy": (Layer(24, 64, 1, (5, 2, 2), ONE, NONE, ONE), (3, 5, 10), F32, True, 2),
    "passes, groups": (Layer(48, 64, 2, (5, 2, 3), (2, 1, 1), NONE, ONE), (3, 5, 20), F16, True, 2),
    "dilation": (Layer(48, 64, 1, (3, 2, 2), ONE, NONE, (3, 1, 1)), (4, 4, 19), F16, True, 2),
    "positions that read nothing": (Layer(48, 64, 1, (2, 2, 2), ONE, NONE, (5, 1, 1)), (2, 4, 18), F16, True, 2),
    "planes that begin anywhere": (Layer(48, 64, 1, (3, 1, 4), ONE, NONE, ONE), (4, 5, 19), F16, True, 4),
}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", APART)
def test_slabs_are_copied_one_by_one(name: str, seed: int) -> None:
    layer, sizes, dtype, by_channel, together = APART[name]
    made, tiling = check(layer, sizes, dtype, exact=dtype is F32, by_channel=by_channel, by_slab=True, seed=seed)
    assert first_planes(made, tiling) == together


@pytest.mark.parametrize("pool", [nn.AvgPool3d(2), nn.MaxPool3d(2)], ids=str)
def test_pools_of_padding(pool: nn.Module) -> None:
    torch.manual_seed(1)
    convolution = nn.ConvTranspose3d(16, 24, (7, 3, 3), stride=2)
    got, expected, made = run_prepared(nn.Sequential(convolution, pool).eval(), torch.randn(2, 16, 3, 15, 15))
    assert made.convolution is not None and made.schedule.kernel is not None
    tiling, _ = made.convolution.tiling(made.schedule.kernel.sizes)
    assert len(made.convolution.made.passes) == (1 if isinstance(pool, nn.AvgPool3d) else 2)
    wanted, every = products(made.convolution.made, tiling, 3)
    assert wanted < every
    assert_near(got, expected, LIMIT[F32])


TILES, COPIES, WGMMA = "conv_tiles.cuh", "conv_copies.cuh", "conv_wgmma.cuh"
#: what one of the warps leaves out that the other does not, or that it should not
BROKEN = {
    "weights of padding are copied": (COPIES, "(step.d >= slabs.begin && step.d < slabs.end)", "true"),
    "weights that are not copied are not stepped over": (
        COPIES,
        "            ws.template next<Problem::stages>();\n          }\n          from += bytes;",
        "            ws.template next<Problem::stages>();\n            from += bytes;\n          }",
    ),
    "a slab too many is left out": (TILES, "begin = 1 - g.tile_d - first", "begin = 2 - g.tile_d - first"),
    "a slab behind x is left out too early": (TILES, "end = g.in_d - first", "end = g.in_d - first - 1"),
    "a slab behind x is read": (TILES, "end = g.in_d - first", "end = g.in_d - first + 1"),
    "no product at all": (WGMMA, " && Problem::slabs == 1) || begin < end) {", ") || begin < end) {"),
    "x, by slab, is not waited for": (WGMMA, "barrier_wait(&barriers.x_full[came], apart.phase(came))", ""),
    "x, by slab, is overwritten": (COPIES, "barrier_wait(&barriers.x_empty[k], ring.phase(k) ^ 1);", ""),
    "x, by slab, is given back early": (WGMMA, "gone + g.first_planes <= slab;", "gone + g.first_planes <= slab + 1;"),
    "phases, by slab, of those left out": (WGMMA, "next(SlabRing::first(g, slabs), came);", "next(0, Problem::slabs);"),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    with device.broken(*BROKEN[why]), pytest.raises((AssertionError, EmulationError)):
        _some(why)


def _some(why: str) -> None:
    """Of the tests above those that should see it."""
    if "by slab" in why:
        for seed in range(8):
            test_slabs_are_copied_one_by_one("planes", seed)
    else:
        test_padding_is_not_multiplied(
            "positions that read nothing" if "no product" in why else "float32, padded", True
        )
