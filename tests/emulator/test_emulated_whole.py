"""Tiles that lie in the output whole, whose elements are not looked at one by one, beside others that do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, needs_compiler
from test_emulated_folds import F32, LIMIT, Then, assert_near, layer, run_prepared
from torch import Tensor

from fxfuse.kernels.convolution.specialisation import Specialisation
from fxfuse.kernels.convolution.tiles import Extents, Tiling, tilings

pytestmark = needs_compiler

#: what is behind a convolution of 16 to 32 channels
CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "stored": F.leaky_relu,
    "pooled": lambda y: F.max_pool3d(y, 2),
    "reduced": lambda y: y.softmax(1),
    "statistics": lambda y: F.group_norm(y, 4),
}
#: positions of a tile, and sizes that it divides, or all but one
TILE = (4, 8, 8)
SIZES = ((8, 8, 8), (5, 8, 8), (4, 9, 8), (4, 8, 13))


def of_whole_rows(made: Specialisation, extents: Extents, *_: object) -> Tiling:
    """The tiling of that size all of whose rows are positions."""
    every = [t for t in tilings(made, extents, linear=False) if math.prod(t.tile) == len(t.row_base) * 64]
    return next((t for t in every if t.tile == TILE), every[0])


def check(chain: str, sizes: Extents, *, odd: bool) -> None:
    """``odd``: sizes of the output, of which the last positions have not all classes."""
    torch.manual_seed(1)
    model = Then(layer(16, 32, 3, stride=2, padding=1, output_padding=0 if odd else 1), CHAINS[chain]).eval()
    with mock.patch("fxfuse.kernels.convolution.kernels.tile", of_whole_rows):
        got, expected, _ = run_prepared(model, torch.randn(2, 16, *sizes))
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_whole_tiles_and_others(chain: str, sizes: Extents) -> None:
    check(chain, sizes, odd=False)
    check(chain, sizes, odd=True)


@pytest.mark.parametrize("dim", range(3))
def test_every_dim_is_looked_at(dim: int) -> None:
    name = "dhw"[dim]
    text = f"(box.{name} + g.box_{name}) * o.step_{name} <= o.size_{name}"
    with device.broken("conv_store.cuh", text, "true"), pytest.raises((AssertionError, EmulationError)):
        check("pooled", SIZES[dim + 1], odd=False)


def test_rows_of_no_position() -> None:
    """In a tile as the estimate chooses it some are; what they would store lies anywhere."""
    torch.manual_seed(1)
    model = Then(layer(16, 32, 3, stride=2, padding=1, output_padding=1), CHAINS["pooled"]).eval()
    got, expected, _ = run_prepared(model, torch.randn(1, 16, 8, 17, 16))
    assert_near(got, expected, LIMIT[F32])
