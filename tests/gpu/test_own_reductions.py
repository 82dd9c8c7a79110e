"""A value and its own reductions in one kernel, on a GPU or an emulated one, against float64 and eager mode."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from along import rows_apart, rows_together, ways_run
from persistents import FUNCTIONS
from place import CUDA, kernels_always, needs
from stages import Stages, check, made, sample

from fxfuse.kernels.convolution.specialisation import Along

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

names = pytest.mark.parametrize("name", FUNCTIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CHANNELS = (13, 32, 64, 130, 256) if CUDA else (13,)


@names
@dtypes
@pytest.mark.parametrize("channels", CHANNELS)
def test_over_channels(name: str, dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(1)
    function = FUNCTIONS[name][0]
    model = Stages(made(3, 8, channels, 3, dtype=dtype, stride=2, padding=1), lambda y: function(y, 1), torch.tanh)
    x = sample(2, 8, 4, 5, 9, dtype=dtype)
    with kernels_always():
        check(model, x)
        check(model, x.contiguous(memory_format=torch.channels_last_3d))


@names
@dtypes
def test_behind_a_pool(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    function = FUNCTIONS[name][0]
    pooled = Stages(made(3, 8, 24, 4, dtype=dtype, stride=2), torch.nn.MaxPool3d(2), F.silu)
    with kernels_always():
        check(Stages(pooled, lambda y: function(y, 1)), sample(2, 8, 4, 5, 9, dtype=dtype))


@names
@dtypes
@pytest.mark.parametrize("way", [None, *Along], ids=lambda way: way.name.lower() if way else "apart")
def test_along_w(name: str, dtype: torch.dtype, way: Along | None) -> None:
    torch.manual_seed(3)
    function = FUNCTIONS[name][0]
    model = Stages(made(3, 8, 40, 3, dtype=dtype, stride=2), lambda y: function(y, -1))
    keeps = function(torch.rand(2, 3), 1).shape == (2, 3)
    with kernels_always(), rows_apart() if way is None else rows_together(way):
        check(model, sample(2, 8, 3, 5, 16, dtype=dtype))
        assert ways_run() == [way if keeps else None]


@names
@dtypes
def test_over_a_dim_between_others(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    function = FUNCTIONS[name][0]
    with kernels_always():
        check(Stages(made(3, 8, 16, 2, dtype=dtype), lambda y: function(y, 2)), sample(2, 8, 5, 6, 7, dtype=dtype))


def test_inf_and_nan() -> None:
    torch.manual_seed(5)
    x = sample(3, 8, 4, 5, 8)
    x[0, 2, 1, 3, 5], x[2, 1, 2, 4, 0] = float("nan"), float("inf")
    with kernels_always(), contextlib.ExitStack():
        for name in ("gate", "entropy", "by hand"):
            function = FUNCTIONS[name][0]
            check(Stages(made(3, 8, 24, 2, stride=2), lambda y, f=function: f(y, 1)), x)
