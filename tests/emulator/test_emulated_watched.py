"""16-bit x that is looked at: what is finite may be multiplied with zeros, the rest may not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F16, LIMIT, Then, assert_near, layer, run_prepared
from torch import Tensor, nn

pytestmark = needs_compiler

TWO = {"stride": 2, "padding": 1}
#: model, sizes of x, dtype, how many groups are one
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, int]] = {
    "classes of different taps": (lambda: layer(16, 32, 3, F16, **TWO), (3, 16, 3, 4, 9), F16, 1),
    "bfloat16": (lambda: layer(16, 32, 3, BF16, **TWO), (3, 16, 3, 4, 9), BF16, 1),
    "groups": (lambda: layer(16, 16, 3, F16, groups=4, **TWO), (3, 16, 3, 4, 5), F16, 4),
    "each channel by itself": (lambda: layer(24, 24, 3, F16, padding=1, groups=24), (3, 24, 3, 5, 8), F16, 12),
    "a maximum of classes": (
        lambda: Then(layer(16, 8, 3, F16, groups=4, **TWO), lambda y: F.max_pool3d(y * 2, 2)), (3, 16, 4, 5, 6), F16, 4,
    ),
    "statistics": (
        lambda: nn.Sequential(layer(24, 48, 3, F16, groups=6), nn.InstanceNorm3d(48)), (3, 24, 3, 4, 9), F16, 2,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.kernels.convolution.kernels.WATCHING", -math.inf)


@pytest.mark.parametrize("lies", ["contiguous", "last", "a part"])
@pytest.mark.parametrize("odd", [None, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_watched(name: str, odd: float | None, lies: str) -> None:
    """One sample in the middle may be odd."""
    model, sizes, dtype, joined = CASES[name]
    torch.manual_seed(1)
    x = torch.randn(sizes).to(dtype)
    if odd is not None:
        x[1, 5, 1, 2, 3] = odd
    if lies == "a part":
        x = F.pad(x, (1, 0, 0, 1)).contiguous(memory_format=torch.channels_last_3d)[..., :-1, 1:]
    got, expected, made = run_prepared(model().eval(), x, last=lies == "last")
    assert made.convolution is not None
    assert made.convolution.made.watched and made.convolution.made.layer.joined == joined
    assert made.convolution.layout == "channels_last" or lies != "last" or name == "statistics"
    assert_near(got, expected, LIMIT[dtype])
    assert expected.isfinite().all() == (odd is None)


def test_one_that_does_not_look_is_wrong() -> None:
    text = "if (most >= kInfinity) atomicOr(&state.marks[n], kMarked);"
    with device.broken("prepare.cuh", text, ""), pytest.raises(AssertionError):
        test_watched("groups", math.inf, "contiguous")


@pytest.mark.parametrize("text", ["look_at(block, x, state, g)", "stride_h + (line - h * g.width) * g.stride_w"])
def test_rows_that_lie_in_x_are_looked_at(text: str) -> None:
    instead = {"look_at(block, x, state, g)": "(void)0"}.get(text, "stride_w")
    with device.broken("prepare.cuh", text, instead), pytest.raises(AssertionError):
        test_watched("classes of different taps", math.inf, "a part")


def test_marks_of_earlier_calls_do_not_count() -> None:
    """The direct kernel would make such samples; its sums are rounded otherwise."""

    def made() -> Tensor:
        torch.manual_seed(1)
        return run_prepared(layer(16, 32, 3, F16, **TWO).eval(), torch.randn(3, 16, 3, 4, 9).to(F16))[0]

    usual = made()
    with device.broken("prepare.cuh", "state.marks[n] = 0;", "state.marks[n] = kMarked;"):
        marked = made()
    assert not torch.equal(usual, marked)
