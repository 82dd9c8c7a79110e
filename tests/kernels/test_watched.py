"""16-bit x that is looked at, as it is made rows or where it lies: where kernels are for values that are finite."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from fxfuse.kernels.convolution import kernels as convolution_kernels
from fxfuse.kernels.convolution import tiling
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Shared, Specialisation

CLAMP_DIVIDE = Layer(64, 128, 1, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
GROUPS = Layer(8, 8, 4, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))


def watched(layer: Layer, samples: int, *, in_place: bool = False) -> Specialisation:
    half, extents = torch.float16, (63, 127, 127)
    return Convolution.of(layer, half, half, half, Epilogue(), extents=extents, samples=samples, in_place=in_place).made


@pytest.mark.parametrize("layer", [CLAMP_DIVIDE, GROUPS], ids=["classes", "groups"])
def test_x_is_looked_at_where_zeros_save_time(layer: Layer) -> None:
    made = watched(layer, 8)
    with mock.patch.object(convolution_kernels, "WATCHING", 1.0):
        Convolution.of.cache_clear()
        usual = watched(layer, 8)
    Convolution.of.cache_clear()
    assert made.watched and not usual.watched
    assert made.pass_cycles * made.layer.groups < 0.75 * usual.pass_cycles * usual.layer.groups
    assert made.layer.joined == (2 if layer is GROUPS else 1)
    assert not watched(layer, 0).watched  # nothing is known of its time


def test_a_look_at_rows_that_lie_in_x_takes_time() -> None:
    """Where a group's channels are fewer than a row holds, rows are made all the same."""
    with mock.patch.object(tiling, "LOOKING", 1e9):
        Convolution.of.cache_clear()
        assert not watched(CLAMP_DIVIDE, 8, in_place=True).watched
        assert watched(dataclasses.replace(GROUPS, in_channels=6, groups=3), 8, in_place=True).watched
    Convolution.of.cache_clear()
    assert watched(CLAMP_DIVIDE, 8, in_place=True).watched


def test_x_is_not_looked_at_for_nothing() -> None:
    same = Layer(64, 64, 1, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    assert not watched(same, 8).watched  # one class: there are no zeros
    with mock.patch("fxfuse.kernels.convolution.kernels.WATCHING", 1.0):
        assert not watched(dataclasses.replace(CLAMP_DIVIDE, out_channels=120), 8).watched  # not kept


def test_runs_share_no_rows_that_only_one_of_them_looked_at() -> None:
    made = watched(CLAMP_DIVIDE, 8)
    assert made.shared(made) is Shared.ALL
    assert made.shared(dataclasses.replace(made, watched=False)) is Shared.NOTHING
