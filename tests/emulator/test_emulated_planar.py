"""Kernels that read x as it lies: what they wait for, mark and round, left out, shows. tests/gpu has values of all."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, needs_compiler
from test_emulated_folds import F32, LIMIT, Then, assert_near, layer, run_prepared

from fxfuse.compare import relative_error
from fxfuse.kernels.convolution import planar

pytestmark = needs_compiler

#: how: a wrong value, or what never comes
SHOWN = (AssertionError, EmulationError)
#: what stands in conv_planar.cuh, and what instead of it
BROKEN = {
    "x is not waited for": (
        "barrier_wait(&barriers.copied[xs.slot], xs.phase);\n#pragma unroll 1", "\n#pragma unroll 1",
    ),
    "nor by who looks at it": ("barrier_wait(&barriers.copied[xs.slot], xs.phase);\n    bool", "bool"),
    "x is overwritten": ("barrier_wait(&barriers.empty[xs.slot], xs.phase ^ 1);", ""),
    "one warpgroup reads it still": (
        "barrier_init(&empty[i], kConsumers + 1);", "barrier_init(&empty[i], kConsumers);",
    ),
    "copies begin anywhere": (" - ahead_of_planes<Problem, T>(g, t);", ";"),
    "no sample is marked": ("if (marked) marks[tile_at<Problem>(g, index).n] = kMarked;", ""),
    "numbers are cut off": ("return __float_as_uint(v) + 0x1000u;", "return __float_as_uint(v);"),
    "every position is read": ("w * Problem::step_w;\n  };", "w;\n  };"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planar, "WORTH_IT", 0.0)


def check(seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = Then(layer(3, 16, 4, stride=2, padding=1), lambda y: F.avg_pool3d(y, 4))
    x = torch.randn(24, 3, 6, 9, 20)
    x[1, 0, 1, 2, 3] = math.inf
    got, expected, made = run_prepared(model.eval(), x)
    assert made.convolution is not None and made.convolution.made.step == (2, 2, 2)
    assert_near(got, expected, LIMIT[F32])
    assert relative_error(got[2:], expected[2:]) < 2e-4


def test_values() -> None:
    check()


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    def often() -> None:
        for seed in range(4):
            check(seed)

    with device.broken("conv_planar.cuh", *BROKEN[why]), pytest.raises(SHOWN):
        often()
