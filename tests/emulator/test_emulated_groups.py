"""Groups of few channels, which are multiplied together: their weights are packed with zeros between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import F16, F32, LIMIT, Then, assert_near, layer, run_prepared, samples
from torch import nn

pytestmark = needs_compiler

#: model, sizes of x, float32's own accuracy, how many groups are one
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, int]] = {
    "two of eight channels": (lambda: layer(32, 32, 3, stride=2, padding=1, groups=4), (3, 32, 3, 4, 9), False, 2),
    "one channel each": (lambda: layer(24, 24, 3, padding=1, groups=24), (3, 24, 3, 5, 8), False, 12),
    "more channels go out": (lambda: layer(12, 30, 2, stride=2, groups=6), (2, 12, 3, 4, 5), False, 3),
    "fewer channels go out": (lambda: layer(18, 6, 3, bias=False, groups=6), (2, 18, 3, 4, 5), False, 3),
    "all of them": (lambda: layer(15, 10, 3, groups=5), (2, 15, 3, 4, 5), False, 5),
    "float32's own accuracy": (lambda: layer(16, 16, 3, stride=2, groups=8), (3, 16, 3, 4, 5), True, 8),
    "a sum of classes": (
        lambda: Then(layer(16, 8, 3, stride=2, padding=1, groups=4), lambda y: F.avg_pool3d(y, 2)),
        (2, 16, 4, 5, 6), False, 4,
    ),
    "a maximum of them": (
        lambda: Then(layer(16, 8, 3, stride=2, padding=1, groups=4), lambda y, g: F.max_pool3d(y * g, 2),
                     torch.randn(8, 1, 1, 1)),
        (3, 16, 4, 5, 6), False, 4,
    ),
    "statistics": (
        lambda: nn.Sequential(layer(24, 48, 3, groups=6), nn.InstanceNorm3d(48)), (2, 24, 3, 4, 9), False, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", CASES)
def test_groups(name: str, last: bool) -> None:
    """Samples that 16-bit numbers cannot hold are among them, but where statistics would be NaN."""
    model, sizes, exact, joined = CASES[name]
    torch.manual_seed(1)
    x = torch.randn(sizes) if name == "statistics" else samples(*sizes, dtype=F32)
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    got, expected, made = run_prepared(model().eval(), x, exact=exact)
    assert made.convolution is not None and made.convolution.made.layer.joined == joined
    assert_near(got, expected, 1e-6 if exact else LIMIT[F32])


def test_groups_of_numbers_that_may_be_infinite_stay_apart() -> None:
    """Zero times Inf is not zero, and 16-bit numbers of so small a layer are not looked at."""
    torch.manual_seed(2)
    x = torch.randn(2, 16, 3, 4, 9).to(F16)
    x[1, 5, 1, 2, 3] = float("inf")
    got, expected, made = run_prepared(layer(16, 16, 3, F16, stride=2, groups=4).eval(), x)
    assert made.convolution is not None and made.convolution.made.layer.joined == 1
    assert_near(got, expected, LIMIT[F16])
    assert not expected.isfinite().all()
