"""Pools by themselves, and reductions over channels behind them, as the emitted kernels compute them."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator.device import needs_compiler
from test_emulated_folds import BF16, F16, F32, INF, LIMIT, NAN, Then, assert_near, layer, run
from torch import Tensor

from fxfuse.kernels import execute

pytestmark = needs_compiler

Pool = Callable[[Tensor], Tensor]

#: dims, sizes of x (a kernel of 1 keeps them), channels, dtype, the pool, how the kernel names it
POOLS: dict[str, tuple[int, tuple[int, ...], int, torch.dtype, Pool, str]] = {
    "rows of an odd width": (3, (4, 7, 13), 5, F32, lambda y: F.avg_pool3d(y, 2), "avg_pool 2x2x2"),
    "a rest in every dim": (3, (8, 7, 11), 3, F32, lambda y: F.max_pool3d(y, 3), "max_pool 3x3x3"),
    "an odd number of planes, float16": (3, (5, 6, 9), 3, F16, lambda y: F.max_pool3d(y, 2), "max_pool 2x2x2"),
    "four planes, bfloat16": (2, (9, 14), 3, BF16, lambda y: F.avg_pool2d(y, 2), "avg_pool 2x2"),
    "one dim": (1, (31,), 5, F32, lambda y: F.max_pool1d(y, 2), "max_pool 2"),
    "64 elements": (3, (9, 8, 11), 3, F32, lambda y: F.avg_pool3d(y, 4), "avg_pool 4x4x4"),
    "elements beyond 128": (3, (7, 6, 13), 2, F32, lambda y: F.max_pool3d(y, (5, 6, 5)), "max_pool 5x6x5"),
    "overlap and padding": (3, (6, 7, 8), 3, F32, lambda y: F.max_pool3d(y, 3, 2, 1), "max_pool 3x3x3"),
    "a border in several planes": (2, (6, 7), 5, F16, lambda y: F.max_pool2d(y, 2, 2, 1), "max_pool 2x2"),
    "dilation": (2, (9, 11), 3, F32, lambda y: F.max_pool2d(y, (3, 2), (1, 2), 1, (2, 3)), "max_pool 3x2"),
    "windows beyond the end": (
        2, (9, 11), 3, F32, lambda y: F.avg_pool2d(y, 2, 2, ceil_mode=True, count_include_pad=False), "avg_pool 2x2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str, last: bool) -> None:
    dims, sizes, channels, dtype, pool, stage = POOLS[name]
    if last and dims == 1:
        pytest.skip("one dim has one memory format")
    torch.manual_seed(1)
    model = Then(layer(2, channels, 1, dtype, dims), lambda y, g: pool(y.relu() * g), torch.rand(*sizes[-2:])).to(dtype)
    x = torch.randn(3, 2, *sizes).to(dtype)
    got, expected, made = run(model.eval(), x, last=last, anchored=False)
    assert made.startswith("then conv_transpose; then one kernel: relu > mul ") and f"{stage} -> " in made, made
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("pool", [F.max_pool3d, F.avg_pool3d])
def test_pools_of_values_that_are_not_finite(pool: Callable[[Tensor, int], Tensor]) -> None:
    torch.manual_seed(2)
    x = torch.randn(1, 2, 5, 6, 7)
    x[0, 0, 1, 2, 3], x[0, 0, 2, 0, 0], x[0, 0, 3, 5, 5] = NAN, INF, -INF
    got, expected, _ = run(Then(layer(2, 3, 1), lambda y: pool(y, 2)).eval(), x, anchored=False)
    assert not expected.isfinite().all()
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("stage", ["avg_pool f32", "max_pool f32", "max_pool f16"])
def test_a_pool_that_leaves_outputs_out(stage: str, last: bool) -> None:
    """Behind a convolution of ours, which has not computed them, and behind one of torch, which has."""
    torch.manual_seed(4)
    stage, kind = stage.split()
    dtype, behind = {"f32": F32, "f16": F16}[kind], {"avg_pool": F.avg_pool3d, "max_pool": F.max_pool3d}[stage]
    x = torch.randn(2, 4, 5, 6, 7).to(dtype)  # 11, 13 and 15 outputs
    for anchored in (True, False):
        model = Then(layer(4, 9, 3, dtype, stride=2), lambda y: behind(y, 3)).eval()
        got, expected, made = run(model, x, last=last, anchored=anchored)
        first = f"one kernel: conv_transpose -> {kind}[2, 9, 9, 12, 15]" if anchored else "then conv_transpose"
        assert made == f"{first}; then one kernel: {stage} 3x3x3 -> {kind}[2, 9, 3, 4, 5]", made
        assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_maximum_over_space(dtype: torch.dtype, last: bool) -> None:
    """The kernel makes one value of eight, at the odd end of fewer; NaN wins, and so does what is below 0.

    Where none gathers maxima.
    """
    torch.manual_seed(5)
    x = torch.randn(2, 4, 3, 4, 5).to(dtype)
    x[1, 2, 1, 2, 3] = NAN
    model = Then(layer(4, 9, 3, dtype, stride=2), lambda y: -F.softplus(y).amax((2, 3, 4))).eval()
    with mock.patch.object(execute, "gathering", return_value=None):
        got, expected, made = run(model, x, last=last)
    kind = {F32: "f32", F16: "f16"}[dtype]
    assert made.startswith(f"one kernel: conv_transpose > softplus > max_pool 2x2x2 -> {kind}[2, 9, 4, 5, 6]; "), made
    assert_near(got, expected, LIMIT[dtype])


REDUCTIONS: dict[str, Pool] = {
    "sum": lambda y: y.sum(1),
    "mean": lambda y: y.mean(1, keepdim=True),
    "amax": lambda y: y.amax(1, keepdim=True),
    "min": lambda y: y.min(1, keepdim=True).values,
}


@pytest.mark.parametrize("channels", [1, 3, 20, 70])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduction_over_channels_behind_a_pool(reduction: str, channels: int) -> None:
    """More positions than a block takes, and a rest; windows of several planes a thread, and of one."""
    torch.manual_seed(3)
    for dims, sizes, pool, stage in (
        (3, (7, 9, 13), lambda y: F.max_pool3d(y, 3), "max_pool 3x3x3"),
        (2, (11, 14), lambda y: F.avg_pool2d(y, 2), "avg_pool 2x2"),
    ):
        model = Then(layer(2, channels, 1, F32, dims), lambda y, pool=pool: REDUCTIONS[reduction](pool(y))).eval()
        got, expected, made = run(model, torch.randn(3, 2, *sizes), anchored=False)
        assert f"then one kernel: {stage} > {reduction} -> " in made and made.count(";") == 1, made
        assert_near(got, expected, LIMIT[F32])


def test_chains_in_front_of_both_between_them_and_behind() -> None:
    torch.manual_seed(4)
    g, r, s = torch.rand(12, 1, 1, 1), torch.rand(12, 1, 1, 5), torch.rand(4, 1, 5)

    def behind(y: Tensor, g: Tensor, r: Tensor, s: Tensor) -> Tensor:
        return (F.max_pool3d(F.gelu(y * g), 2) + r).tanh().mean(1, keepdim=True) * s

    model = Then(layer(8, 12, 1, F16), behind, g, r, s).to(F16).eval()
    got, expected, made = run(model, torch.randn(2, 8, 8, 6, 10).to(F16), anchored=False)
    assert "one kernel: mul > gelu > max_pool 2x2x2 > add > tanh > mean > mul -> " in made, made
    assert_near(got, expected, LIMIT[F16])


def test_reductions_of_pools_that_are_not_finite() -> None:
    torch.manual_seed(5)
    x = torch.randn(1, 2, 5, 6, 7)
    x[0, 0, 1, 2, 3], x[0, 0, 2, 0, 0], x[0, 0, 3, 5, 5] = NAN, INF, -INF
    for fold in REDUCTIONS.values():
        model = Then(layer(2, 12, 1), lambda y, fold=fold: fold(F.max_pool3d(y, 2))).eval()
        got, expected, made = run(model, x, anchored=False)
        assert made.count("one kernel") == 1 and not expected.isfinite().all()
        assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize(
    ("behind", "kernels"),
    [
        (lambda y: F.max_pool3d(y, 2).softmax(1), 2),  # every channel once more
        (lambda y: F.max_pool3d(y, 2).sum((1, 2)), 2),
        (lambda y: (lambda m: m.sum(1, keepdim=True) + m.amax(1, keepdim=True))(F.max_pool3d(y, 2)), 2),
    ],
)  # fmt: skip
def test_reductions_that_run_by_themselves(behind: Pool, kernels: int) -> None:
    torch.manual_seed(6)
    got, expected, made = run(Then(layer(2, 12, 1), behind).eval(), torch.randn(2, 2, 4, 6, 8), anchored=False)
    assert made.count("one kernel") == kernels and "max_pool 2x2x2 -> " in made, made
    assert_near(got, expected, LIMIT[F32])
