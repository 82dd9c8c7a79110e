"""Rows of several positions, which layers of few channels read, as the emitted kernels make and multiply them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import F32, LIMIT, Then, assert_near, layer, run_prepared, samples
from torch import nn

pytestmark = needs_compiler

TWO = {"stride": 2, "padding": 1}
#: model, sizes of x, float32's own accuracy, channels and positions of a row
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, tuple[int, int]]] = {
    "a mean of sums": (
        lambda: Then(layer(3, 16, 3, **TWO), lambda y, g: F.avg_pool3d(y * 2, 2) + g, torch.randn(16, 1, 1, 1)),
        (2, 3, 5, 9, 20), False, (3, 4),
    ),
    "all dims": (lambda: nn.Sequential(layer(1, 20, 3, **TWO), nn.GELU()), (2, 1, 5, 7, 12), False, (1, 8)),
    "more rows than positions": (lambda: layer(3, 24, 3), (3, 3, 4, 6, 8), False, (3, 3)),
    "rows that are no quads": (lambda: layer(2, 16, 3, padding=1), (2, 2, 3, 5, 11), False, (2, 3)),
    "fewer rows than positions": (lambda: layer(1, 16, 3, stride=1, padding=3), (3, 1, 6, 9, 13), False, (1, 9)),
    "a maximum of classes": (
        lambda: Then(layer(3, 16, 3, **TWO), lambda y, g: F.max_pool3d(y * g, 2), torch.randn(16, 1, 1, 1)),
        (3, 3, 4, 5, 8), False, (3, 4),
    ),
    "holes": (lambda: layer(4, 16, 3, dilation=(1, 2, 3), padding=2), (2, 4, 5, 9, 16), False, (4, 3)),
    "a stride of three": (lambda: layer(3, 16, 5, stride=(1, 2, 3), padding=2), (2, 3, 3, 4, 8), False, (3, 2)),
    "a stride of four": (lambda: layer(2, 12, 7, stride=4, padding=2), (2, 2, 2, 3, 5), False, (2, 3)),
    "16 numbers": (lambda: layer(8, 40, 3, **TWO), (2, 8, 3, 6, 8), False, (8, 2)),
    "channels are rows of instructions": (lambda: layer(3, 64, 3, padding=1), (2, 3, 3, 6, 16), False, (3, 3)),
    "float32's own accuracy": (lambda: layer(3, 16, 3, **TWO), (3, 3, 4, 5, 8), True, (3, 4)),
    "its own accuracy, a mean of sums": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.AvgPool3d(2)), (3, 3, 4, 5, 9), True, (3, 4),
    ),
    "groups": (lambda: layer(6, 40, 3, padding=1, groups=2), (3, 6, 3, 4, 9), False, (3, 3)),
    "two dims": (lambda: layer(3, 16, 5, dims=2, **TWO), (3, 3, 13, 20), False, (3, 3)),
    "one dim": (lambda: layer(2, 16, (1, 7), dims=2, padding=(0, 3)), (3, 2, 2, 150), False, (2, 7)),
    "a sum of channels": (
        lambda: Then(layer(3, 13, 3, **TWO), lambda y: y.softmax(1)), (2, 3, 3, 4, 9), False, (3, 4),
    ),
    "statistics": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.GroupNorm(4, 16), nn.Hardswish()), (2, 3, 3, 6, 9), False,
        (3, 4),
    ),
    "statistics, and a mean of sums": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.InstanceNorm3d(16), nn.AvgPool3d(2)), (2, 3, 3, 6, 9), False,
        (3, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", CASES)
def test_rows_of_several_positions(name: str, last: bool) -> None:
    """Samples that 16-bit numbers cannot hold are among them, but where statistics would be NaN."""
    model, sizes, exact, (channels, positions) = CASES[name]
    torch.manual_seed(3)
    x = torch.randn(sizes) if "statistics" in name else samples(*sizes, dtype=F32)
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}[len(sizes)]
    x = x.contiguous(memory_format=memory if last else torch.contiguous_format)
    got, expected, made = run_prepared(model().eval(), x, exact=exact)
    assert made.convolution is not None
    row = made.convolution.made.layer
    assert row.beside and (last or (row.channels, len(row.offsets)) == (channels, positions))
    assert_near(got, expected, 1e-6 if exact else LIMIT[F32])
