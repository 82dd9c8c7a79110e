"""Average pools that the matrix units make: one class of the sums of all residue classes, beside float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F16, F32, INF, LIMIT, NAN, TWO, Then, assert_near, layer, run_prepared, samples
from torch import Tensor, nn

from fxfuse.kernels.convolution.tiling import Store
from fxfuse.kernels.runtime.prepared import Prepared

pytestmark = needs_compiler


def halved(y: Tensor) -> Tensor:
    return F.avg_pool3d(y, 2)


def store_of(made: Prepared) -> Store:
    assert made.convolution is not None and made.schedule.kernel is not None
    return made.convolution.tiling(made.schedule.kernel.sizes)[1]


#: model, sizes of x, dtype, channels as neighbours, float32's own accuracy, how it stores, what its kernel takes
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool, Store, str]] = {
    "numbers per channel around a mean": (
        lambda: Then(layer(3, 16, 3, **TWO), lambda y, s, b: (halved(y * s) + b) * 2,
                     torch.rand(16, 1, 1, 1), torch.rand(16, 1, 1, 1)),
        (2, 3, 4, 9, 10), F32, False, False, Store.PLANES, "conv_transpose > avg_pool 2x2x2 > add > mul",
    ),
    "tiles that begin anywhere in a row": (
        lambda: Then(layer(3, 8, 2, F32, 2, stride=2), lambda y: F.avg_pool2d(y, 2)),
        (2, 3, 45, 45), F32, False, False, Store.PLANES, "conv_transpose > avg_pool 2x2",
    ),
    "float32's own accuracy": (
        lambda: Then(layer(20, 12, 4, stride=2), lambda y: F.silu(halved(y))),
        (2, 20, 3, 4, 7), F32, False, True, Store.DIRECT, "conv_transpose > avg_pool 2x2x2 > silu",
    ),
    "float16": (
        lambda: Then(layer(3, 16, 3, F16, output_padding=1, **TWO), lambda y: F.adaptive_avg_pool3d(y, (4, 9, 10))),
        (2, 3, 4, 9, 10), F16, False, False, Store.PLANES, "conv_transpose > adaptive_avg_pool 2x2x2",
    ),
    "bfloat16, channels last": (
        lambda: Then(layer(16, 40, 3, BF16, 2, stride=2), lambda y: F.avg_pool2d(y, 2) * 3),
        (2, 16, 4, 9), BF16, True, False, Store.CHANNELS, "conv_transpose > avg_pool 2x2 > mul",
    ),
    "channels last": (
        lambda: Then(layer(8, 70, 3, F32, 2, output_padding=1, **TWO), lambda y: F.avg_pool2d(y, 2)),
        (2, 8, 4, 5), F32, True, False, Store.CHANNELS, "conv_transpose > avg_pool 2x2",
    ),
    "groups, odd strides": (
        lambda: Then(layer(12, 20, (2, 3, 5), stride=(1, 2, 3), groups=2), lambda y: F.avg_pool3d(y, (1, 2, 3))),
        (2, 12, 3, 4, 5), F32, False, False, Store.PLANES, "conv_transpose > avg_pool 1x2x3",
    ),
    "a stride beyond the kernel": (
        lambda: Then(layer(5, 7, (1, 1, 2), stride=(2, 3, 3)), lambda y: F.avg_pool3d(y, (2, 3, 3))),
        (2, 5, 7, 6, 7), F32, False, False, Store.PLANES, "conv_transpose > avg_pool 2x3x3",
    ),
    "dilation, float16": (
        lambda: Then(layer(4, 9, 3, F16, 2, stride=2, dilation=(2, 3), padding=(1, 2)), lambda y: F.avg_pool2d(y, 2)),
        (2, 4, 4, 5), F16, False, False, Store.PLANES, "conv_transpose > avg_pool 2x2",
    ),
    "wide rows": (
        lambda: Then(layer(1, 8, 3, F32, 2, stride=(2, 3)), lambda y: F.avg_pool2d(y, (2, 3))),
        (1, 1, 2, 299), F32, False, False, Store.ROWS, "conv_transpose > avg_pool 2x3",
    ),
    "two dims, a window of several": (
        lambda: Then(layer(6, 10, 5, F32, 2, stride=2), lambda y: F.avg_pool2d(y, 4, 2)),
        (2, 6, 9, 11), F32, False, False, Store.PLANES, "conv_transpose > avg_pool 2x2",
    ),
    "a softmax": (
        lambda: Then(layer(8, 12, 4, **TWO), lambda y: halved(y).softmax(1) * 2),
        (2, 8, 3, 6, 9), F32, False, False, Store.PLANES, "conv_transpose > avg_pool 2x2x2 > softmax > mul",
    ),
    "a sum of many channels, float16": (
        lambda: Then(layer(8, 130, 2, F16, 2, stride=2), lambda y: F.avg_pool2d(y, 2).logsumexp(1)),
        (2, 8, 4, 5), F16, False, False, Store.ONE, "conv_transpose > avg_pool 2x2 > logsumexp",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_class(name: str) -> None:
    model, sizes, dtype, last, exact, store, stages = CASES[name]
    torch.manual_seed(1)
    got, expected, made = run_prepared(model().to(dtype).eval(), samples(*sizes, dtype=dtype), last=last, exact=exact)
    assert f"one kernel: {stages} -> " in str(made.schedule)
    assert made.convolution is not None and made.convolution.made.merged and store_of(made) is store
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


@pytest.mark.parametrize("exact", [False, True], ids=["tf32", "ieee"])
def test_weights_of_the_same_sign(exact: bool) -> None:
    """The sum of eight of the largest is no Inf of half precision; products of it are as accurate as of others."""
    convolution = layer(8, 8, 4, stride=2, padding=1)
    with torch.no_grad():
        convolution.weight.copy_(2 - torch.rand_like(convolution.weight) / 8).mul_(
            torch.logspace(-15, 10, 8).view(8, 1, 1, 1)
        )
    x = torch.rand(3, 8, 3, 4, 5) * torch.tensor([1e-8, 1.0, 1e6]).view(3, 1, 1, 1, 1)
    got, expected, made = run_prepared(Then(convolution, halved), x, exact=exact)
    assert made.convolution is not None and made.convolution.made.headroom == 3
    for n in range(3):
        for c in range(8):
            assert_near(got[n, c], expected[n, c], 1e-6 if exact else 1e-3)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("of", ["x", "weight"])
def test_values_that_are_not_finite(of: str, value: float, dtype: torch.dtype) -> None:
    """Weights of a window with both signs: a sum of them would hide that Inf meets Inf."""
    torch.manual_seed(2)
    convolution, x = layer(3, 16, 3, dtype, 2, **TWO), torch.randn(2, 3, 7, 8).to(dtype)
    with torch.no_grad():
        if of == "x":
            x[0, 1, 3, 4] = value
        else:
            convolution.weight[1, 5, 2, 1] = value
    got, expected, made = run_prepared(Then(convolution, lambda y: F.avg_pool2d(y, 2)), x)
    assert made.convolution is not None and made.convolution.made.merged
    assert 0 < (~expected.isfinite()).sum() < expected.numel() / 4
    assert torch.equal(got.isposinf(), expected.isposinf()) and torch.equal(got.isneginf(), expected.isneginf())
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_statistics_of_what_is_pooled(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(layer(3, 12, 3, dtype, 2, **TWO), nn.AvgPool2d(2), nn.InstanceNorm2d(12)).train()
    x = torch.randn(2, 3, 9, 10).to(dtype)
    got, expected, made = run_prepared(model, x)
    assert "one kernel: conv_transpose > avg_pool 2x2 -> " in str(made.schedule) and "and statistics" in str(
        made.schedule
    )
    assert made.convolution is not None and made.convolution.made.merged
    assert_near(got, expected, 5 * LIMIT[dtype])
