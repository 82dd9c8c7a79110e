"""A value and its own reductions in one emitted kernel: in a convolution's epilogue, and by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from along import rows_together
from emulator.device import needs_compiler
from persistents import FUNCTIONS
from test_emulated_folds import BF16, F16, F32, INF, LIMIT, NAN, Then, assert_near, layer, rows, run

from fxfuse.kernels.convolution.specialisation import Along

pytestmark = needs_compiler

TWO = {"stride": 2, "padding": 1}
names = pytest.mark.parametrize("name", FUNCTIONS)


@names
@pytest.mark.parametrize(("dtype", "last"), [(F32, False), (F32, True), (F16, True), (BF16, False)], ids=str)
def test_over_channels(name: str, dtype: torch.dtype, last: bool) -> None:
    function, stages = FUNCTIONS[name]
    torch.manual_seed(1)
    model = Then(layer(8, 13, 3, dtype, **TWO), lambda y: function(y, 1)).eval()
    got, expected, made = run(model, torch.randn(2, 8, 3, 4, 5, dtype=dtype), last=last)
    assert made.startswith(f"one kernel: conv_transpose > {stages} -> ") and ";" not in made, made
    assert_near(got, expected, LIMIT[dtype])


@names
def test_in_float32s_own_accuracy(name: str) -> None:
    function, stages = FUNCTIONS[name]
    torch.manual_seed(1)
    model = Then(layer(8, 20, 3), lambda y: function(y, 1)).eval()
    got, expected, made = run(model, torch.randn(2, 8, 3, 4, 5), exact=True)
    assert made.startswith(f"one kernel: conv_transpose > {stages} -> ") and ";" not in made, made
    assert_near(got, expected, 3e-6)


@names
@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_behind_torchs_convolution(name: str, dim: int, last: bool) -> None:
    function, stages = FUNCTIONS[name]
    if last and dim > 1:
        pytest.skip("torch runs reductions over a dim that is neither the first nor the last of a position")
    torch.manual_seed(1)
    model = Then(layer(2, 21, 2), lambda y: function(y, dim)).eval()
    got, expected, made = run(model, torch.randn(2, 2, 3, 4, 5), anchored=False, last=last)
    assert made.startswith(f"then conv_transpose; then one kernel: {stages} -> ") and made.count("kernel") == 1, made
    assert_near(got, expected, 2e-6)


@pytest.mark.parametrize("name", [n for n, (f, _) in FUNCTIONS.items() if f(torch.rand(2, 3), 1).shape == (2, 3)])
@pytest.mark.parametrize("way", list(Along))
def test_along_w(name: str, way: Along) -> None:
    function, stages = FUNCTIONS[name]
    torch.manual_seed(1)
    model = Then(layer(8, 16, 3), lambda y: function(y, 4)).eval()
    with rows_together(way):
        got, expected, made = run(model, torch.randn(2, 8, 3, 4, 11))
    assert made.startswith(f"one kernel: conv_transpose > {stages} -> ") and ";" not in made, made
    assert_near(got, expected, LIMIT[F32])


@names
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_rows_that_are_not_finite(name: str, dtype: torch.dtype) -> None:
    if dtype is F16 and name in ("logsumexp", "normalize twice", "by hand", "PixelNorm"):
        pytest.skip("values that float16 does not hold")
    function, _ = FUNCTIONS[name]
    torch.manual_seed(2)
    convolution = layer(2, 13, 1, dtype)
    with torch.no_grad():
        convolution.weight[0] = convolution.weight[0].abs() + 0.1  # Inf of the first channel reaches all with its sign
        convolution.weight[1, ::2] *= -1
    got, expected, _ = run(Then(convolution, lambda y: function(y, 1)).eval(), rows(dtype))
    assert_near(got, expected, LIMIT[dtype])


def test_between_a_pool_and_operands() -> None:
    """What is in front of the value, and what is behind the result, goes into the same kernel."""
    torch.manual_seed(3)
    model = Then(
        layer(8, 12, 4, **TWO),
        lambda y, g, r: F.gelu(FUNCTIONS["gate"][0](F.max_pool3d(y.minimum(g), 2), 1) + r),
        torch.rand(12, 1, 1, 1),
        torch.rand(3, 4, 5),
    ).eval()
    got, expected, made = run(model, torch.randn(2, 8, 3, 4, 5))
    assert made.startswith(
        "one kernel: conv_transpose > minimum > max_pool 2x2x2 > mean > amax > add > sigmoid > mul > add"
    )
    assert ";" not in made
    assert_near(got, expected, LIMIT[F32])


def test_lengths_at_the_ends_of_their_range() -> None:
    """Of zeros, of less than eps, of NaN and of Inf."""
    convolution = layer(1, 4, 1)
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        convolution.bias.zero_()
    x = torch.tensor([0.0, 1e-14, -3e-7, 2e18, INF, NAN]).reshape(1, 1, 1, 1, 6)
    model = Then(convolution, lambda y: F.normalize(y, dim=1)).eval()
    got, expected, made = run(model, x, exact=True)
    assert made.startswith("one kernel: conv_transpose > normalize -> ")
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_lengths_of_zero(dtype: torch.dtype, twice: bool) -> None:
    """NaN where torch has it: 1e-12 is zero in float16."""
    convolution = layer(1, 4, 1, dtype)
    with torch.no_grad():
        convolution.bias.zero_()
    model = Then(convolution, lambda y: F.normalize(y, dim=1) * (y.amax(1, True) + 1 if twice else 1.5)).eval()
    x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 1, 2).to(dtype)
    expected = model(x)
    got, _, _ = run(model, x)
    assert torch.equal(got.isnan(), expected.isnan()) and bool(got[..., 1].isfinite().all())


@pytest.mark.parametrize("size", [0.0, 2.0**-147, 2.0**-128, 1e-25, 1.0, 1e25, 3e38, INF, NAN])
def test_one_divisor_of_many_elements(size: float) -> None:
    """Of any size: its reciprocal alone would be Inf, or have few bits."""
    convolution = layer(1, 4, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([1.0, 0.5, -0.25, 0.0]).reshape(1, 4, 1, 1, 1))
        convolution.bias.zero_()
    x = torch.tensor([size, -size, 1.0]).reshape(1, 1, 1, 1, 3)
    model = Then(convolution, lambda y: y / y.abs().amax(1, keepdim=True)).eval()
    got, expected, made = run(model, x, anchored=False)
    assert "one kernel: abs > amax > div -> " in made
    expected = torch.where((x == 0).expand_as(expected), NAN, expected)
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("anchored", [True, False], ids=["epilogue", "by_itself"])
def test_the_largest_is_one_of_itself(anchored: bool) -> None:
    """A reciprocal alone makes 0.99999994 of one in eight."""
    torch.manual_seed(4)
    model = Then(layer(4, 8, 1), lambda y: (y / y.amax(1, keepdim=True)).floor().clamp(-9, 9)).eval()
    got, _, made = run(model, torch.randn(2, 4, 4, 5, 6), anchored=anchored)
    assert "amax > div > floor" in made
    assert bool((got.amax(1) >= 1).all())


@pytest.mark.parametrize("other", [1, 4])
def test_a_reduction_over_another_dim_is_none_of_a_row(other: int) -> None:
    """It, and one of a row's own value, are left to other kernels."""
    torch.manual_seed(5)
    functions = (
        lambda z: z - z.softmax(other) * z.amax(5 - other, keepdim=True),
        lambda z: z - (z + 1).mean(1, True).sum(other, True),
    )
    for function in functions:
        model = Then(layer(4, 8, 2), lambda y, f=function: f(y - y.mean(1, True))).eval()
        got, expected, _ = run(model, torch.randn(2, 4, 3, 4, 5), anchored=False)
        assert_near(got, expected, 2e-6)
