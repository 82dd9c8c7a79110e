"""Rows of x that hold several positions: which layers have them, what they hold, and that they make the convolution."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reports import explained
from rows import rows_of
from test_convolution import by_steps, convolved, extents_of, layers
from torch import Tensor, nn

from fxfuse.kernels import execute
from fxfuse.kernels.account import account
from fxfuse.kernels.convolution.beside import MOST_NUMBERS, fastest, side_by_side
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiles import Extents
from fxfuse.kernels.convolution.tiling import WHOLE_RUN, tile
from fxfuse.kernels.planning import choice

ONE, TWO = (1, 1, 1), (2, 2, 2)
UP = Layer(3, 16, 1, (3, 3, 3), TWO, ONE, ONE)
DIMS = [(2,), (1, 2), (0, 1, 2), (1,)]
F32 = torch.float32


def weights_of(layer: Layer, weight: Tensor) -> Tensor:
    """For each number of a row its weights: zeros but for the taps that read it."""
    reads = torch.tensor(layer.offset_of) == torch.arange(len(layer.offsets))[:, None]
    return (weight.flatten(2)[:, None] * reads[:, None].to(weight)).flatten(0, 1).unflatten(-1, layer.kernel)


@given(layers(most=4, channels=2), st.sampled_from(DIMS), st.tuples(*[st.integers(1, 3)] * 3), st.booleans())
def test_rows_make_the_convolution(layer: Layer, dims: tuple[int, ...], sizes: Extents, merged: bool) -> None:
    """And rows behind the last one would hold zeros."""
    extents = extents_of(layer, sizes)
    outputs = tuple(e // s for e, s in zip(extents, layer.stride, strict=True)) if merged else extents
    if min(extents) < 1 or min(outputs) < 1:
        return
    one = layer.side_by_side(dims)
    try:
        made = specialise(one, pooled=merged, summed=merged, finite=True)
    except Unsupported:
        return
    x, weight, expected = convolved(layer, sizes)
    if merged:
        expected = F.avg_pool3d(expected, layer.stride, divisor_override=1)
    got = by_steps(made, rows_of(one, x), weights_of(one, weight), outputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(layers(), st.sampled_from(DIMS))
def test_what_a_row_holds(layer: Layer, dims: tuple[int, ...]) -> None:
    one = layer.side_by_side(dims)
    assert one.apart == layer and one.channels == layer.in_channels
    deltas = {t.index: t.delta for r in layer.residues for t in r.taps}
    inside = {t.index: t.delta for r in one.residues for t in r.taps}
    assert len(deltas) == len(one.offset_of) == layer.volume
    for tap, delta in deltas.items():
        offset = one.offsets[one.offset_of[tap]]
        assert tuple(map(sum, zip(offset, inside[tap], strict=True))) == delta
        assert all((rest if dim in dims else at) == 0 for dim, (at, rest) in enumerate(zip(offset, inside[tap])))  # noqa: B905
    assert one.offsets[0] == tuple(map(min, zip(*one.offsets, strict=True)))


@given(layers(channels=3))
def test_sums_of_weights_need_no_more_room(layer: Layer) -> None:
    """Only weights of one number are added; and the model's multiply-adds are as many."""
    plain = specialise(layer, pooled=True, summed=True, finite=True)
    for one in side_by_side(layer):
        made = specialise(one, pooled=True, summed=True, finite=True)
        assert (made.headroom, made.products) == (plain.headroom, plain.products)


@pytest.mark.parametrize(
    ("layer", "how", "dims"),
    [
        (UP, {}, (1, 2)),
        (UP, {"pooled": True}, (1, 2)),
        (UP, {"pooled": True, "summed": True}, (1, 2)),
        (dataclasses.replace(UP, in_channels=1), {}, (0, 1, 2)),
        (dataclasses.replace(UP, kernel=(3, 3, 3), stride=ONE), {}, (2,)),
        (dataclasses.replace(UP, in_channels=1, out_channels=64, stride=ONE), {}, (1, 2)),
        (dataclasses.replace(UP, in_channels=8), {"exact": True}, (2,)),
        (dataclasses.replace(UP, in_channels=9), {}, ()),  # 18 numbers
        (dataclasses.replace(UP, kernel=TWO, padding=(0, 0, 0)), {}, ()),  # every output has one tap
        (dataclasses.replace(UP, groups=4, joined=4), {}, ()),  # rows are full of groups
        (dataclasses.replace(UP, kernel=(1, 1, 1), stride=ONE, padding=(0, 0, 0)), {}, ()),
    ],
    ids=str,
)
def test_which_layers_have_them(layer: Layer, how: dict[str, bool], dims: tuple[int, ...]) -> None:
    given = {"pooled": False, "exact": False, "contiguous": True, "itemsize": 4, **how}
    found = fastest(layer, stored=(63, 63, 63), **given).layer
    assert found == (layer.side_by_side(dims) if dims else layer)
    assert found.in_channels <= MOST_NUMBERS or not found.beside


def test_sizes_do_not_tell() -> None:
    sizes = [(31, 63, 63), (1, 5, 7), (256, 256, 256), (64, 64, 64)]
    made = [Convolution.of(UP, F32, F32, F32, Epilogue(), extents=size).made.layer for size in sizes]
    assert {one.beside for one in made} == {(1, 2)}


def test_numbers_that_may_be_infinite_stay_apart() -> None:
    """Zero times Inf is not zero: 16-bit numbers are looked at, where sizes tell that this pays."""
    for dtype in (torch.float16, torch.bfloat16):
        assert Convolution.of(UP, dtype, dtype, dtype, Epilogue()).made.layer == UP
        one = Convolution.of(UP, dtype, dtype, dtype, Epilogue(), extents=(31, 63, 63), samples=128).made
        assert one.watched and one.layer.beside == (1, 2)


@pytest.mark.parametrize(
    ("layer", "stored", "layout", "beside"),
    [
        (dataclasses.replace(UP, out_channels=48), (64, 96, 96), "contiguous", ()),
        (dataclasses.replace(UP, out_channels=48), (64, 96, 96), "channels_last", (1, 2)),
        (dataclasses.replace(UP, out_channels=48), (63, 95, 95), "contiguous", (1, 2)),  # through shared memory
        (Layer(4, 32, 1, (4, 4, 4), TWO, ONE, ONE), (64, 128, 128), "contiguous", (2,)),
        (Layer(8, 32, 1, (3, 3, 3), TWO, ONE, ONE), (32, 96, 96), "contiguous", ()),
    ],
)
def test_where_results_are_stored_from_registers(
    layer: Layer, stored: Extents, layout: str, beside: tuple[int, ...]
) -> None:
    """A lead of less than a tenth is none: measured in float16."""
    given = {"extents": stored, "samples": 16, "planes": True}
    made = Convolution.of(layer, *[torch.float16] * 3, Epilogue(), layout, **given).made  # type: ignore[arg-type]
    assert made.layer.beside == beside


def test_tiles_are_wide_and_lie_in_few_planes() -> None:
    """Rows of several positions have no halo along w: narrow tiles, 16 planes deep, took twice as long to store."""
    layer = dataclasses.replace(UP, out_channels=32)
    for itemsize in (2, 4):
        made = fastest(layer, stored=(64, 128, 128), pooled=False, exact=False, contiguous=True, itemsize=itemsize)
        assert made.layer.beside == (1, 2)
        found = tile(made, (32, 64, 64), 128, itemsize)
        assert found.tile[0] == 1 and found.tile[2] * 2 * itemsize >= WHOLE_RUN


def test_without_a_kernel_the_refusal_is_the_layers() -> None:
    with pytest.raises(Unsupported, match="a stride of 300"):
        Convolution.of(dataclasses.replace(UP, stride=(1, 1, 300)), F32, F32, F32, Epilogue())


def test_the_account_tells() -> None:
    """Rows of 16 numbers, as wide as before; the multiply-adds of the model's taps; and a fact."""
    model = nn.Sequential(nn.ConvTranspose3d(3, 16, 3, stride=2, padding=1), nn.GELU()).eval()
    region = explained(model, (64, 3, 16, 32, 32)).regions[0].region
    part = next(p for p in account(region).parts if p.by == "kernel")  # type: ignore[union-attr]
    facts = dict(part.facts)
    assert facts["positions in a row"] == "4 along h and w, 3 channels of each: one product for their taps"
    assert part.macs == 64 * math.prod((31, 63, 63)) // 8 * 27 * 3 * 16


def test_a_layer_is_as_large_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to cuDNN does not change: the sweep that tells was of kernels that read one position in a row."""
    seen: list[Layer] = []
    model = nn.Sequential(nn.ConvTranspose3d(3, 16, 3, stride=2, padding=1), nn.GELU()).eval()
    region = explained(model, (64, 3, 16, 32, 32)).regions[0].region
    real = choice.seconds
    monkeypatch.setattr(choice, "seconds", lambda made, *given: [seen.append(made.layer), real(made, *given)][1])
    made = execute.planned(region)
    assert made.convolution is not None and made.convolution.made.layer.beside
    assert seen == [UP]
