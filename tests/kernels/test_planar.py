"""Kernels that read x as it lies: what their instructions multiply, where that lies, and which layers have one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_convolution import convolved, extents_of, layers
from test_twice import ways
from torch import Tensor

from fxfuse.kernels.codegen.reductions import Fold
from fxfuse.kernels.convolution import planar
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.factors import DEPTH, factors_of, instructions
from fxfuse.kernels.convolution.geometry import ONE, Pass, steps_of_sum, sum_of
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.lies import planes_in_place
from fxfuse.kernels.convolution.specialisation import CONSUMERS, Specialisation, Unsupported
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiles import MOST_COPIED, copied, joint_tilings, region_stride, tilings

F32, Sizes = torch.float32, tuple[int, int, int]
UP = Layer(3, 16, 1, (3, 3, 3), (2, 2, 2), ONE, ONE)


def of_planes(layer: Layer, step: Sizes = ONE, *, pooled: bool = False, stored: Sizes = (31, 31, 31)) -> Specialisation:
    made = specialise(layer, pooled=pooled, summed=pooled, contiguous=True, finite=True, stored=stored)
    return planar.as_planes(made, 64, stored, stored[2], 4, keeps=True, step=step)


def by_factors(made: Specialisation, x: Tensor, weight: Tensor, extents: Sizes) -> Tensor:
    """What the kernel computes: per class the sum of its numbers of a position, times their weights."""
    layer, stride = made.layer, ONE if made.merged else made.layer.stride
    out, room = x.new_zeros(x.shape[0], layer.out_channels, *extents), 24
    padded, taps = F.pad(x, [room] * 6), weight.flatten(2)
    for one in made.passes:
        for residue, factors in zip(one.residues, factors_of(one, layer.in_channels), strict=True):
            into = out[(..., *(slice(r, None, s) for r, s in zip(residue.at, stride, strict=True)))]
            for f in factors:
                at = (
                    slice(room + d, room + d + (n - 1) * s + 1, s)
                    for d, n, s in zip(f.delta, into.shape[2:], made.step, strict=True)
                )
                number = padded[(slice(None), f.channel, *at)]
                weights = sum(taps[f.channel, :, t] for t in f.taps)
                into += number[:, None] * weights.view(1, -1, 1, 1, 1)
    return out


few = layers(most=4, channels=3)


@given(few, st.tuples(*[st.integers(1, 4)] * 3), st.booleans())
def test_factors_make_the_convolution(layer: Layer, sizes: Sizes, merged: bool) -> None:
    extents = extents_of(layer, sizes)
    outputs = tuple(e // s for e, s in zip(extents, layer.stride, strict=True)) if merged else extents
    if min(extents) < 1 or min(outputs) < 1:
        return
    layer = dataclasses.replace(layer, groups=1)
    try:
        made = of_planes(layer, pooled=merged)
    except Unsupported:
        return
    x, weight, expected = convolved(layer, sizes)
    if made.merged:
        expected = F.avg_pool3d(expected, layer.stride, divisor_override=1)
    got = by_factors(made, x, weight, tuple(expected.shape[2:]))  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(few, st.tuples(*[st.integers(1, 4)] * 3), st.tuples(*[st.integers(1, 3)] * 3))
def test_factors_of_several_positions(layer: Layer, sizes: Sizes, step: Sizes) -> None:
    layer = dataclasses.replace(layer, groups=1)
    window = [s * t for s, t in zip(layer.stride, step, strict=True)]
    extents = extents_of(layer, sizes)
    if any(e < n for e, n in zip(extents, window, strict=True)) or math.prod(layer.stride) == 1:
        return
    try:
        made = of_planes(layer, step, pooled=True)
    except Unsupported:
        return
    x, weight, expected = convolved(layer, sizes)
    expected = F.avg_pool3d(expected, window, divisor_override=1)
    got = by_factors(made, x, weight, tuple(expected.shape[2:]))  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_class_multiplies_its_own_numbers_alone() -> None:
    """Of 1, 2, 4 and 8 taps: eight numbers at a time, where zeros for all classes would be 8 * 24 of 8 * 81."""
    made = of_planes(UP)
    counts = sorted(len(f) for p in made.passes for f in factors_of(p, 3))
    assert counts == [3, *[6] * 3, *[12] * 3, 24] and DEPTH == 8
    assert instructions(made.passes, 3) == 1 + 3 * 1 + 3 * 2 + 3
    assert instructions(of_planes(UP, pooled=True).passes, 3) == 3  # of the sum of classes, 8 positions
    assert instructions(of_planes(UP, (2, 2, 2), pooled=True, stored=(15, 15, 15)).passes, 3) == 11  # 27 positions


def test_taps_of_one_delta_are_one_number() -> None:
    """Also where warpgroup instructions would multiply them one by one."""
    one = sum_of(UP.residues)
    apart, added = (factors_of(Pass((one,), steps_of_sum(one, added=added)), 3) for added in (False, True))
    assert [{*map(dataclasses.astuple, f)} for f in apart] == [{*map(dataclasses.astuple, f)} for f in added]


@given(few, st.tuples(*[st.integers(1, 70)] * 3), st.tuples(*[st.integers(1, 3)] * 3), st.booleans())
def test_x_of_a_tile_is_what_its_positions_read(layer: Layer, extents: Sizes, step: Sizes, pooled: bool) -> None:
    layer = dataclasses.replace(layer, groups=1)
    try:
        made = of_planes(layer, step if pooled else ONE, pooled=pooled, stored=extents)
    except Unsupported:
        return
    deltas = [f.delta for p in made.passes for one in factors_of(p, layer.in_channels) for f in one] or [(0, 0, 0)]
    low, _ = layer.reach
    found = itertools.chain(tilings(made, extents, linear=True), joint_tilings(made, extents, 2))
    for each in itertools.islice(found, 12):
        sizes, stride = copied(made, each), region_stride(made, each)
        assert sizes[2] % 4 == 0 and max(sizes) <= MOST_COPIED
        assert math.prod(sizes) * layer.in_channels * 4 <= stride <= made.region_bytes
        assert 1024 + made.stage_bytes + 2 * stride + made.staging_bytes <= made.dynamic_bytes
        last = [(n - 1) * s for n, s in zip(each.region, made.step, strict=True)]
        for delta in deltas:
            assert all(d - a >= 0 for d, a in zip(delta, low, strict=True))
            for number in range(each.counts[2]):  # a copy begins at a multiple of 16 bytes
                ahead = 0, 0, (number * each.tile[2] * made.step[2] + low[2]) % 4
                assert all(m + n + d - a < c for m, n, d, a, c in zip(ahead, last, delta, low, sizes, strict=True))


# --- which layers have one --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sizes", "strides", "there"),
    [
        ((2, 3, 8, 8, 8), (1536, 512, 64, 8, 1), True),
        ((None, 3, 8, 8, 8), (1536, 512, 64, 8, 1), True),
        ((2, 9, 8, 8, 8), (4608, 512, 64, 8, 1), False),
        ((2, 3, 8, 8, 6), (1152, 384, 48, 6, 1), False),
        ((2, 3, 8, 8, 8), (1536, 1, 192, 24, 3), False),
        ((2, 3, 8, 8, 8), (1586, 512, 64, 8, 1), False),
        ((2, 3, 8), (24, 8, 1), True),
    ],
)
def test_what_may_be_copied_as_it_lies(sizes: tuple[int, ...], strides: tuple[int, ...], there: bool) -> None:
    assert planar.possible(sizes, strides, 4) == there
    assert planar.possible(sizes, strides, 2) == (there and sizes != (2, 3, 8, 8, 12))


def test_addresses_are_those_of_copies() -> None:
    x = torch.zeros(2, 3, 4, 5, 8)
    assert planes_in_place(x) and planes_in_place(x[:, :, ::2, 1:])
    assert not planes_in_place(x.contiguous(memory_format=torch.channels_last_3d))
    assert not planes_in_place(torch.zeros(x.numel() + 1)[1:].view(x.shape))
    assert not planes_in_place(x[:1].expand(2, 3, 4, 5, 8))
    assert not planes_in_place(torch.zeros(2, 3, 4, 5, 10)[..., :8])


@pytest.mark.parametrize(
    ("layer", "more", "why"),
    [
        (dataclasses.replace(UP, out_channels=300), {}, "several tiles"),
        (dataclasses.replace(UP, groups=2), {}, "several tiles"),
        (dataclasses.replace(UP, in_channels=8, kernel=(7, 7, 7)), {}, "bytes"),
        (dataclasses.replace(UP, in_channels=9), {}, "9 input channels"),
        (UP, {"step": (2, 2, 2)}, "no sum"),
        (UP, {"step": (32, 32, 32), "pooled": True}, "27 taps of 32768 positions"),
        (dataclasses.replace(UP, in_channels=1), {"step": (8, 8, 8), "pooled": True}, "does not fit"),
    ],
)
def test_what_is_refused(layer: Layer, more: dict[str, Any], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        of_planes(layer, **more)


def chosen(epilogue: Epilogue, dtype: torch.dtype = F32, **more: Any) -> Specialisation:
    given = {"extents": (15, 31, 31), "samples": 128, "planes": True, **more}
    return Convolution.of(UP, dtype, dtype, dtype, epilogue, **given).made


def test_the_faster_by_estimate() -> None:
    mean = Epilogue(combine="Sum")
    assert chosen(mean).planar == 4 and chosen(mean, dtype=torch.float16).planar == 2
    assert not any(chosen(mean, **more).planar for more in ({"planes": False}, {"samples": 0}, {"exact": True}))
    of_16_bits = {"dtype": torch.float16, "extents": (31, 63, 63)}
    for more in ({"extents": (31, 63, 63)}, of_16_bits):  # all that is stored: products take their time
        assert not chosen(Epilogue(), **more).planar
    assert chosen(Epilogue(), dtype=torch.float16, extents=(32, 64, 64)).planar  # from registers
    assert not chosen(Epilogue(fold=Fold("LogSumExp", 16)), **of_16_bits).planar
    assert not chosen(Epilogue(combine="Maximum"), dtype=torch.float16).planar


def test_more_positions_than_a_kernel_sums() -> None:
    many = Epilogue(combine="Sum", step=(2, 2, 2))
    assert chosen(many, extents=(7, 15, 15)).step == (2, 2, 2)
    with pytest.raises(Unsupported, match="positions"):
        chosen(many, extents=(7, 15, 15), planes=False)


@pytest.mark.parametrize(("name", "dtype", "step"), [
    ("scale_mean_bias_scale", F32, ONE), ("batch_norm_pools", F32, (2, 2, 2)), ("batch_norm_pools", torch.float16, ONE),
])  # fmt: skip
def test_chains(name: str, dtype: torch.dtype, step: Sizes) -> None:
    """A pool of several positions is the kernel's where it can be."""
    found = ways(name, dtype)[0]
    assert found.schedule is not None and found.schedule.kernel is not None
    assert isinstance(found.convolution, Convolution)
    assert found.convolution.made.planar == dtype.itemsize and found.schedule.kernel.step == step
    assert found.convolution.made.rows == CONSUMERS * found.convolution.made.m_tiles * 64
