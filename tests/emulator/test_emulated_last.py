"""Results and inputs whose channels are neighbours: the order of columns, and rows of what has one channel."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F16, F32, FOLDS, LIMIT, Then, assert_near, layer, run_prepared
from torch import nn

from fxfuse.kernels.convolution import planar
from fxfuse.models import CASES

pytestmark = needs_compiler


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("channels", [36, 40, 7])
def test_a_norm_of_channels_that_fill_no_tile(channels: int, dtype: torch.dtype) -> None:
    """Columns that are no channels lie among those of a thread that are."""
    torch.manual_seed(0)
    model = Then(layer(8, channels, 2, dtype, stride=2), FOLDS["normalise"]).eval()
    got, expected, made = run_prepared(model, torch.randn(2, 8, 3, 4, 5).to(dtype), last=True)
    assert made.convolution is not None and made.convolution.layout == "channels_last"
    assert made.schedule.kernel is not None and made.schedule.kernel.fold is not None
    assert made.convolution.made.columns > channels or channels == 40
    assert_near(got, expected, LIMIT[dtype])


def test_channels_that_are_rows_are_in_their_own_order() -> None:
    """Statistics alone, of a result that would be channels_last."""
    torch.manual_seed(0)
    case = next(c for c in CASES if c.name == "scale_norm_pool")
    got, expected, made = run_prepared(case.make().train(), torch.randn(case.small), last=True)
    assert made.convolution is not None and made.convolution.made.by_channel
    assert_near(got, expected, LIMIT[F32])


def test_many_positions_of_one_channel() -> None:
    """They are neighbours as well, and are read as such."""
    torch.manual_seed(0)
    with mock.patch.object(planar, "MOST_CHANNELS", 0):  # or they are planes
        x = torch.randn(2, 8, 16, 32, 1).to(F16).permute(0, 4, 1, 2, 3)
        got, expected, made = run_prepared(layer(1, 8, 3, F16, padding=1).eval(), x, last=True)
    assert made.convolution is not None and not made.convolution.made.planar
    assert_near(got, expected, LIMIT[F16])


def test_what_lies_where() -> None:
    """Each thread's channels of a tile follow each other, as far as they are stored at once."""
    model = nn.Sequential(layer(8, 56, 2, F16, stride=2))
    got, expected, made = run_prepared(model.eval(), torch.randn(2, 8, 3, 4, 5).to(F16), last=True)
    assert made.convolution is not None and made.convolution.made.neighbours == 8
    assert_near(got, expected, LIMIT[F16])
