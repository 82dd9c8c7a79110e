"""Residue classes, passes and tiles of a transposed convolution: the arithmetic behind the kernels, without a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.kernels.convolution import (
    CONSUMERS,
    PROMOTE_EVERY,
    SHARED_BYTES,
    STAGE_BYTES,
    Layer,
    Specialisation,
    Unsupported,
    seconds,
    specialise,
    tile,
)
from fxfuse.kernels.geometry import reach, residues_of, steps_of

ONE = (1, 1, 1)
MODEL_1 = Layer(32, 64, 1, (5, 5, 5), (2, 2, 2), (2, 2, 2), ONE)


@st.composite
def layers(draw: st.DrawFn, most: int = 5, channels: int = 96) -> Layer:
    def three(values: st.SearchStrategy[int]) -> tuple[int, int, int]:
        return draw(values), draw(values), draw(values)

    kernel = three(st.integers(1, most))
    stride, dilation = three(st.integers(1, 4)), three(st.integers(1, 2))
    padding = tuple(draw(st.integers(0, (k - 1) * d)) for k, d in zip(kernel, dilation, strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    cin, cout = draw(st.integers(1, channels)), draw(st.integers(1, channels))
    return Layer(cin, cout, groups, kernel, stride, padding, dilation)  # type: ignore[arg-type]


def by_steps(made: Specialisation, x: Tensor, weight: Tensor, extents: tuple[int, ...]) -> Tensor:
    """What the kernels compute, position by position: per pass and step, a shifted x times the taps' weights."""
    layer = made.layer
    out = torch.zeros(x.shape[0], layer.out_channels, *extents, dtype=x.dtype)
    positions = [-(-e // s) for e, s in zip(extents, layer.stride, strict=True)]
    low, high = reach(layer.residues)
    before, behind = (
        [max(0, -a) for a in low],
        [max(0, b + q - n) for b, q, n in zip(high, positions, x.shape[2:], strict=True)],
    )
    padded = F.pad(x, [p for i in (2, 1, 0) for p in (before[i], behind[i])])
    taps = weight.flatten(2)
    for one in made.passes:
        sums = [torch.zeros(x.shape[0], layer.out_channels, *positions, dtype=x.dtype) for _ in one.residues]
        for step in one.steps:
            begin = [b + d for b, d in zip(before, step.delta, strict=True)]
            window = padded[(..., *(slice(b, b + q) for b, q in zip(begin, positions, strict=True)))]
            for i, tap in enumerate(step.taps):
                sums[step.first + i] += torch.einsum("ncdhw,co->nodhw", window, taps[:, :, tap])
        for residue, value in zip(one.residues, sums, strict=True):
            into = out[(..., *(slice(r, None, s) for r, s in zip(residue.at, layer.stride, strict=True)))]
            into += value[(..., *(slice(0, n) for n in into.shape[2:]))]
    return out


@given(layers(channels=3), st.tuples(*[st.integers(1, 4)] * 3))
def test_steps_make_the_convolution(layer: Layer, sizes: tuple[int, int, int]) -> None:
    geometry = zip(sizes, layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
    extents = tuple((i - 1) * s - 2 * p + d * (k - 1) + 1 for i, k, s, p, d in geometry)
    if min(extents) < 1:
        return
    try:
        made = specialise(layer, pooled=False)
    except Unsupported:
        return
    torch.manual_seed(0)
    x = torch.randn(2, layer.in_channels, *sizes, dtype=torch.float64)
    weight = torch.randn(layer.in_channels, layer.out_channels, *layer.kernel, dtype=torch.float64)
    expected = F.conv_transpose3d(x, weight, None, layer.stride, layer.padding, 0, 1, layer.dilation)
    torch.testing.assert_close(by_steps(made, x, weight, extents), expected, rtol=1e-12, atol=1e-12)


@given(layers(), st.booleans(), st.booleans())
def test_a_specialisation_holds_its_limits(layer: Layer, pooled: bool, exact: bool) -> None:
    try:
        made = specialise(layer, pooled=pooled, exact=exact)
    except Unsupported:  # a kernel that reaches too far
        return
    assert sorted(r.at for p in made.passes for r in p.residues) == sorted(
        itertools.product(*(range(s) for s in layer.stride))
    )
    taps = [t for p in made.passes for s in p.steps for t in s.taps]
    assert sorted(taps) == sorted(t.index for r in layer.residues for t in r.taps)
    wide = made.columns * made.residues
    assert made.columns % 8 == 0 and wide <= 128
    assert made.m_tiles * wide // 2 * (2 if exact else 1) <= 128  # accumulators, of 240 registers
    assert made.m_tiles * 2 * made.residues <= 32
    assert made.chunk in (16, 32, 64) and made.chunks * made.chunk >= layer.in_channels
    for one in made.passes:
        batches = made.batches(one.steps)
        assert [s for b in batches for s in b] == list(one.steps)
        for batch in batches:
            assert sum(map(made.step_bytes, batch)) <= STAGE_BYTES
            assert len({(s.first, s.count) for s in batch}) == 1
            assert not exact or len(batch) == 1 or len(batch) * made.chunk <= PROMOTE_EVERY + made.chunk
    used = made.stages * STAGE_BYTES + made.x_buffers * made.region_bytes + made.staging_bytes + 1024
    assert used <= made.dynamic_bytes <= SHARED_BYTES - 512


@given(layers(most=7), st.tuples(*[st.integers(1, 70)] * 3), st.booleans())
def test_tiles_cover_everything_once(layer: Layer, extents: tuple[int, int, int], pooled: bool) -> None:
    try:
        made = specialise(layer, pooled=pooled)
        found = tile(made, extents, extents[2])
    except Unsupported:
        return
    low, high = reach(layer.residues)
    halo = [b - a for a, b in zip(low, high, strict=True)]
    assert found.region == tuple(t + h for t, h in zip(found.tile, halo, strict=True))
    assert math.prod(found.region) * made.chunk * 2 <= made.region_bytes and max(found.region) <= 256
    assert all(c * t >= e for c, t, e in zip(found.counts, found.tile, extents, strict=True))
    assert math.prod(found.box) * CONSUMERS == math.prod(found.tile)
    rows: list[tuple[int, int, int]] = []
    _, region_h, region_w = found.region
    for group in range(CONSUMERS):
        base = found.row_base[group * made.m_tiles]
        offset = [b * group if b < t else 0 for b, t in zip(found.box, found.tile, strict=True)]
        for i in range(made.m_tiles):
            for row in range(64):
                at = found.row_base[group * made.m_tiles + i] + row // 8 * found.row_group + row % 8
                plane, x = divmod(at - base, region_w)
                z, y = divmod(plane, region_h)
                if z < found.box[0] and y < found.box[1] and x < found.box[2]:
                    rows.append((z + offset[0], y + offset[1], x + offset[2]))
                    assert at == (rows[-1][0] * region_h + rows[-1][1]) * region_w + rows[-1][2]
                shift = (halo[0] * region_h + halo[1]) * region_w + halo[2]
                assert (at + shift + 1) * made.chunk * 2 <= made.region_bytes
    assert sorted(rows) == sorted(itertools.product(*map(range, found.tile)))


def test_residues_of_model_1() -> None:
    residues = residues_of((5,) * 3, (2,) * 3, (2,) * 3, ONE)
    assert [len(r.taps) for r in residues] == [27, 18, 18, 12, 18, 12, 12, 8]
    assert reach(residues) == ((-1, -1, -1), (1, 1, 1))
    along_w = {(t.delta[2], t.index % 5) for t in residues[1].taps}
    assert along_w == {(0, 3), (1, 1)}


def test_model_1_shares_its_taps() -> None:
    made = specialise(MODEL_1, pooled=True)
    assert (made.columns, made.residues, len(made.passes)) == (64, 2, 4)
    assert [len(steps_of(p.residues)) for p in made.passes] == [27, 18, 18, 12]


def test_a_class_without_taps() -> None:
    made = specialise(Layer(4, 64, 1, ONE, (2, 2, 2), (0, 0, 0), ONE), pooled=False)
    assert sorted(len(p.steps) for p in made.passes) == [0, 0, 0, 1]


def test_what_does_not_fit_is_refused() -> None:
    wide = Layer(64, 64, 1, (7, 7, 7), ONE, (0, 0, 0), (40, 40, 40))
    with pytest.raises(Unsupported, match="reaches too far for shared memory"):
        specialise(wide, pooled=False)


def test_an_estimate_grows_with_the_work() -> None:
    made = specialise(MODEL_1, pooled=False)
    small = seconds(made, 2, (16, 16, 16), (31, 31, 31), 31, 4)
    large = seconds(made, 16, (32, 32, 32), (63, 63, 63), 63, 4)
    assert 1e-5 < small < large < 1e-2
