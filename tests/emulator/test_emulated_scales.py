"""Numbers that the weights and the bias are multiplied by: kernels multiply accumulators by them, and the bias."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import needs_compiler
from test_emulated_folds import F32, LIMIT, Then, assert_near, layer, run_prepared, samples
from test_emulated_sets import sets_always
from torch import nn

from fxfuse.kernels.convolution import planar

pytestmark = needs_compiler

#: model, sizes of x, float32's own accuracy, and what is so of the kernel that runs
Case = tuple[Callable[[], nn.Module], tuple[int, ...], bool, Callable[[object], bool]]
TWO = {"stride": 2, "padding": 1}
CASES: dict[str, Case] = {
    "clamp and divide": (
        lambda: Then(layer(16, 32, 3, **TWO), lambda y: y.clamp(min=-0.2) / 2), (2, 16, 4, 5, 6), False,
        lambda made: made.samples == 1,
    ),
    "a negative number": (
        lambda: Then(layer(16, 32, 3, **TWO), lambda y: F.relu6(y) * -0.3), (2, 16, 4, 5, 6), False,
        lambda made: not made.by_channel,
    ),
    "no bias": (
        lambda: Then(layer(16, 32, 3, bias=False, **TWO), lambda y: F.relu(y) * 3.0), (2, 16, 4, 5, 6), False,
        lambda made: True,
    ),
    "a shift behind": (
        lambda: Then(layer(16, 32, 3, **TWO), lambda y: F.relu(y * 3.0 + 0.5)), (2, 16, 4, 5, 6), False,
        lambda made: True,
    ),
    "float32's own accuracy": (
        lambda: Then(layer(16, 32, 3, **TWO), lambda y: F.relu(y) * -0.7), (2, 16, 4, 5, 6), True,
        lambda made: made.exact,
    ),
    "sectors": (
        lambda: Then(layer(8, 64, 3), lambda y: F.leaky_relu(y) * 0.7), (3, 8, 3, 5, 9), False,
        lambda made: made.by_channel,
    ),
    "sets": (
        lambda: Then(layer(16, 24, 4, **TWO), lambda y: F.relu(y) * -0.7), (17, 16, 3, 4, 4), False,
        lambda made: made.samples > 1,
    ),
    "planes": (
        lambda: Then(layer(3, 16, 4, **TWO), lambda y: F.relu(y) * -0.7), (2, 3, 4, 5, 8), False,
        lambda made: bool(made.planar),
    ),
    "softmax": (
        lambda: Then(layer(16, 24, 3, **TWO), lambda y: (F.relu(y) * 3.0).softmax(1)), (2, 16, 3, 4, 5), False,
        lambda made: True,
    ),
    "statistics": (
        lambda: Then(layer(16, 32, 3, **TWO), lambda y: F.group_norm(F.relu(y) * -3.0, 4)), (2, 16, 4, 5, 6), False,
        lambda made: True,
    ),
}  # fmt: skip


def check(name: str) -> None:
    make, sizes, exact, expected_of = CASES[name]
    torch.manual_seed(1)
    x = samples(*sizes) if name != "statistics" else torch.randn(sizes)
    with contextlib.ExitStack() as chosen:
        if name == "sets":
            chosen.enter_context(sets_always())
        if name == "planes":
            chosen.enter_context(mock.patch.object(planar, "WORTH_IT", 0.0))
        got, expected, made = run_prepared(make().eval(), x, exact=exact)
    kernel = made.schedule.kernel
    assert kernel.scales[0] != 1 and expected_of(made.convolution.made)
    assert kernel.scales[1] in (1.0, kernel.scales[0])
    assert "mul" not in kernel.stages and "scale_weight" not in [i.op for i in made.schedule.first.body]
    assert_near(got, expected, 1e-5 if exact else LIMIT[F32])


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_every_kind_of_kernel(name: str) -> None:
    check(name)


def extremes(scale: float, size: float) -> None:
    """The scales of weights and values make a product that a float holds, but not one of that with a number."""
    torch.manual_seed(1)
    model = Then(layer(16, 32, 3, bias=False, **TWO), lambda y: F.relu(y) * scale).eval()
    x = torch.randn(3, 16, 4, 5, 6) * size
    x[:, :, :2] = 0  # Inf times zero would be NaN
    with torch.no_grad():
        model.layer.weight.mul_(size)
    got, expected, made = run_prepared(model, x)
    assert made.schedule.kernel.scales == (scale, 1.0)
    if scale < 1:
        assert_near(got, expected, LIMIT[F32])
    else:  # what is not zero is too large for float32
        assert not got.isnan().any() and got[expected > expected.max() / 10].isinf().all()


@pytest.mark.parametrize(("scale", "size"), [(1e-8, 1e-14), (1e16, 1e17)])
def test_products_that_no_float_holds(scale: float, size: float) -> None:
    extremes(scale, size)


BROKEN = {
    "weights, stored": ("conv_store.cuh", "f.scale[k] * Problem::weight_scale", "f.scale[k]", "clamp and divide"),
    "weights, of a set": ("conv_store.cuh", "of.scale * Problem::weight_scale", "of.scale", "sets"),
    "weights, of planes": ("conv_store.cuh", "y * Problem::weight_scale", "y", "planes"),
    "weights, sectors": ("conv_sectors.cuh", "channel_scale[c] * Problem::weight_scale", "channel_scale[c]", "sectors"),
    "bias, stored": ("conv_store.cuh", "to.bias[c] * Problem::bias_scale", "to.bias[c]", "clamp and divide"),
    "bias, sectors": ("conv_sectors.cuh", "a.to.bias[c] * Problem::bias_scale", "a.to.bias[c]", "sectors"),
    "weights, not finite": ("conv_direct.cuh", "w_) * Problem::weight_scale", "w_)", "clamp and divide"),
    "bias, not finite": ("conv_direct.cuh", "bias[c] * Problem::bias_scale", "bias[c]", "clamp and divide"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    header, text, instead, case = BROKEN[why]
    with device.broken(header, text, instead), pytest.raises(AssertionError):
        check(case)


@pytest.mark.parametrize(
    ("text", "instead", "scale", "size"),
    [
        ("!finite(scale * most * by)", "false", 1e16, 1e17),
        ("scale * least * by < 1.17549435e-38f", "false", 1e-8, 1e-14),
    ],
)
def test_extremes_that_nothing_looks_for_show(text: str, instead: str, scale: float, size: float) -> None:
    with device.broken("conv_direct.cuh", text, instead), pytest.raises(AssertionError):
        extremes(scale, size)


@pytest.mark.parametrize("tap", [(0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_the_largest_weight_is_found_wherever_it_is(tap: tuple[int, int, int]) -> None:
    """Four taps are read at once: one that were left out would overflow when it is scaled as the others are."""
    torch.manual_seed(0)
    module = nn.ConvTranspose3d(16, 8, 2, 2)
    with torch.no_grad():
        module.weight.mul_(1e-3)[(slice(None), slice(None), *tap)] = 1e3
    got, expected, _ = run_prepared(nn.Sequential(module, nn.ReLU()).eval(), torch.randn(2, 16, 4, 6, 8))
    assert_near(got, expected, LIMIT[F32])
