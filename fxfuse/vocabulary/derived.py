"""Operators that rewrite rules make: arithmetic on weights, and a transposed convolution under a mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.conv import CONVOLUTIONS, leading
from fxfuse.vocabulary.op import Kind, define


@define(Kind.DERIVED)
def scale_weight(weight: Tensor, scale: Tensor | float, *, groups: int) -> Tensor:
    """Multiply a transposed convolution's weight by one factor per *output* channel.

    weight: (Cin, Cout/groups, *kernel); scale: a number, or Cout elements in any shape. Input
    channels [g*Cin/groups, (g+1)*Cin/groups) belong to output channels [g*Cout/groups, ...).
    """
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        factor = scale.reshape(()) if isinstance(scale, Tensor) else scale
        scaled: Tensor = weight * factor
        return scaled
    given, columns, *kernel = weight.shape
    each = 1 if groups == 1 else given // groups
    factors = scale.reshape(groups, 1, columns).expand(groups, each, columns)
    # of the weight's own dims: the product keeps the weight's strides, which the convolution's result follows
    return torch.mul(weight, factors.reshape(-1, columns, *(1 for _ in kernel)))


@define(Kind.DERIVED)
def to_channels(value: Tensor | float, like: Tensor, *, channels: int) -> Tensor:
    """A number or a tensor of 1 or ``channels`` elements as a (channels,) vector of ``like``'s dtype and device."""
    if not isinstance(value, Tensor):
        return like.new_full((channels,), value)
    return value.to(like).reshape(-1).expand(channels).clone()


@define(Kind.DERIVED)
def tap_sums(x: Tensor, *, dims: tuple[int, ...], boxes: tuple[tuple[tuple[int, int], ...], ...]) -> Tensor:
    """Along each of ``dims``, position a of the result is the sum of x over ``boxes[..][a]``, a half-open range.

    x: (N, C, *spatial). A dim whose ranges are all the same has size 1 in the result, which is float32 at least:
    sums of 16-bit values overflow.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    for dim, ranges in zip(dims, boxes, strict=True):
        sums = {
            (low, high): x.narrow(dim, low, high - low).sum(dim, keepdim=True, dtype=wide)
            for low, high in dict.fromkeys(ranges)
        }
        x = next(iter(sums.values())) if len(sums) == 1 else torch.cat([sums[r] for r in ranges], dim)
    return x


@define(Kind.DERIVED)
def contract_taps(
    sums: Tensor,
    weight: Tensor,
    *,
    dims: tuple[int, ...],
    taps: tuple[tuple[int, ...], ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``z[n, o] = sum over c and taps of sums[n, c, tap] * weight[c, o, tap]`` along ``dims``, which get size 1.

    ``taps``: per dim of ``dims`` the taps of ``weight`` that take part, in order. They are summed one
    by one, never their weights first: an Inf meets every weight, as in the convolution. Along the
    other spatial dims it is a transposed convolution, whose geometry the other attributes give. The
    result has the dtype of ``sums``.
    """
    weight = weight.to(sums.dtype)
    for dim, kept in zip(dims, taps, strict=True):
        if len(kept) < weight.shape[dim]:
            weight = torch.cat([weight.narrow(dim, tap, 1) for tap in kept], dim)
    n, first = sums.shape[0], range(2, 2 + len(dims))
    sums = sums.expand(*(weight.shape[d] if d in dims else size for d, size in enumerate(sums.shape)))
    left = sums.movedim(dims, tuple(first)).flatten(1, 1 + len(dims))  # (N, Cin*taps, *rest)
    right = weight.movedim(dims, tuple(d - 1 for d in first)).flatten(0, len(dims))  # (Cin*taps, Cout/groups, *rest)
    if stride:
        convolve: Callable[..., Tensor] = CONVOLUTIONS[len(stride)]
        out = convolve(left, right, None, stride, padding, output_padding, groups, dilation)
    else:
        grouped = torch.bmm(left.reshape(n, groups, -1).transpose(0, 1), right.unflatten(0, (groups, -1)))
        out = grouped.transpose(0, 1).reshape(n, -1)  # from (groups, N, Cout/groups)
    for dim in dims:
        out = out.unsqueeze(dim)
    return out


@define(Kind.DERIVED, view=True)
def crop(x: Tensor, *, extent: tuple[int, ...]) -> Tensor:
    """The leading ``extent`` positions of the last dims."""
    return leading(x, extent)


@define(Kind.DERIVED)
def window_sums(weight: Tensor, *, windows: tuple[tuple[tuple[int, int], ...], ...]) -> Tensor:
    """Along each kernel dim, tap t of the result is the sum of the taps in the half-open range ``windows[..][t]``.

    weight: (Cin, Cout/groups, *kernel). An empty range gives zeros.
    """
    for d, ranges in enumerate(windows):
        dim = 2 + d
        parts = [weight.narrow(dim, low, high - low).sum(dim, keepdim=True) for low, high in ranges]
        weight = torch.cat(parts, dim)
    return weight


@define(Kind.DERIVED, outputs=4)
def centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x less the mean of its channel (dim 1) over all other dims; that mean, the variance, the unbiased variance.

    The statistics are (C,).
    """
    dims = tuple(d for d in range(x.dim()) if d != 1)
    count = math.prod(x.shape[d] for d in dims)  # of sizes that may be symbols
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    centred = centred.sub_(centred.mean(dims, keepdim=True))  # what rounding has left
    # torch.var is several times slower on a CPU
    total = torch.linalg.vector_norm(centred.reshape(*x.shape[:2], -1), dim=2).square().sum(0)
    return centred, mean.flatten(), total / count, total / (count - 1)


@define(Kind.DERIVED, view=True)
def lay_out(x: Tensor, *, order: tuple[int, ...]) -> Tensor:
    """x, dense, its dims in memory in the given order, the slowest first: the layout that eager mode gives."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


@define(Kind.DERIVED, outputs=3)
def statistics(x: Tensor, *, batch: bool, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and ``1 / sqrt(variance + eps)`` over all spatial dims and a group of channels (dim 1).

    x: (N, C, *spatial). With ``batch`` over all samples, too. Each result is (N, C, 1, ...), or (1, C, 1, ...)
    with ``batch``, contiguous, float32 at least: a channel has what its group has. The variance is the biased one.
    """
    n, c, *spatial = x.shape
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(n, groups, -1)
    dims = (0, 2) if batch else (2,)
    mean, var = grouped.mean(dims, keepdim=True), grouped.var(dims, correction=0, keepdim=True)
    shape = (1 if batch else n, c, *(1 for _ in spatial))
    results = (v.expand(-1, -1, c // groups).reshape(shape) for v in (mean, var, (var + eps).rsqrt()))
    mean, var, scale = (v.contiguous() for v in results)  # a reshape of one group is a view
    return mean, var, scale


@define(Kind.DERIVED, outputs=4)
def exponentials(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the sum of ``exp(x - maximum)`` over all spatial dims: the maximum, ``1 / sum``, ``log(sum)``; and logsumexp.

    Each result is (N, C, 1, ...), contiguous, float32 at least. Of a maximum that is infinite the sum is NaN.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = tuple(range(2, x.dim()))
    maximum = x.amax(dims, keepdim=True)
    total = (x - maximum).exp().sum(dims, keepdim=True)
    return maximum, total.reciprocal(), total.log(), x.logsumexp(dims, keepdim=True)


@define(Kind.DERIVED, outputs=2)
def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and minimum over all spatial dims, (N, C, 1, ...), contiguous, float32 at least. NaN wins."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = tuple(range(2, x.dim()))
    return x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)


@define(Kind.DERIVED)
def normalise(x: Tensor, *, dims: tuple[int, ...], eps: float, centred: bool, last: bool = False) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over ``dims``, var the biased one; else ``x / sqrt(mean(x^2) + eps)``.

    What kernels make of a LayerNorm and an RMSNorm. ``last``: laid out with dim 1 as the last one.
    """
    moved = x if dims[-1] == x.dim() - 1 else x.movedim(dims, tuple(range(-len(dims), 0)))
    shape = moved.shape[-len(dims) :]
    y = F.layer_norm(moved, shape, eps=eps) if centred else F.rms_norm(moved, shape, eps=eps)
    if moved is not x:
        y = y.movedim(tuple(range(-len(dims), 0)), dims)
    return y if last else y.contiguous()


@define(Kind.DERIVED)
def softmax_over(x: Tensor, *, count: int, log: bool) -> Tensor:
    """Softmax or log_softmax over the last ``count`` dims at once, contiguous: between two reshapes in a model."""
    flat = x.flatten(x.dim() - count)
    return (torch.log_softmax(flat, -1) if log else torch.softmax(flat, -1)).view(x.shape)
