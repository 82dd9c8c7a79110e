"""Reductions over w in a convolution's epilogue, as the emitted kernels compute them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from along import rows_together
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F16, F32, LIMIT, Then, assert_near, layer, run_prepared, samples
from torch import Tensor, nn

from fxfuse.kernels.convolution.specialisation import Along
from fxfuse.kernels.runtime.prepared import Prepared

pytestmark = needs_compiler

INF, NAN = math.inf, math.nan
TWO = {"stride": 2, "padding": 1}
EVEN = {**TWO, "output_padding": 1}


@pytest.fixture(params=Along, ids=lambda along: along.name.lower(), autouse=True)
def along(request: pytest.FixtureRequest) -> Iterator[Along]:
    with rows_together(request.param):
        yield request.param


def way_of(made: Prepared) -> Along | None:
    assert made.convolution is not None
    return made.convolution.made.along


def norm(y: Tensor, *parameters: Tensor) -> Tensor:
    return F.layer_norm(y, y.shape[-1:], *parameters)


def rms(y: Tensor, *parameters: Tensor) -> Tensor:
    return F.rms_norm(y, y.shape[-1:], *parameters, eps=1e-3)


#: model, sizes of x, dtype, float32's own accuracy, what the one kernel takes
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, str]] = {
    "softmax of an odd row": (
        lambda: Then(layer(6, 10, 3, **TWO), lambda y: y.softmax(-1).sigmoid()),
        (2, 6, 3, 4, 9), F32, False, "conv_transpose > softmax > sigmoid",
    ),
    "pairs of neighbours": (
        lambda: Then(layer(6, 24, 3, **EVEN), lambda y, r: y.log_softmax(-1) + r, torch.rand(16)),
        (2, 6, 2, 3, 8), F32, False, "conv_transpose > log_softmax > add",
    ),
    "one class": (
        lambda: Then(layer(8, 13, 2), lambda y, g, r: (y.tanh() * g + r).softmax(4), torch.rand(13, 1, 1, 1),
                     torch.rand(7, 18)),
        (1, 8, 2, 6, 17), F32, False, "conv_transpose > tanh > mul > add > softmax",
    ),
    "many channels": (
        lambda: Then(layer(8, 130, 2, stride=2), lambda y, w: F.gelu(y.softmax(-1) * w), torch.rand(32)),
        (2, 8, 2, 3, 16), F32, False, "conv_transpose > softmax > mul > gelu",
    ),
    "operands of all kinds around it": (
        lambda: Then(layer(8, 13, 3, **TWO), lambda y, g, r, s: torch.maximum(y, g).softmax(4) * r + s,
                     torch.rand(13, 1, 1, 1), torch.rand(5, 1, 13), torch.rand(2, 13, 5, 9, 13)),
        (2, 8, 3, 5, 7), F32, False, "conv_transpose > maximum > softmax > mul > add",
    ),
    "three classes along each dim, of a longer row than one thread reads at once": (
        lambda: Then(layer(4, 9, 4, stride=3), lambda y: y.relu().softmax(-1)),
        (1, 4, 2, 3, 33), F32, False, "conv_transpose > relu > softmax",
    ),
    "strides that differ": (
        lambda: Then(layer(4, 17, 3, stride=(2, 1, 3)), lambda y: y.log_softmax(-1)),
        (2, 4, 3, 6, 10), F32, False, "conv_transpose > log_softmax",
    ),
    "groups": (
        lambda: Then(layer(8, 12, 3, groups=4, **EVEN), lambda y: y.softmax(-1)),
        (2, 8, 3, 4, 6), F32, False, "conv_transpose > softmax",
    ),
    "many rows": (
        lambda: Then(layer(3, 40, 3, **EVEN), lambda y: y.softmax(-1)),
        (1, 3, 5, 19, 20), F32, False, "conv_transpose > softmax",
    ),
    "float16, two dims": (
        lambda: Then(layer(20, 33, 4, F16, 2, stride=(1, 2)), lambda y, r: F.silu(y).softmax(3) + r, torch.rand(9, 1)),
        (2, 20, 6, 5), F16, False, "conv_transpose > silu > softmax > add",
    ),
    "bfloat16": (
        lambda: Then(layer(8, 70, 3, BF16), lambda y: (y * 2).log_softmax(4)),
        (2, 8, 4, 5, 6), BF16, False, "conv_transpose > mul > log_softmax",
    ),
    "float32's own accuracy": (
        lambda: Then(layer(16, 24, 3, **TWO), lambda y: y.tanh().log_softmax(-1)),
        (2, 16, 3, 4, 5), F32, True, "conv_transpose > tanh > log_softmax",
    ),
    "a mean of rows": (
        lambda: Then(layer(8, 24, 3, **EVEN), lambda y, w: F.gelu(F.avg_pool3d(y.tanh().softmax(4) * w, 2)),
                     torch.rand(16)),
        (2, 8, 3, 5, 8), F32, False, "conv_transpose > tanh > softmax > mul > avg_pool 2x2x2 > gelu",
    ),
    "a maximum of rows, some of which no window has": (
        lambda: Then(layer(4, 9, 4, stride=(3, 2, 2), padding=1, output_padding=(1, 0, 0)),
                     lambda y, r: F.max_pool3d(y.log_softmax(-1), (3, 2, 2)) + r, torch.rand(7, 1)),
        (2, 4, 2, 7, 12), F32, False, "conv_transpose > log_softmax > max_pool 3x2x2 > add",
    ),
    "a maximum in float16": (
        lambda: Then(layer(4, 40, 3, F16, **EVEN), lambda y: F.max_pool3d(y.softmax(-1), 2)),
        (1, 4, 3, 9, 16), F16, False, "conv_transpose > softmax > max_pool 2x2x2",
    ),
    "a mean in float32's own accuracy": (
        lambda: Then(layer(4, 12, 3, **EVEN), lambda y: F.avg_pool3d(y.softmax(-1), 2)),
        (1, 4, 3, 4, 8), F32, True, "conv_transpose > softmax > avg_pool 2x2x2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_kernel(name: str, along: Along) -> None:
    model, sizes, dtype, exact, stages = CASES[name]
    torch.manual_seed(1)
    got, expected, prepared = run_prepared(model().to(dtype).eval(), samples(*sizes, dtype=dtype), exact=exact)
    made = str(prepared.schedule)
    assert made.startswith(f"one kernel: {stages} -> ") and ";" not in made, made
    assert way_of(prepared) is along
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, str]] = {
    "weights and a bias": (
        lambda: Then(layer(8, 24, 3, **EVEN), lambda y, w, b: F.gelu(norm(y, w, b)), torch.rand(10), torch.rand(10)),
        (2, 8, 3, 4, 5), F32, False, "conv_transpose > normalise > mul > add > gelu",
    ),
    "a mean of squares": (
        lambda: Then(layer(8, 13, 3, **TWO), rms, torch.rand(9)),
        (2, 8, 3, 4, 5), F32, False, "conv_transpose > normalise > mul",
    ),
    "float32's own accuracy, far from zero": (
        lambda: Then(layer(8, 24, 3), lambda y: norm(y.tanh() + 100)),
        (2, 8, 3, 4, 6), F32, True, "conv_transpose > tanh > add > normalise",
    ),
    "float16": (
        lambda: Then(layer(8, 40, 3, F16, **EVEN), rms, torch.rand(16).half()),
        (2, 8, 3, 4, 8), F16, False, "conv_transpose > cast > normalise > mul > cast",
    ),
    "a mean of rows": (
        lambda: Then(layer(8, 24, 3, **EVEN), lambda y, w: F.gelu(F.avg_pool3d(norm(y.tanh(), w), 2)), torch.rand(16)),
        (2, 8, 3, 5, 8), F32, False, "conv_transpose > tanh > normalise > mul > avg_pool 2x2x2 > gelu",
    ),
    "a maximum of rows in float16": (
        lambda: Then(layer(8, 24, 3, F16, **EVEN), lambda y, w: F.gelu(F.max_pool3d(norm(y.tanh(), w), 2)),
                     torch.rand(16).half()),
        (2, 8, 3, 5, 8), F16, False,
        "conv_transpose > tanh > cast > normalise > mul > cast > max_pool 2x2x2 > gelu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, along: Along) -> None:
    """Without a sample whose squares float32 cannot hold, which other cases have."""
    model, sizes, dtype, exact, stages = NORMS[name]
    torch.manual_seed(1)
    got, expected, prepared = run_prepared(model().to(dtype).eval(), torch.randn(sizes, dtype=dtype), exact=exact)
    made = str(prepared.schedule)
    assert made.startswith(f"one kernel: {stages} -> ") and ";" not in made, made
    assert way_of(prepared) is along
    assert_near(got, expected, 2e-4 if exact else 2 * LIMIT[dtype])


@pytest.mark.parametrize("pools", [False, True], ids=["rows", "pools"])
@pytest.mark.parametrize("reduction", [norm, rms, lambda y: y.softmax(-1)], ids=["layer_norm", "rms_norm", "softmax"])
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_rows_that_are_not_finite(
    dtype: torch.dtype, reduction: Callable[[Tensor], Tensor], pools: bool, along: Along
) -> None:
    """Rows that are all Inf, all -Inf, NaN, of both kinds of Inf, among others, and their neighbours."""
    torch.manual_seed(2)
    convolution = layer(2, 13, 2, dtype, stride=2)
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight.abs() + 0.1)
    x = torch.randn(2, 2, 2, 6, 8)
    x[0, 0, 0, 0] = INF
    x[0, 0, 0, 1] = -INF
    x[0, 0, 0, 2, 3], x[0, 1, 0, 3, 2], x[0, 0, 0, 4, 5], x[0, 0, 0, 4, 6] = NAN, INF, INF, -INF
    pool = (lambda y: F.max_pool3d(y, 2)) if pools else (lambda y: y)
    got, expected, made = run_prepared(Then(convolution, lambda y: pool(reduction(y))).eval(), x.to(dtype))
    assert ";" not in str(made.schedule) and way_of(made) is along
    assert_near(got, expected, 2 * LIMIT[dtype])


def test_rows_that_tiles_do_not_hold() -> None:
    """They have a kernel of their own, and the report says why."""
    model = Then(layer(4, 8, 3, **EVEN), lambda y: y.softmax(-1)).eval()
    got, expected, made = run_prepared(model, torch.randn(1, 4, 1, 2, 600))
    assert str(made.schedule).startswith("one kernel: conv_transpose -> f32[1, 8, 2, 4, 1200]; then softmax")
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize("width", [8, 7])
def test_rows_of_four_classes(width: int, along: Along) -> None:
    """Pairs of neighbours of which a position has two."""
    model = Then(layer(4, 9, 5, stride=(1, 2, 4), padding=(0, 0, 1)), lambda y: y.softmax(-1)).eval()
    got, expected, made = run_prepared(model, torch.randn(2, 4, 2, 3, width))
    assert ";" not in str(made.schedule) and way_of(made) is along
    assert_near(got, expected, LIMIT[F32])


def test_a_result_that_is_channels_last() -> None:
    """torch's rms_norm keeps that layout: its rows are no neighbours in memory."""
    got, expected, made = run_prepared(Then(layer(4, 8, 3, **TWO), rms).eval(), torch.randn(2, 4, 2, 3, 5), last=True)
    assert str(made.schedule).endswith("; then rms_norm")
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize(("stride", "ceil"), [(2, True), (3, False)])
def test_pools_that_are_left_to_others(stride: int, ceil: bool, along: Along) -> None:
    """A window that is not whole, or whose elements along w are in several threads."""
    convolution = layer(4, 8, 3, stride=stride, output_padding=(0, 0, 1) if ceil else 0)
    model = Then(convolution, lambda y: F.max_pool3d(y.softmax(-1), stride, ceil_mode=ceil)).eval()
    got, expected, made = run_prepared(model, torch.randn(2, 4, 2, 3, 8))
    assert "softmax -> " in str(made.schedule) and "; then one kernel: max_pool" in str(made.schedule)
    assert way_of(made) is along
    assert_near(got, expected, LIMIT[F32])


def test_statistics_of_rows(along: Along) -> None:
    model = Then(layer(8, 24, 3, **EVEN), lambda y: F.instance_norm(y.softmax(-1), eps=1e-2)).eval()
    got, expected, made = run_prepared(model, torch.randn(2, 8, 4, 8, 16))
    assert "gathered on the way" not in str(made.schedule) and way_of(made) is along
    assert_near(got, expected, 2 * LIMIT[F32])


def test_a_row_of_more_blocks_than_tiles() -> None:
    convolution = layer(4, 8, 3, padding=1)
    got, expected, made = run_prepared(Then(convolution, lambda y: y.softmax(-1)).eval(), torch.randn(1, 4, 2, 3, 72))
    assert way_of(made) is not Along.HELD
    assert_near(got, expected, LIMIT[F32])
