"""Reductions over the last dims behind a convolution, on a GPU or an emulated one, against float64 and eager mode.

By kernels of their own: those along w that the convolution's epilogue makes are in test_along.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from along import rows_apart
from place import DEVICE, kernels_always, needs
from stages import Stages, check, made, sample, spread, steps_run
from torch import Tensor, nn

from fxfuse.kernels.codegen import reductions

pytest.importorskip("cuda.bindings")
pytestmark = needs((8, 0))


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always(), rows_apart():
        yield


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax over w": lambda y: y.softmax(-1),
    "log_softmax over space": lambda y: y.flatten(2).log_softmax(-1).reshape(y.shape),
    "softmax over all but samples": lambda y: y.flatten(1).softmax(1).view(y.shape) * 100,
    "logsumexp over h and w": lambda y: y.logsumexp((3, 4)),
    "amax over space": lambda y: y.amax((2, 3, 4), keepdim=True) * y,
    "softmax over d": lambda y: y.softmax(2),
    "log_softmax over h": lambda y: y.log_softmax(3) * 2,
    "amax over d": lambda y: y.amax(2),
    "min over h": lambda y: y.min(3, keepdim=True).values,
    "logsumexp over d and h": lambda y: y.logsumexp((2, 3)),
    "std over d": lambda y: y.std(2),
    "sum over c and d": lambda y: y.sum((1, 2), keepdim=True),
    "amin over w": lambda y: y.amin(4),
    "min over w": lambda y: y.min(4, keepdim=True).values,
    "sum over h and w": lambda y: y.sum((3, 4), keepdim=True).tanh(),
    "mean over w": lambda y: y.mean(-1),
    "var over w": lambda y: y.var(-1),
    "std over h and w": lambda y: y.std((3, 4), correction=0),
    "length over space": lambda y: torch.linalg.vector_norm(y, dim=(2, 3, 4)),
    "length over h and w": lambda y: torch.linalg.vector_norm(y, dim=(3, 4)),
    "prod over w": lambda y: (y + 1).prod(-1),
    "amax over all but samples": lambda y: y.amax((1, 2, 3, 4)),
}


@pytest.mark.parametrize("size", [(3, 4, 5), (9, 10, 12), (2, 3, 1030)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    torch.manual_seed(5)
    model = Stages(made(3, 8, 70, (3, 3, 1), dtype=dtype), torch.tanh, REDUCTIONS[reduction], torch.sigmoid)
    x = sample(2, 8, *size, dtype=dtype)
    few = "all but samples" in reduction and 70 * (size[0] + 2) * (size[1] + 2) * size[2] >= 1024
    check(model, x, *([] if few or reduction == "length over space" else ["then one kernel: "]))


NORMS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "layer_norm over w": lambda size: nn.LayerNorm(size[-1:], 1e-3),
    "layer_norm over h and w": lambda size: nn.LayerNorm(size[-2:], bias=False),
    "layer_norm over space": lambda size: nn.LayerNorm(size[-3:]),
    "bare layer_norm over w": lambda size: nn.LayerNorm(size[-1:], elementwise_affine=False),
    "rms_norm over w": lambda size: nn.RMSNorm(size[-1:], 1e-4),
    "rms_norm over h and w": lambda size: nn.RMSNorm(size[-2:], 1e-4, elementwise_affine=False),
    "rms_norm over space": lambda size: nn.RMSNorm(size[-3:], 1e-4),
    "rms_norm over all but samples": lambda size: nn.RMSNorm(size, 1e-4),
}


@pytest.mark.parametrize("size", [(3, 4, 5), (9, 10, 12), (2, 3, 1030)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """And pointwise in front and behind; a shift of the value that a variance must not lose."""
    torch.manual_seed(6)
    d, h, w = size
    last = NORMS[norm]((70, d + 2, h + 2, w)).to(DEVICE).to(dtype)
    model = spread(Stages(made(3, 8, 70, (3, 3, 1), dtype=dtype), lambda y: y + 3, last, torch.sigmoid))
    rows = "over w" in norm or "h and w" in norm or (norm == "rms_norm over space" and size[2] < 100)
    step = "normalise" if rows else "statistics" if "layer" in norm else "rms_norm"
    check(model, sample(2, 8, *size, dtype=dtype), step)


POOLED: dict[str, tuple[tuple[int, int, int], Callable[[int], nn.Module], Callable[[Tensor], Tensor]]] = {
    "a mean of a norm": ((5, 6, 16), lambda w: nn.LayerNorm(w), lambda y: F.avg_pool3d(y, 2)),
    "a rest in every dim": ((5, 6, 17), lambda w: nn.LayerNorm(w), lambda y: F.avg_pool3d(y, (3, 2, 4))),
    "a maximum": ((4, 5, 6), lambda w: nn.RMSNorm(w, 1e-4), lambda y: F.max_pool3d(y, 2)),
    "windows that overlap": ((5, 5, 9), lambda w: nn.LayerNorm(w), lambda y: F.max_pool3d(y, (1, 2, 3), (1, 1, 2))),
    "dilation": ((5, 6, 40), lambda w: nn.LayerNorm(w), lambda y: F.max_pool3d(y, 2, 2, 0, (2, 1, 3))),
    "a softmax": ((4, 4, 70), lambda _: nn.Softmax(-1), lambda y: F.avg_pool3d(y, (2, 2, 5), (2, 2, 3))),
    "a row of a warp and more": ((3, 4, 300), lambda w: nn.LayerNorm(w), lambda y: F.avg_pool3d(y, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", POOLED)
def test_pools_of_rows(name: str, dtype: torch.dtype) -> None:
    """One kernel; what is in front of it and behind it is its, too."""
    torch.manual_seed(8)
    size, norm, pool = POOLED[name]
    last = norm(size[2]).to(DEVICE).to(dtype)
    model = spread(Stages(made(3, 4, 9, (2, 3, 1), dtype=dtype), torch.tanh, last, pool, F.silu))
    x = sample(2, 4, size[0] - 1, size[1] - 2, size[2], dtype=dtype)
    check(model, x)
    assert steps_run().count("kernel: ") == 2 and "pool" in steps_run().split("; ")[-1], steps_run()
    x[1, 2, 1, 1, 3] = float("nan")
    check(model, x)


def test_pools_of_rows_that_two_kernels_make() -> None:
    """Padding; a window beyond the end; long rows; rows of two dims; a norm that others read; many rows again."""
    for pool in (
        lambda y: F.avg_pool3d(y, 2, padding=1), lambda y: F.max_pool3d(y, 2, ceil_mode=True),
        lambda y: F.max_pool3d(y, (3, 3, 1), 1), lambda y: (y, F.avg_pool3d(y, 2))[1] + y.sum(),
        nn.AdaptiveAvgPool3d(2),
    ):  # fmt: skip
        check(Stages(made(3, 4, 9, 1), F.relu, nn.LayerNorm(9, 0.3).to(DEVICE), pool), sample(2, 4, 5, 7, 9), "normal")
        assert not any("normalise" in s and "pool" in s for s in steps_run().split("; ")), steps_run()


@pytest.mark.parametrize("reduction", ["log_softmax over space", "amax over space", "sum over h and w"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_many_threads_go_through(reduction: str, dtype: torch.dtype) -> None:
    """There and back; the last part of a row is no whole one."""
    torch.manual_seed(7)
    model = Stages(made(3, 4, 70, (3, 3, 1), dtype=dtype), torch.tanh, REDUCTIONS[reduction], torch.sigmoid)
    with mock.patch.object(reductions, "VERY_LONG_ROW", 4096), mock.patch.object(reductions, "MOST_HELD", 4):
        check(model, sample(2, 4, 2, 3, 1030, dtype=dtype), "then one kernel: ")


def test_rows_of_values_that_are_not_finite() -> None:
    """A row of -Inf alone, rows with Inf, NaN, both."""
    x = sample(2, 8, 5, 6, 8)
    x[0, 3, 2, 5, 4], x[1, 1, 1, 1, 1], x[1, 2, 3, 4, 5] = float("nan"), float("-inf"), float("inf")

    def cut(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, y * float("inf"))

    norms = [norm((70, 5, 6, 8)).to(DEVICE) for norm in NORMS.values()]
    for reduction in (*REDUCTIONS.values(), *norms):
        check(Stages(made(3, 8, 70, 1), reduction), x)
        check(Stages(made(3, 8, 70, 1), cut, reduction), x)
