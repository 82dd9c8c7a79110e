"""Convolutions of which samples lie side by side in the rows of a matrix instruction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, emulated, needs_compiler
from orientation import chosen_anew, of_sets, sets_always
from test_emulated_folds import LIMIT, Then, assert_near, layer, run_prepared
from torch import Tensor, nn

from fxfuse.kernels.convolution import specialisation
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Specialisation
from fxfuse.kernels.convolution.tiling import Store
from fxfuse.kernels.runtime.convolution_engine import Calls

pytestmark = needs_compiler

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE, TWO, NONE = (1, 1, 1), (2, 2, 2), (0, 0, 0)
UP = Layer(16, 24, 1, (4, 4, 4), TWO, ONE, ONE)
Sizes = tuple[int, int, int]
Chosen = Callable[[Specialisation], bool]


def anyone(_: Specialisation) -> bool:
    return True


def with_sets(of: Convolution, extents: Sizes, chosen: Chosen, **sets: Any) -> Convolution:
    """The first kernel with such ``sets`` that is ``chosen``."""
    row = 0 if of.layout == "channels_last" else extents[2]
    usual = dataclasses.replace(of.made, by_channel=False)
    ways = of_sets(usual, of.dtype is F32, extents, row)
    made = next(w for w in ways if all(getattr(w, k) == v for k, v in sets.items()) and chosen(w))
    return dataclasses.replace(of, made=made)


def convolved(
    layer: Layer,
    x: Tensor,
    chosen: Chosen = anyone,
    *,
    exact: bool = False,
    last: bool = False,
    more: Sizes = NONE,
    seed: int = 5,
    **sets: Any,
) -> tuple[Tensor, Tensor, Convolution]:
    """What kernels with such ``sets`` make of x, and the same in float64. ``more``: the output's padding."""
    torch.manual_seed(1)
    w = torch.randn(layer.in_channels * layer.groups, layer.out_channels, *layer.kernel).to(x.dtype)
    b = torch.randn(layer.out_channels * layer.groups).to(x.dtype)
    geometry = zip(x.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel, more, strict=True)
    d, h, width = ((n - 1) * s - 2 * p + e * (k - 1) + m + 1 for n, s, p, e, k, m in geometry)
    layout = "channels_last" if last else "contiguous"
    of = Convolution.of(layer, x.dtype, x.dtype, x.dtype, Epilogue(), layout, exact, (d, h, width))
    of = with_sets(of, (d, h, width), chosen, **sets)
    shape = (x.shape[0], layer.out_channels * layer.groups, d, h, width)
    memory = torch.channels_last_3d if last else torch.contiguous_format
    with emulated(seed) as given:
        out = given.empty(shape, torch.empty(shape, device="meta").to(memory_format=memory).stride(), x.dtype)
        Calls(of, (d, h, width)).run(x, w, b, out)
    how = layer.stride, layer.padding, more, layer.groups, layer.dilation
    return out, F.conv_transpose3d(x.double(), w.double(), b.double(), *how), of


def near(got: Tensor, expected: Tensor, exact: bool = False) -> None:
    """Every sample by itself: a large one hides nothing."""
    limit = 2e-6 if exact else LIMIT[got.dtype]
    for one, other in zip(got.double(), expected, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


def drawn(batch: int, channels: int, *sizes: int, dtype: torch.dtype = F32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, channels, *sizes).to(dtype)


# --- sizes, batches and ways ----------------------------------------------------------------------
@pytest.mark.parametrize("inner", [1, 2], ids=["h", "w"])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("batch", [8, 9, 17, 64])
def test_batches(batch: int, size: int, inner: int) -> None:
    near(*convolved(UP, drawn(batch, 16, 2, 3, 4), samples=size, inner=inner)[:2])


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 1, 5), (1, 4, 4), (2, 5, 3), (3, 1, 2), (4, 4, 4), (5, 5, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_sizes(sizes: Sizes, dtype: torch.dtype) -> None:
    for inner in (1, 2):
        near(*convolved(UP, drawn(9, 16, *sizes, dtype=dtype), samples=16, inner=inner)[:2])


#: layer, sizes of x, how the kernel is made
LAYERS: dict[str, tuple[Layer, Sizes, dict[str, Any]]] = {
    "stride 1": (Layer(16, 24, 1, (3, 3, 3), ONE, ONE, ONE), (3, 4, 4), {}),
    "stride 3": (Layer(16, 8, 1, (4, 3, 5), (3, 2, 3), (1, 0, 2), ONE), (2, 3, 4), {}),
    "a stride along d": (Layer(16, 8, 1, (4, 3, 3), (2, 1, 1), ONE, ONE), (2, 3, 4), {}),
    "dilation": (Layer(16, 24, 1, (3, 2, 3), TWO, NONE, (1, 3, 2)), (2, 3, 4), {}),
    "groups": (Layer(16, 24, 2, (3, 3, 3), TWO, ONE, ONE), (3, 3, 3), {}),
    "output padding": (Layer(16, 24, 1, (3, 3, 3), TWO, ONE, ONE), (3, 4, 4), {"more": ONE}),
    "channels that leave columns": (Layer(24, 20, 1, (4, 4, 4), TWO, ONE, ONE), (2, 4, 4), {}),
    "chunks": (Layer(72, 24, 1, (3, 3, 3), TWO, ONE, ONE), (3, 4, 3), {}),
    "tiles of channels": (Layer(16, 136, 1, (3, 3, 3), TWO, ONE, ONE), (3, 2, 3), {}),
    "float32's own accuracy": (Layer(24, 24, 1, (4, 4, 4), TWO, ONE, ONE), (3, 4, 4), {"exact": True}),
    "cut off": (Layer(16, 24, 1, (4, 4, 4), TWO, (2, 3, 2), ONE), (3, 4, 4), {}),
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype, last: bool) -> None:
    layer, sizes, how = LAYERS[name]
    if how.get("exact") and dtype is not F32:
        return
    x = drawn(19, layer.in_channels * layer.groups, *sizes, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    for size, inner in ((8, 1), (16, 2)):
        got, expected, _ = convolved(layer, x, samples=size, inner=inner, last=last, **how)
        near(got, expected, bool(how.get("exact")))


def test_bfloat16() -> None:
    near(*convolved(UP, drawn(17, 16, 3, 4, 4, dtype=BF16), samples=16, inner=1)[:2])


# --- what a kernel may be -------------------------------------------------------------------------
#: of a layer of several chunks of channels: what its kernel is, and how results are stored, inner dim h
WAYS: dict[str, tuple[Chosen, Store | None]] = {
    "a pass per tile": (lambda m: m.by_pass and not m.by_slab, None),
    "all passes in a tile": (lambda m: not m.by_pass and len(m.passes) > 1, None),
    "slab by slab, several runs": (lambda m: m.by_slab and runs(m) > 1 and m.residues > 4, None),
    "slab by slab, one run": (lambda m: m.by_slab and runs(m) == 1, None),
    "slab by slab, a pass per tile": (lambda m: m.by_slab and m.by_pass and runs(m) > 1, None),
    "slab by slab, all classes": (lambda m: m.by_slab and m.residues == 8 and runs(m) > 4, None),
    "two positions at once": (lambda m: m.m_tiles == 2 and m.residues == 2, Store.WIDE),
    "two times two positions": (lambda m: m.m_tiles == 4 and m.residues == 2, Store.WIDE),
    "one tile of rows": (lambda m: m.m_tiles == 1, Store.DIRECT),
    "all classes": (lambda m: m.residues == 8, None),
}  # fmt: skip


def runs(made: Specialisation) -> int:
    return len({(s.first, s.count) for p in made.passes for s in p.steps})


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_ways(name: str, dtype: torch.dtype) -> None:
    chosen, store = WAYS[name]
    layer = dataclasses.replace(UP, in_channels=48, out_channels=40)
    x = drawn(17, 48, 4, 4, 4, dtype=dtype)
    with mock.patch.object(specialisation, "BATCH", 0 if "slab" in name else specialisation.BATCH), chosen_anew():
        for seed in (1, 2):
            got, expected, of = convolved(layer, x, chosen, samples=16, inner=1, seed=seed)
            near(got, expected)
    assert store is None or of.tiling((8, 8, 8))[1] is store


@pytest.mark.parametrize("sizes", [(2, 4, 3), (3, 3, 5), (2, 3, 4), (2, 2, 6)], ids=str)
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_two_positions_at_once(sizes: Sizes, padding: int, dtype: torch.dtype) -> None:
    """Rows that end between them, and whose elements are aligned or not."""
    for one in (dataclasses.replace(UP, padding=(padding,) * 3), Layer(16, 24, 1, (3, 3, 3), ONE, ONE, ONE)):
        x = drawn(16, 16, *sizes, dtype=dtype)
        near(*convolved(one, x, _pairs, samples=16, inner=1)[:2])


def _pairs(made: Specialisation) -> bool:
    return made.m_tiles == 2 and made.residues == made.layer.stride[2]


def test_slabs_of_several_runs_are_given_back_once() -> None:
    """Of four slabs the first ones are given back before the last one is multiplied, by the last run."""
    layer = Layer(96, 24, 1, (4, 3, 4), (1, 2, 2), (2, 1, 1), ONE)
    with mock.patch.object(specialisation, "BATCH", 0), chosen_anew():
        for seed in range(4):
            x = drawn(16, 96, 4, 3, 4)
            near(*convolved(layer, x, lambda m: m.by_slab and runs(m) > 1, samples=16, inner=1, seed=seed)[:2])


@pytest.mark.parametrize("depth", [1, 3])
def test_slabs_that_the_last_run_does_not_read(depth: int) -> None:
    layer = Layer(48, 8, 1, (2, 3, 3), TWO, NONE, (3, 1, 1))
    with mock.patch.object(specialisation, "BATCH", 0), chosen_anew():
        for seed in range(4):
            got, expected, _ = convolved(
                layer,
                drawn(16, 48, depth, 3, 3, dtype=F16),
                lambda m: m.by_slab and runs(m) > 1 and m.residues > 4,
                samples=16,
                seed=seed,
            )
            near(got, expected)


# --- samples by themselves ------------------------------------------------------------------------
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan], ids=str)
def test_what_is_not_finite_stays_in_its_sample(odd: float, dtype: torch.dtype, last: bool) -> None:
    model = layer(16, 24, 4, dtype, stride=2, padding=1).eval()
    x = drawn(17, 16, 3, 4, 4, dtype=dtype)
    x[5, 3, 1, 2, 0] = odd
    with sets_always():
        got, expected, made = run_prepared(model, x, last=last)
    assert made.convolution is not None and made.convolution.made.samples > 1
    assert got[[*range(5), *range(6, 17)]].isfinite().all() and not got[5].isfinite().all()
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("exact", [False, True], ids=["tf32", "float32's own accuracy"])
def test_every_sample_has_its_scale(exact: bool) -> None:
    x = drawn(20, 24, 3, 4, 4)
    x *= torch.tensor([1e30 if n == 3 else 1e-3 * 7.0**n for n in range(20)]).view(-1, 1, 1, 1, 1)
    x[7] = 0
    layer = dataclasses.replace(UP, in_channels=24)
    for size, inner in ((8, 1), (16, 1), (32, 2)):
        near(*convolved(layer, x, samples=size, inner=inner, exact=exact)[:2], exact)


def test_samples_that_half_precision_cannot_hold() -> None:
    x = drawn(11, 16, 3, 4, 4)
    x[2] *= torch.logspace(-30, 0, 16).view(16, 1, 1, 1)
    near(*convolved(UP, x, samples=8, inner=1)[:2])


# --- what is behind -------------------------------------------------------------------------------
CHAINS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda y: y.relu(),
    "scale per sample": lambda y, a: y * a,
    "bias per sample and channel, clamp": lambda y, a: (y + a).clamp(-1, 2),
    "a residual": lambda y, a: (y + a).relu(),
}  # fmt: skip
SHAPES = {
    "scale per sample": (17, 1, 1, 1, 1),
    "bias per sample and channel, clamp": (17, 24, 1, 1, 1),
    "a residual": (17, 24, 6, 8, 8),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(3)
    operands = [torch.randn(SHAPES[name]).to(dtype)] if name in SHAPES else []
    model = Then(layer(16, 24, 4, dtype, stride=2, padding=1), CHAINS[name], *operands).eval()
    with sets_always():
        got, expected, made = run_prepared(model, drawn(17, 16, 3, 4, 4, dtype=dtype), last=last)
    assert made.convolution is not None and made.convolution.made.samples > 1
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("dims", [1, 2])
def test_fewer_dims(dims: int) -> None:
    model = layer(16, 24, 4, dims=dims, stride=2, padding=1).eval()
    with sets_always():
        got, expected, made = run_prepared(model, drawn(24, 16, *[5] * dims))
    assert made.convolution is not None and made.convolution.made.samples > 1
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize(
    "behind", [nn.MaxPool3d(2), nn.AvgPool3d(2), nn.Softmax(1), nn.BatchNorm3d(24)], ids=lambda m: type(m).__name__
)
def test_what_has_no_sets(behind: nn.Module) -> None:
    """Pools of classes, reductions and statistics: they find the sample of a tile, not of a row."""
    model = nn.Sequential(layer(16, 24, 4, stride=2, padding=1), behind).eval()
    if isinstance(behind, nn.BatchNorm3d):
        model.train()
    with sets_always():
        got, expected, made = run_prepared(model, drawn(16, 16, 2, 4, 4))
    assert made.convolution is None or made.convolution.made.samples == 1 or isinstance(behind, nn.BatchNorm3d)
    assert made.measuring is None or getattr(made.measuring, "made", UP) is UP or made.measuring.made.samples == 1  # type: ignore[union-attr]
    assert_near(got, expected, LIMIT[F32])


# --- what is broken -------------------------------------------------------------------------------
STORE, WIDE, WGMMA = "conv_store.cuh", "conv_wide.cuh", "conv_wgmma.cuh"
TILES, COPIES = "conv_tiles.cuh", "conv_copies.cuh"
BROKEN: dict[str, tuple[str, str, str]] = {
    "a sample's scale": (STORE, "fetched.sample[r] * of.scale", "fetched.sample[0] * of.scale"),
    "samples that are not there": (STORE, "Problem::samples == 1 || n(r) < g.samples", "true"),
    "whole tiles of samples that are not there": (STORE, "box.n + Problem::samples <= g.samples", "true"),
    "the sample of a row": (STORE, "* 16 + r * 8 + (lane >> 2)) %", "* 16 + (lane >> 2)) %"),
    "the operand of a row's sample": (STORE, "of[Problem::samples > 1 ? r : 0]", "of[0]"),
    "shifts of steps": (WGMMA, " : s.w)) * Problem::samples;", " : s.w)) * 8;"),
    "the inner dim of steps": (WGMMA, "(Problem::inner == 1 ? s.w : s.h)", "s.h"),
    "the inner dim of copies": (COPIES, "t.n, Problem::inner == 1 ? h : w,", "t.n, w,"),
    "the first sample": (TILES, "t.n = index * Problem::samples", "t.n = index"),
    "a pass's weights": (COPIES, "from += index % Problem::passes *", "from += 0 *"),
    "slabs that an earlier run waited for": (WGMMA, "if constexpr (Problem::by_slab && r > 0) came = apart.came;", ""),
    "slabs that are given back early": (WGMMA, "(Problem::by_slab && last)  //", "(Problem::by_slab)  //"),
    "positions at once that are not all there": (WIDE, "aligned && there == (1u << each) - 1", "aligned"),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    with device.broken(*BROKEN[why]), pytest.raises((AssertionError, EmulationError)):
        _some(why)


def _some(why: str) -> None:
    """Of the tests above one that should see it."""
    if "operand" in why:
        test_chains("bias per sample and channel, clamp", F32, False)
    elif "scale" in why or "of a row" in why:
        test_every_sample_has_its_scale(False)
    elif "samples that" in why:  # by one sample that is small: what is behind is a guard
        small = dataclasses.replace(UP, out_channels=8)
        x = drawn(15, 16, 1, 4, 2, dtype=F16)  # of float32 it would have a scale of NaN, as all of the guard is
        near(*convolved(small, x, lambda m: m.m_tiles == 1, samples=16, inner=1)[:2])
    elif "pass's" in why:
        test_ways("a pass per tile", F32)
    elif "waited for" in why:
        test_slabs_that_the_last_run_does_not_read(3)
    elif "slabs" in why:
        test_slabs_of_several_runs_are_given_back_once()
    elif "at once" in why:
        test_two_positions_at_once((2, 3, 4), 1, F32)
    else:
        near(*convolved(UP, drawn(40, 16, 3, 5, 6), samples=16, inner=1)[:2])
