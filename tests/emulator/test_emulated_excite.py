"""Squeeze and excitation behind a convolution: channels weighted by what products with matrices make of their means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F16, F32, LIMIT, Then, assert_near, layer, run, samples
from torch import Tensor, nn

pytestmark = needs_compiler

SPACE = (2, 3, 4)
TWO = {"stride": 2, "padding": 1}


def by_convolutions(y: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    means = F.adaptive_avg_pool3d(y, 1)
    hidden = F.relu(F.conv3d(means, down[..., None, None, None], bias))
    return y * F.conv3d(hidden, up[..., None, None, None]).sigmoid()


def by_linear_layers(y: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    weight = F.linear(F.silu(F.linear(y.flatten(2).mean(-1), down, bias)), up).sigmoid()
    return y * weight.view(*y.shape[:2], 1, 1, 1)


def of_means_and_maxima(y: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    """One pair of matrices for both."""
    both = [F.linear(F.relu(F.linear(v, down, bias)), up) for v in (y.mean(SPACE), y.amax(SPACE))]
    return F.relu(y) * (both[0] + both[1]).sigmoid()[:, :, None, None, None]


def shifted(y: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    """Scale and shift by what two matrices make of the same vector."""
    hidden = F.relu(F.linear(y.mean(SPACE), down, bias))
    scale, shift = F.linear(hidden, up), F.linear(hidden, up * 2)
    return y * scale[:, :, None, None, None] + shift[:, :, None, None, None]


BEHIND: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (by_convolutions, by_linear_layers, of_means_and_maxima, shifted)
}
#: layer, sizes of x, dtype, channels as neighbours, float32's own accuracy
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool]] = {
    "float32": (lambda: layer(8, 20, 3, **TWO), (3, 8, 3, 4, 9), F32, False, False),
    "float16": (lambda: layer(8, 24, 3, F16, output_padding=1, **TWO), (2, 8, 3, 5, 6), F16, False, False),
    "bfloat16, channels last": (lambda: layer(16, 40, 2, BF16, stride=2), (2, 16, 3, 4, 7), BF16, True, False),
    "float32's own accuracy": (lambda: layer(8, 16, (1, 3, 3)), (2, 8, 2, 5, 9), F32, False, True),
}


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("of", LAYERS)
@pytest.mark.parametrize("name", BEHIND)
def test_excited(name: str, of: str, twice: bool) -> None:
    make, sizes, dtype, last, exact = LAYERS[of]
    torch.manual_seed(len(name))
    convolution = make()
    channels = convolution.out_channels
    g = [torch.randn(shape).to(dtype) for shape in ((5, channels), (5,), (channels, 5))]
    model = Then(convolution, BEHIND[name], *g).eval()  # type: ignore[arg-type]
    x = samples(*sizes, dtype=dtype) if name == "by_linear_layers" else torch.randn(sizes).to(dtype)
    got, expected, plan = run(model, x, last=last, exact=exact, gathered=True, twice=twice)
    assert ("the convolution again" in plan) == twice, plan
    assert plan.count("linear") >= 2 and "kernel on small tensors" in plan, plan
    assert "then linear" not in plan and "torch" not in plan.replace("conv_transpose", ""), plan
    assert_near(got, expected, LIMIT[dtype])
