"""Pooling over the spatial dims (all dims after the channels), one to three of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.op import Kind, define

_MAX: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVG: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_ADAPTIVE_MAX: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


@define(Kind.POOL)
def max_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> Tensor:
    """Maximum of each window; padding never wins; NaN wins. x: (N, C, *spatial) or (C, *spatial).

    A padding of more than half the kernel, which torch refuses, is allowed: composed pools have it.
    """
    pool = _MAX[len(kernel)]
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        amounts = [side for p in reversed(padding) for side in (p, p)]
        x, padding = F.pad(x, amounts, value=float("-inf")), (0,) * len(kernel)
    return pool(x, kernel, stride, padding, dilation, ceil_mode)


@define(Kind.POOL)
def avg_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Mean of each window. x: (N, C, *spatial) or (C, *spatial)."""
    pool = _AVG[len(kernel)]
    if len(kernel) == 1:
        return pool(x, kernel, stride, padding, ceil_mode, count_include_pad)
    return pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


@define(Kind.POOL)
def adaptive_avg_pool(x: Tensor, *, size: tuple[int | None, ...]) -> Tensor:
    """Mean over windows that split each spatial dim into ``size`` parts; None keeps a dim."""
    return _ADAPTIVE_AVG[len(size)](x, size)


@define(Kind.POOL)
def adaptive_max_pool(x: Tensor, *, size: tuple[int | None, ...]) -> Tensor:
    """Maximum over windows that split each spatial dim into ``size`` parts; None keeps a dim."""
    return _ADAPTIVE_MAX[len(size)](x, size)


def output_size(length: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows of a pool along one dim (torch.nn.MaxPool3d's formula, its rule for ceil_mode included)."""
    span = length + 2 * padding - dilation * (kernel - 1) - 1
    size = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (size - 1) * stride >= length + padding:  # the last window must start inside
        size -= 1
    return size
