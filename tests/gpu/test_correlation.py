"""Statistics without the convolution's output, on a GPU or an emulated one: moments, whole chains."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator.device import emulated
from place import CUDA, DEVICE, kernels_always, needs
from stages import LAST, Stages, check, made, sample, steps_run, trained
from torch import Tensor, nn

import fxfuse
from fxfuse.kernels.convolution import correlation
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.runtime import correlation_engine

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

FIRST = "from products of x"
THEN = "; then the convolution: conv_transpose"


@pytest.fixture(autouse=True)
def always_products() -> Iterator[None]:
    """Statistics come from products of the input where there are such, or from a first run."""
    with kernels_always(twice=True):
        yield


# --- moments --------------------------------------------------------------------------------------
@contextlib.contextmanager
def by_blocks() -> Iterator[None]:
    """No warp makes the products of a part alone, however small it is."""
    with mock.patch.object(correlation, "ALONE", 0):
        correlation._parts.cache_clear()
        yield
    correlation._parts.cache_clear()


def correlation_of(convolution: nn.Module, x: Tensor) -> Correlation:
    c: Any = convolution
    layer = Layer(
        c.in_channels // c.groups, c.out_channels // c.groups, c.groups, c.kernel_size, c.stride, c.padding, c.dilation
    )
    return Correlation.of(layer, x.dtype, x.dtype, x.dtype)


def moments(convolution: nn.Module, x: Tensor) -> Tensor:
    """(N, C, 2): mean and sum of squares around it of every sample and channel, by the kernels."""
    c: Any = convolution
    with torch.no_grad():
        extents = copy.deepcopy(c).to("meta")(x.to("meta")).shape[2:]
        run = correlation_engine.prepare(correlation_of(c, x), x, extents)
        found = torch.zeros(x.shape[0], c.out_channels, 3, dtype=torch.float64, device=DEVICE)
        run(x, c.weight, c.bias, found.data_ptr())
    assert bool((found[..., 0] == math.prod(extents)).all())
    return found[..., 1:]


def expected(convolution: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = copy.deepcopy(convolution).double()(x.double()).flatten(2)
    mean = y.mean(2)
    return torch.stack([mean, (y - mean[..., None]).square().sum(2)], -1)


LAYERS: dict[str, dict[str, Any]] = {
    "decoder": {"kernel_size": 4, "stride": 2, "padding": 1},
    "up": {"kernel_size": 2, "stride": 2},
    "dense": {"kernel_size": (1, 3, 2), "bias": False},
    "mixed": {"kernel_size": (4, 3, 2), "stride": (2, 1, 3), "padding": (1, 2, 0), "output_padding": (1, 0, 2)},
    "dilated": {
        "kernel_size": (2, 3, 3),
        "stride": (3, 2, 1),
        "padding": (0, 1, 1),
        "dilation": (2, 3, 2),
        "output_padding": (2, 1, 0),
    },
    "cropped": {"kernel_size": 3, "stride": 2, "padding": 3},
    "gaps": {"kernel_size": (1, 2, 1), "stride": 3, "output_padding": (1, 2, 0)},
}


@pytest.mark.parametrize("size", [(4, 5, 6), (3, 9, 40), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_moments(layer: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    convolution = made(3, 2, 5, **LAYERS[layer])
    x = sample(2, 2, *size)
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (7, 1), (3, 3), (4, 2)])
def test_channels_and_groups(channels: int, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolution = made(3, channels, 6, 3, stride=2, padding=1, groups=groups, dtype=dtype)
    x = sample(2, channels, 4, 5, 6, dtype=dtype).contiguous(memory_format=LAST[5])
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


def test_views() -> None:
    """Any strides are read in place."""
    convolution = made(3, 3, 4, 3, stride=2)
    x = sample(5, 6, 7, 2, 4).permute(3, 4, 2, 1, 0)[:, 1:, ::2]
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


def test_nothing_is_lost_to_what_cancels() -> None:
    """A ramp of a slope that weights take away: outputs are a millionth of their terms."""
    convolution = made(3, 1, 2, (1, 1, 3), bias=False)
    x = torch.arange(64.0, device=DEVICE).expand(1, 1, 3, 3, 64) + 1e-4 * sample(1, 1, 3, 3, 64)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([1.0, -2.0, 1.0]))
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-9, atol=0)
    x = sample(1, 1, 3, 3, 64) + 1e5
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-9, atol=0)


def test_many_tiles_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block takes several of them, and the sums of a part are of several blocks."""
    monkeypatch.setattr("fxfuse.kernels.convolution.correlation.ENOUGH_JOBS", 20)
    monkeypatch.setattr("fxfuse.kernels.convolution.correlation.TILE_ELEMENTS", 200)
    convolution, x = made(3, 2, 3, 3, stride=2, padding=1), sample(2, 2, 6, 7, 11)
    with by_blocks():
        parts = correlation_of(convolution, x).parts((6, 7, 11), (11, 13, 21))
        assert any(1 < p.jobs < math.prod(-(-b // t) for b, t in zip(p.size, p.tile, strict=True)) for p in parts.all)
        torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 5, 6), (4, 3, 50)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_parts_that_blocks_take(layer: str, size: tuple[int, int, int]) -> None:
    """Not one warp each."""
    torch.manual_seed(0)
    convolution, x = made(3, 3, 5, **LAYERS[layer]), sample(2, 3, *size)
    with by_blocks():
        torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "layer"),
    [
        (1, {"kernel_size": 3}),
        (1, {"kernel_size": (3, 4, 4)}),
        (2, {"kernel_size": (2, 2, 5)}),
        (3, {"kernel_size": (1, 3, 3), "dilation": (1, 1, 2)}),
        (3, {"kernel_size": (1, 1, 6)}),
        (6, {"kernel_size": 2, "padding": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("alone", [True, False])
def test_arrangements_of_the_lags(channels: int, layer: dict[str, Any], alone: bool) -> None:
    """Shifts, windows and several instructions per step; pieces of rows of all sizes."""
    torch.manual_seed(0)
    convolution, x = made(3, channels, 3, **layer), sample(1, channels, 2, 3, 9)
    with contextlib.nullcontext() if alone else by_blocks():
        torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out", [1, 15, 16, 17, 40])
def test_output_channels(out: int) -> None:
    """A block of the second kernel has 16 of a group."""
    torch.manual_seed(0)
    convolution, x = made(3, 4, 2 * out, 2, stride=2, groups=2), sample(2, 4, 2, 3, 4)
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


def test_classes_that_lie_in_shared_memory_one_after_the_other() -> None:
    """All of their rows are more than it has room for."""
    torch.manual_seed(0)
    convolution, x = made(3, 7, 3, (3, 3, 4), stride=2, padding=1), sample(1, 7, 3, 4, 5)
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 32, 32), (16, 40, 70)], ids=str)
@pytest.mark.parametrize(("channels", "stride"), [(3, 2), (1, 1)])
def test_sizes_of_models(channels: int, stride: int, size: tuple[int, int, int]) -> None:
    """Tiles, faces, edges and corners as they are there; a mean far from zero."""
    torch.manual_seed(0)
    convolution, x = made(3, channels, 5, 3, stride=stride, padding=1), sample(1, channels, *size) + 20
    torch.testing.assert_close(moments(convolution, x), expected(convolution, x), rtol=1e-11, atol=0)


@pytest.mark.skipif(CUDA, reason="the emulated GPU's threads take turns in orders of their own")
def test_the_order_of_threads_changes_no_bit() -> None:
    convolution, x = made(3, 3, 4, 3, stride=2, padding=1), sample(2, 3, 4, 5, 6)
    first = moments(convolution, x)
    for seed in (1, 2, 3):
        with emulated(seed):
            assert torch.equal(moments(convolution, x), first)


# --- values that are not finite -------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    """Statistics of the sample are eager mode's, and no other sample's change. 3e38 is Inf in 16 bits."""
    torch.manual_seed(0)
    convolution, x = made(3, 2, 4, 3, stride=2, padding=1, dtype=dtype), sample(3, 2, 3, 4, 5, dtype=dtype)
    before = moments(convolution, x)
    x[1, 1, 2, 3, 1] = value
    got = moments(convolution, x)
    assert torch.equal(got[::2], before[::2])
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = convolution(x)[1].double().flatten(1)  # as eager mode rounds it
    mean = y.mean(1)
    torch.testing.assert_close(got[1, :, 0], mean, rtol=1e-3, atol=1e-3, equal_nan=True)
    squares = (y - mean[:, None]).square().sum(1)
    torch.testing.assert_close(got[1, :, 1], squares, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_weights_and_outputs_that_are_not_finite() -> None:
    """A channel's weight; and float16's outputs beyond 65504, of x and weights within."""
    convolution, x = made(3, 2, 4, 3, stride=2), sample(2, 2, 3, 4, 5)
    whole = moments(convolution, x)
    with torch.no_grad():
        convolution.weight[0, 2, 1, 1, 1] = math.nan
    got = moments(convolution, x)
    assert got[:, 2].isnan().all() and torch.equal(got[:, [0, 1, 3]], whole[:, [0, 1, 3]])
    convolution, x = made(3, 2, 4, 3, stride=2, dtype=torch.float16), sample(2, 2, 3, 4, 5, dtype=torch.float16)
    with torch.no_grad():
        convolution.weight.fill_(300.0)
    x[1, :, 1, 1, 1] = 200.0
    got, held = moments(convolution, x), expected(convolution, x)
    assert got[1, :, 0].isposinf().all() and got[1, :, 1].isnan().all()
    torch.testing.assert_close(got[0], held[0], rtol=1e-3, atol=1e-3)


def test_one_of_many_channels_is_not_finite() -> None:
    """Of a second block of channels, and of a second group: no other one changes."""
    convolution, x = made(3, 4, 40, 2, groups=2), sample(2, 4, 2, 3, 4)
    whole = moments(convolution, x)
    with torch.no_grad():
        convolution.weight[2, 17] = math.inf
    x[:, 2] = x[:, 2].abs() + 1
    x[:, 3] = 0
    got = moments(convolution, x)
    assert got[:, 37, 0].isposinf().all() and got[:, 37, 1].isnan().all()
    assert bool(got[:, [*range(37), 38, 39]].isfinite().all()) and torch.equal(got[:, :20], whole[:, :20])


def test_a_value_that_nothing_reads() -> None:
    """Outputs that a padding leaves out are in no statistics, nor is what they alone would read."""
    convolution, x = made(3, 1, 2, 1, padding=1), sample(1, 1, 4, 4, 4)
    held = moments(convolution, x)
    x[0, 0, 0] = math.inf
    torch.testing.assert_close(moments(convolution, x), held, rtol=1e-12, atol=0)


# --- chains ---------------------------------------------------------------------------------------
def block(*stages: str | Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, **layer: Any) -> Stages:
    return trained(made(3, 3, 8, 3, stride=2, dtype=dtype, **layer), *stages)


@pytest.mark.parametrize(
    ("norm", "dtype", "layout"),
    [
        ("batch", torch.float32, "contiguous"),
        ("batch", torch.float16, "last"),
        ("instance", torch.float32, "last"),
        ("group", torch.bfloat16, "contiguous"),
        ("one_group", torch.float16, "contiguous"),
    ],
    ids=str,
)
def test_norms(norm: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(1)
    model, x = block(norm, F.hardswish, dtype=dtype, padding=1), sample(3, 3, 4, 5, 6, dtype=dtype)
    if layout == "last":
        x, model = x.contiguous(memory_format=LAST[5]), model.to(memory_format=LAST[5])
    check(model, x, FIRST, THEN, "hardswish -> ")


@pytest.mark.parametrize("allow_tf32", [True, False])
def test_a_norm_and_two_pools(allow_tf32: bool) -> None:
    """batch_norm_pools of the benchmark."""
    pools = [lambda y: F.avg_pool3d(y, 2)] * 2
    model, x = block("batch", *pools, padding=1), sample(4, 3, 6, 6, 6)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32):
        check(model, x, FIRST, f"{THEN} > avg_pool 2x2x2")


@pytest.mark.parametrize("dims", [1, 2])
def test_fewer_dims(dims: int) -> None:
    model = trained(made(dims, 3, 8, 3, stride=2), "instance", F.hardswish)
    check(model, sample(3, 3, *(5, 6)[:dims]), FIRST, THEN)


@pytest.mark.parametrize("of", ["x", "bias"])
def test_a_mean_far_from_zero(of: str) -> None:
    """A mean of 100 standard deviations, in the accuracy of float32; of GroupNorm the bias stays."""
    torch.manual_seed(0)
    model = block("group", padding=2)
    x = sample(2, 3, 6, 7, 9)
    if of == "x":
        x += 100
    else:
        with torch.no_grad():
            model.parts[0].bias.add_(100)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(model, x, FIRST, THEN)


def test_groups_and_dilation() -> None:
    check(block("group", dilation=3), sample(2, 3, 4, 5, 6), FIRST, THEN)
    model = trained(made(3, 4, 8, 3, stride=2, groups=2), "group")
    check(model, sample(2, 4, 4, 5, 6), FIRST, THEN)


def test_what_it_is_not_for() -> None:
    """Something pointwise in front of the norm, and many channels: the convolution runs twice."""
    model = block(F.silu, "batch")
    check(model, sample(2, 3, 4, 5, 6), "then the convolution again")
    model = trained(made(3, 8, 8, 3, stride=2), "batch")
    check(model, sample(2, 8, 4, 5, 6), "then the convolution again")


def test_an_empty_batch() -> None:
    model, x = block("group"), sample(2, 3, 4, 5, 6)
    with torch.no_grad():
        fast = fxfuse.optimize(model, (x,))
        fast(x)
        assert FIRST in steps_run()
        assert fast(x[:0]).shape == model(x[:0]).shape


def test_the_same_bits_again() -> None:
    model, x = block("batch"), sample(2, 3, 4, 5, 6)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        first = fast(x)
        assert all(torch.equal(fast(x), first) for _ in range(2))
    assert FIRST in steps_run()


def test_other_weights_and_shapes() -> None:
    """Nothing of a call is kept."""
    model = block("instance")
    check(model, sample(2, 3, 4, 5, 6), FIRST)
    fast = fxfuse.optimize(model, (sample(2, 3, 4, 5, 6),))
    for size in ((4, 5, 6), (3, 7, 5), (4, 5, 6)):
        x = sample(2, 3, *size)
        with torch.no_grad():
            model.parts[0].weight.mul_(-1.5)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
