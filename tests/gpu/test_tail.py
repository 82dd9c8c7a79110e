"""What runs behind a convolution on a GPU, or an emulated one, against float64 and eager mode."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import CUDA, DEVICE, kernels_always, needs, needs_gpu
from stages import LAST, NORMS, Stages, check, made, sample, spread
from torch import Tensor, nn

import fxfuse
from fxfuse.compare import relative_error

pytest.importorskip("cuda.bindings")
pytestmark = needs((8, 0))


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always():
        yield


@pytest.mark.parametrize("by_torch", [False, True], ids=["kernel", "by_torch"])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str, dtype: torch.dtype, layout: str, by_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_torch:
        monkeypatch.setattr("fxfuse.kernels.execute.slower", lambda *_: "the test says so")
    torch.manual_seed(1)
    for channels, stride, size in ((24, 1, (9, 8, 11)), (70, 2, (5, 7, 6))):
        convolution = made(3, 16, channels, 3, stride=stride, dtype=dtype)
        model = spread(Stages(convolution, F.relu, NORMS[norm](channels, 3).to(DEVICE).to(dtype), F.hardswish))
        x = sample(3, 16, *size, dtype=dtype)
        if layout == "last":
            x, model = x.contiguous(memory_format=LAST[5]), model.to(memory_format=LAST[5])
        words = ["one pass over"] if by_torch else ["statistics", "gathered on the way"]
        if by_torch and layout == "last" and norm != "batch":
            words = ["_norm"] if CUDA else []  # torch's own gives contiguous values there
        check(model.train(), x, *words)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fewer_dims(dims: int) -> None:
    for norm in NORMS.values():
        check(
            spread(Stages(made(dims, 8, 12, 3), norm(12, dims).to(DEVICE))).train(), sample(3, 8, *(9, 10, 11)[:dims])
        )


def test_statistics_behind_a_pool() -> None:
    model = Stages(made(3, 16, 24, 3, stride=2, padding=1), lambda y: F.avg_pool3d(y, 2), nn.BatchNorm3d(24).to(DEVICE))
    check(spread(model).train(), sample(4, 16, 9, 9, 9), "gathered on the way")


def test_only_statistics_are_kept() -> None:
    model = Stages(made(3, 16, 24, 5), lambda y: y * 2, nn.BatchNorm3d(24).to(DEVICE), nn.AdaptiveAvgPool3d(1))
    x = sample(4, 16, 6, 7, 8)
    check(spread(model).train(), x, "-> statistics;")
    model = Stages(made(3, 16, 24, 3, stride=2), F.silu, lambda y: y.mean((2, 3, 4)))
    check(model, x, "-> statistics;")


@pytest.mark.parametrize("mean", [0.0, 100.0, -1000.0])
def test_a_mean_far_from_zero(mean: float) -> None:
    """In standard deviations, in the ieee class: no worse than twice eager mode's own error."""
    torch.manual_seed(0)
    convolution = made(3, 16, 24, 3, stride=2)
    model = Stages(convolution, lambda y: y + mean, nn.InstanceNorm3d(24).to(DEVICE))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = sample(2, 16, 12, 12, 12)
        exact = copy.deepcopy(model).double()(x.double())
        with torch.no_grad():
            got, like = fxfuse.optimize(copy.deepcopy(model), (x,))(x), model(x)
        assert relative_error(got, exact) <= max(2 * relative_error(like, exact), 1e-6)


def test_the_same_bits_twice() -> None:
    model = spread(
        Stages(made(3, 16, 24, 3), F.silu, nn.GroupNorm(4, 24).to(DEVICE), lambda y: F.avg_pool3d(y, 3, 2, 1))
    )
    x = sample(3, 16, 17, 18, 19)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        assert torch.equal(fast(x), fast(x))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_samples_that_do_not_fit(value: float) -> None:
    """Those of a sample that the direct kernel computes are its own, and no other sample's."""
    x = sample(3, 16, 7, 8, 9)
    x[1, 3, 2, 5, 4] = value
    model = spread(Stages(made(3, 16, 24, 3, stride=2), F.softsign, nn.InstanceNorm3d(24, affine=True).to(DEVICE)))
    check(model, x)
    check(Stages(made(3, 16, 24, 3, stride=2), F.softsign, lambda y: y.mean((2, 3, 4))), x, "-> statistics;")


# --- reductions over channels ---------------------------------------------------------------------
FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(1),
    "mean": lambda y: y.mean(1, keepdim=True),
    "amax": lambda y: y.amax(1, keepdim=True),
    "min": lambda y: y.min(1, keepdim=True).values,
    "logsumexp": lambda y: y.logsumexp(1, keepdim=True),
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(1),
    "prod": lambda y: y.prod(1),
    "var": lambda y: y.var(1),
    "std": lambda y: y.std(1, keepdim=True, correction=0),
    "vector_norm": lambda y: y.norm(dim=1),
    "normalise": lambda y: F.layer_norm(y.permute(0, 2, 3, 4, 1), y.shape[1:2]).permute(0, 4, 1, 2, 3),
}


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
def test_reductions_over_channels(fold: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(3)
    for channels in (1, 3, 20, 70, 200):
        model = Stages(made(3, 8, channels, 3, stride=2, dtype=dtype), lambda y: y + 0.5, FOLDS[fold], torch.sigmoid)
        x = sample(2, 8, 5, 6, 7, dtype=dtype)
        if layout == "last":
            x, model = x.contiguous(memory_format=LAST[5]), model.to(memory_format=LAST[5])
        check(model, x)


def test_reductions_of_values_that_are_not_finite() -> None:
    x = sample(2, 8, 5, 6, 7)
    x[0, 3, 2, 5, 4], x[1, 1, 1, 1, 1], x[1, 2, 3, 4, 5] = float("nan"), float("-inf"), float("inf")
    for fold in FOLDS.values():
        check(Stages(made(3, 8, 12, 1), fold), x)


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fold", FOLDS)
def test_reductions_in_the_convolutions_kernel(fold: str, dtype: torch.dtype, layout: str) -> None:
    """Of every width of its instructions, with stride 1 and 2."""
    torch.manual_seed(5)
    for channels, stride in ((1, 2), (3, 1), (20, 2), (64, 2), (70, 2), (128, 1), (250, 1)):
        model = Stages(made(3, 16, channels, 3, stride=stride, dtype=dtype), F.silu, FOLDS[fold], torch.sigmoid)
        x = sample(2, 16, 5, 7, 9, dtype=dtype)
        if layout == "last":
            x, model = x.contiguous(memory_format=LAST[5]), model.to(memory_format=LAST[5])
        wide = fold == "normalise" and dtype is not torch.float32
        one = f"one kernel: conv_transpose > silu > {'cast > normalise > cast' if wide else fold} > sigmoid -> "
        check(model, x, *([] if channels == 1 and fold in ("var", "vector_norm") else [one]))


@needs_gpu
@pytest.mark.parametrize("fold", FOLDS)
def test_reductions_in_float32s_own_accuracy(fold: str) -> None:
    torch.manual_seed(6)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for channels in (5, 64, 128):
            model = Stages(made(3, 16, channels, 3), torch.tanh, FOLDS[fold])
            x = sample(2, 16, 5, 7, 9)
            exact = copy.deepcopy(model).double()(x.double())
            with torch.no_grad():
                got, like = fxfuse.optimize(copy.deepcopy(model), (x,))(x), model(x)
            assert relative_error(got, exact) <= max(2 * relative_error(like, exact), 5e-7)


@needs_gpu
def test_reductions_behind_a_pool_of_the_convolutions() -> None:
    torch.manual_seed(7)
    for fold in FOLDS:
        pool = functools.partial(F.max_pool3d, kernel_size=2)
        model = Stages(made(3, 16, 40, 3, stride=2), F.gelu, pool, torch.cos, FOLDS[fold], F.silu)
        x = sample(3, 16, 5, 7, 9)
        check(model, x, f"one kernel: conv_transpose > gelu > max_pool 2x2x2 > cos > {fold} > silu -> ")
        x[1, 3, 2, 5, 4] = float("nan")
        check(model, x)


# --- pools and chains -----------------------------------------------------------------------------
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: F.max_pool3d(y, 3),
    "max_overlapping": lambda y: F.max_pool3d(y, 3, 2, 1),
    "max_dilated": lambda y: F.max_pool3d(y, (2, 3, 2), (1, 2, 1), (0, 1, 1), (2, 2, 1)),
    "max_ceil": lambda y: F.max_pool3d(y, 3, 2, ceil_mode=True),
    "avg": lambda y: F.avg_pool3d(y, 2),
    "avg_padded": lambda y: F.avg_pool3d(y, 3, 2, 1),
    "avg_ceil": lambda y: F.avg_pool3d(y, 3, 2, 1, ceil_mode=True),
    "avg_what_is_there": lambda y: F.avg_pool3d(y, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_divisor": lambda y: F.avg_pool3d(y, 3, 2, 1, divisor_override=5),
    "adaptive_avg": lambda y: F.adaptive_avg_pool3d(y, (3, 4, 5)),
    "adaptive_max": lambda y: F.adaptive_max_pool3d(y, (4, 3, 7)),
}


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_pools(pool: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(2)
    for stages in ((POOLS[pool], F.silu), (F.hardswish, lambda y: y.sigmoid(), POOLS[pool])):
        model, x = Stages(made(3, 8, 20, 3, dtype=dtype), *stages), sample(2, 8, 9, 10, 11, dtype=dtype)
        if layout == "last":
            x, model = x.contiguous(memory_format=LAST[5]), model.to(memory_format=LAST[5])
        check(model, x, "then one kernel: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fold", ["sum", "mean", "amax", "min"])
def test_reductions_behind_a_pool_by_itself(fold: str, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    for channels, pool in ((5, POOLS["max"]), (33, POOLS["avg"]), (70, POOLS["max_overlapping"])):
        model = Stages(made(3, 8, channels, 1, dtype=dtype), pool, torch.sigmoid, FOLDS[fold])
        check(model, sample(3, 8, 9, 10, 11, dtype=dtype), f" > sigmoid > {fold} -> ")


def test_a_pool_of_values_that_are_not_finite() -> None:
    x = sample(2, 8, 9, 10, 11)
    x[0, 3, 2, 5, 4], x[1, 1, 1, 1, 1] = float("nan"), float("-inf")
    for pool in POOLS.values():
        check(Stages(made(3, 8, 20, 1), pool), x)


def test_residuals_of_what_is_normalised() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = made(3, 8, 12, 3), nn.GroupNorm(3, 12).to(DEVICE)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.convolution(x))
            return F.gelu(self.norm(y)) + y * y.mean((2, 3, 4), keepdim=True)

    check(spread(Residual()), sample(2, 8, 6, 7, 8), "statistics")
