"""Maxima of a chain that only grows with its value, or only falls: two values of a window go through it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import F16, F32, LIMIT, Then, assert_near, layer, run_prepared, samples
from torch import Tensor, nn

from fxfuse.kernels.stages.steps import Launch

pytestmark = needs_compiler

TWO = {"stride": 2, "padding": 1}
#: model, sizes of x, dtype, float32's own accuracy, whether the chain is monotone
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool]] = {
    "signs of all kinds": (
        lambda: Then(layer(8, 12, 3, **TWO), lambda y, g: F.max_pool3d(F.leaky_relu(y, 0.2) * g, 2),
                     torch.tensor([1.0, -1, 0, -0.0, 3, -2, 0.5, -0.1, 1e-30, -1e30, 7, -7]).view(12, 1, 1, 1)),
        (3, 8, 3, 4, 5), F32, False, True,
    ),
    "of a sample, and divided": (
        lambda: Then(layer(8, 12, 3, output_padding=1, **TWO),
                     lambda y, g, h: F.max_pool3d(torch.tanh(2 - y * g) / h, 2),
                     torch.randn(3, 12, 1, 1, 1), torch.randn(12, 1, 1, 1)),
        (3, 8, 3, 4, 5), F32, False, True,
    ),
    "float32's own accuracy, and a reduction": (
        lambda: Then(layer(8, 12, 2, stride=2), lambda y, g: F.max_pool3d(F.elu(y) * g, 2).sum(1),
                     torch.randn(12, 1, 1, 1)),
        (2, 8, 3, 4, 5), F32, True, True,
    ),
    "a window of several": (
        lambda: Then(layer(8, 12, 3, **TWO), lambda y, g: F.max_pool3d(torch.sigmoid(y) * g, 4),
                     torch.randn(12, 1, 1, 1)),
        (2, 8, 4, 4, 6), F32, False, True,
    ),
    "statistics": (
        lambda: Then(layer(8, 12, 3, **TWO), lambda y, g: F.instance_norm(F.max_pool3d(torch.relu(y) * g, 2)),
                     torch.randn(12, 1, 1, 1)),
        (2, 8, 4, 5, 6), F32, False, True,
    ),
    "float16 with numbers": (
        lambda: Then(layer(8, 12, 3, F16, **TWO), lambda y: F.max_pool3d(1.5 - torch.sigmoid(y), 2)),
        (3, 8, 3, 4, 5), F16, False, True,
    ),
    "float16 with operands": (
        lambda: Then(layer(8, 12, 3, F16, **TWO), lambda y, g: F.max_pool3d(torch.relu(y) * g, 2),
                     torch.randn(12, 1, 1, 1).half()),
        (3, 8, 3, 4, 5), F16, False, False,
    ),
    "twice the value": (
        lambda: Then(layer(8, 12, 3, **TWO), lambda y: F.max_pool3d(y * torch.sigmoid(y), 2)),
        (3, 8, 3, 4, 5), F32, False, False,
    ),
    "a place in the channel": (
        lambda: Then(layer(8, 12, 3, **TWO), lambda y, g: F.max_pool3d(y.relu() * g, 2), torch.randn(9)),
        (3, 8, 3, 4, 5), F32, False, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_maximum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the truth, and the same bits as when every value goes through the chain."""
    model, sizes, dtype, exact, monotone = CASES[name]

    def run() -> tuple[Tensor, Tensor, bool]:
        torch.manual_seed(1)
        x = torch.randn(sizes) if name == "statistics" else samples(*sizes, dtype=dtype)
        got, expected, made = run_prepared(model().eval(), x.to(dtype), exact=exact)
        assert made.convolution is not None
        return got, expected, made.convolution.epilogue.monotone

    got, expected, found = run()
    assert found == monotone
    assert_near(got, expected, 2e-6 if exact else LIMIT[dtype])
    if monotone:
        monkeypatch.setattr(Launch, "monotone", False)
        every, _, found = run()
        assert not found and torch.equal(got.nan_to_num(7), every.nan_to_num(7))


@pytest.mark.parametrize("by", [math.inf, -math.inf, math.nan, 0.0], ids=str)
@pytest.mark.parametrize("divided", [False, True], ids=["mul", "div"])
def test_numbers_that_make_nan_of_a_value_between(by: float, divided: bool) -> None:
    """A value of zero is neither the largest nor the smallest one of its window."""
    torch.manual_seed(2)
    g = torch.tensor([1.0, by, -2.0, 0.5]).view(4, 1, 1, 1)

    def behind(y: Tensor, g: Tensor) -> Tensor:
        z = F.leaky_relu(y, 0.1)
        return F.max_pool3d(z / g if divided else z * g, 2)

    model = Then(layer(4, 4, 2, stride=2), behind, g).eval()
    with torch.no_grad():
        model.layer.weight[:, :, 0, 0, 1], model.layer.bias[:] = 0.0, 0.0  # type: ignore[index, operator]
    got, expected, made = run_prepared(model, torch.randn(2, 4, 3, 4, 5))
    assert made.convolution is not None and made.convolution.epilogue.steady
    assert_near(got, expected, LIMIT[F32])
    assert torch.equal(got.isinf(), expected.isinf())
