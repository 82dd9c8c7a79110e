"""The convolution run twice, on a GPU or an emulated one: values, statistics and their order, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs
from stages import LAST, NORMS, Stages, check, made, near, sample, steps_run, trained
from torch import Tensor, nn

import fxfuse

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

AGAIN = "then the convolution again: conv_transpose"


@pytest.fixture(autouse=True)
def always_twice() -> Iterator[None]:
    """Two runs of the convolution are worth it, whatever the estimate says."""
    with kernels_always(twice=True):
        yield


def block(norm: str, channels: int, *behind: Callable[[Tensor], Tensor], dtype: torch.dtype, **layer: int) -> Stages:
    """A convolution, something pointwise, a norm, and what is behind it; to be trained."""
    return trained(made(3, 8, channels, 3, dtype=dtype, **layer), F.silu, norm, *behind)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(1)
    for channels, stride, size in ((20, 1, (4, 5, 7)), (12, 2, (3, 5, 4))):
        model, x = block(norm, channels, F.hardswish, dtype=dtype, stride=stride), sample(3, 8, *size, dtype=dtype)
        if layout == "last":
            x, model = x.contiguous(memory_format=LAST[5]), model.to(memory_format=LAST[5])
        check(model, x, f"{AGAIN} > silu > sub > mul", "hardswish -> ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (lambda y: F.max_pool3d(y, 2), " > max_pool 2x2x2 -> "),
        (lambda y: F.max_pool3d(F.hardswish(y), 4), "hardswish > max_pool 2x2x2 -> "),
        (lambda y: F.avg_pool3d(y, 2) * 0.5, "avg_pool 2x2x2"),
        (lambda y: F.avg_pool3d(F.avg_pool3d(y, 2), 2), "avg_pool 2x2x2"),
    ],
    ids=["max", "hardswish_max", "mean", "means"],
)
def test_pools_of_what_is_normalised(
    norm: str, pool: Callable[[Tensor], Tensor], words: str, dtype: torch.dtype
) -> None:
    check(block(norm, 12, pool, dtype=dtype, stride=2, padding=1), sample(2, 8, 4, 5, 6, dtype=dtype), AGAIN, words)


def test_a_mean_of_normalised_values_is_pooled_first() -> None:
    """The second run does nothing but pool; arithmetic of a normalisation follows, once per window."""
    model = block("batch", 12, lambda y: F.avg_pool3d(y, 2), dtype=torch.float32, stride=2, padding=1)
    check(model, sample(2, 8, 4, 5, 6), f"{AGAIN} > silu > avg_pool 2x2x2 > sub > mul > mul > add -> ")


def test_two_norms() -> None:
    """The second run gathers statistics for the next one."""
    model = trained(made(3, 8, 12, 3), "instance", F.relu, "group")
    check(model, sample(2, 8, 4, 5, 6), f"{AGAIN} > sub > mul > mul > add > relu -> f32[2, 12, 6, 7, 8] and statistics")


def test_a_mean_far_from_zero() -> None:
    """A mean of 100 standard deviations, in the accuracy of float32."""
    convolution = made(3, 8, 12, 3)
    with torch.no_grad():
        assert convolution.bias is not None
        convolution.bias.add_(100 * convolution(sample(2, 8, 6, 7, 9)).std())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(trained(convolution, "group"), sample(2, 8, 6, 7, 9), AGAIN)


def test_samples_that_half_precision_cannot_hold() -> None:
    """Both runs make them in float32."""
    x = sample(3, 8, 4, 5, 6)
    x[1, 0, 0, 0, 0], x[2] = 1e30, x[2] * 1e-30
    model = block("instance", 12, dtype=torch.float32)
    near(model, fxfuse.optimize(copy.deepcopy(model), (x,)), x)
    assert AGAIN in steps_run()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_once(momentum: float | None) -> None:
    norm = nn.BatchNorm3d(12, momentum=momentum).to(DEVICE)
    model = Stages(made(3, 8, 12, 3, stride=2), norm, nn.MaxPool3d(2)).train()
    x, eager = sample(2, 8, 4, 5, 6), copy.deepcopy(model)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        for _ in range(3):
            fast(x), eager(x)
    assert AGAIN in steps_run()
    for (name, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    assert int(norm.num_batches_tracked) == 3


def test_gradients_are_those_of_the_chain() -> None:
    model, x = block("group", 12, F.hardswish, dtype=torch.float32), sample(2, 8, 4, 5, 6)
    eager, fast = copy.deepcopy(model), fxfuse.optimize(model, (x,))
    fast(x).square().sum().backward()
    eager(x).square().sum().backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)


def test_the_same_bits_again() -> None:
    for norm in NORMS:
        model, x = block(norm, 12, F.hardswish, dtype=torch.float32, stride=2), sample(2, 8, 4, 5, 6)
        fast = fxfuse.optimize(model, (x,))
        with torch.no_grad():
            first = fast(x)
            assert all(torch.equal(fast(x), first) for _ in range(2))
        assert AGAIN in steps_run()
