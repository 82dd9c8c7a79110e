"""Convolutions of few channels, whose tiles have twice the usual rows, as the emitted kernels compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F32, LIMIT, Then, assert_near, layer, run_prepared, samples
from torch import nn

from fxfuse.kernels.convolution import adapted, tiling
from fxfuse.kernels.convolution.specialisation import CONSUMERS, MOST_TILES

pytestmark = needs_compiler

TWO = {"stride": 2, "padding": 1}


@pytest.fixture(autouse=True)
def _every_tile_counts() -> Iterator[None]:
    """Tiles are what a call takes, one after the other: the fewer the better."""
    with mock.patch.object(tiling, "PROCESSORS", 1), mock.patch.object(adapted, "TILE_CYCLES", 10**9):
        yield


#: model, sizes of x, dtype, channels as neighbours, float32's own accuracy
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool]] = {
    "a mean of sums": (
        lambda: Then(layer(3, 16, 3, **TWO), lambda y, g: F.avg_pool3d(y * g, 2) + g, torch.randn(16, 1, 1, 1)),
        (2, 3, 3, 19, 17), F32, False, False,
    ),
    "a mean of sums, float32's own accuracy": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.AvgPool3d(2)), (2, 3, 5, 17, 17), F32, False, True,
    ),
    "a mean of sums, channels last": (
        lambda: nn.Sequential(layer(3, 13, 3, **TWO), nn.AvgPool3d(2)), (2, 3, 3, 19, 17), F32, True, False,
    ),
    "runs of whole rows": (
        lambda: nn.Sequential(layer(20, 12, 2), nn.GELU()), (3, 20, 3, 18, 16), F32, False, False,
    ),
    "groups": (lambda: layer(8, 32, (1, 2, 2), BF16, groups=2), (2, 8, 2, 60, 20), BF16, False, False),
    "two classes": (lambda: layer(8, 8, (1, 1, 2), F32, stride=(1, 1, 2)), (2, 8, 2, 40, 19), F32, False, False),
    "statistics": (
        lambda: nn.Sequential(layer(8, 16, 2), nn.InstanceNorm3d(16), nn.ReLU()), (2, 8, 3, 18, 17), F32, False, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_twice_the_rows(name: str) -> None:
    model, sizes, dtype, last, exact = CASES[name]
    torch.manual_seed(7)
    x = samples(*sizes, dtype=dtype) if "statistics" not in name else torch.randn(sizes)
    got, expected, made = run_prepared(model().to(dtype).eval(), x, last=last, exact=exact)
    assert made.convolution is not None and made.convolution.made.m_tiles == MOST_TILES // CONSUMERS
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])
