"""Operators that rewrite rules make: arithmetic on weights, and a transposed convolution under a mean."""

from __future__ import annotations

import torch
from torch import Tensor

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
    kernel = weight.shape[2:]
    grouped = weight.unflatten(0, (groups, -1))
    factors = scale.reshape(groups, 1, weight.shape[1], *(1 for _ in kernel))
    return torch.mul(grouped, factors).flatten(0, 1)


@define(Kind.DERIVED)
def to_channels(value: Tensor | float, like: Tensor, *, channels: int) -> Tensor:
    """A number or a tensor of 1 or ``channels`` elements as a (channels,) vector of ``like``'s dtype and device."""
    if not isinstance(value, Tensor):
        return like.new_full((channels,), value)
    return value.to(like.dtype).reshape(-1).expand(channels).clone()


@define(Kind.DERIVED)
def tap_sums(x: Tensor, *, boxes: tuple[tuple[tuple[int, int], ...], ...]) -> Tensor:
    """``S[n, c, a, b, ...] = sum of x[n, c] over the box boxes[0][a] x boxes[1][b] x ...``.

    x: (N, C, *spatial). ``boxes``: per spatial dim, per tap, the half-open range of input
    positions. A dim whose taps all sum the same range has size 1 in the result.
    """
    for d, ranges in enumerate(boxes):
        dim = 2 + d
        parts = dict.fromkeys(ranges)
        sums = {(low, high): x.narrow(dim, low, high - low).sum(dim, keepdim=True) for low, high in parts}
        x = next(iter(sums.values())) if len(sums) == 1 else torch.cat([sums[r] for r in ranges], dim)
    return x


@define(Kind.DERIVED)
def contract_taps(sums: Tensor, weight: Tensor, *, taps: tuple[tuple[int, ...], ...], groups: int) -> Tensor:
    """``z[n, o] = sum over c and taps of sums[n, c, tap] * weight[c, o, tap]``, shape (N, Cout, 1, ...).

    ``taps``: per spatial dim the taps of ``weight`` that take part, in order. They are
    summed one by one, never their weights first: an Inf meets every weight, as in the convolution.
    """
    for d, kept in enumerate(taps):
        if len(kept) < weight.shape[2 + d]:
            weight = torch.cat([weight.narrow(2 + d, tap, 1) for tap in kept], 2 + d)
    n, spatial = sums.shape[0], weight.shape[2:]
    sums = sums.expand(*sums.shape[:2], *spatial)
    left = sums.reshape(n, groups, -1).transpose(0, 1)  # (groups, N, Cin/groups * taps)
    right = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # (groups, Cout/groups, Cin/groups * taps)
    out = torch.bmm(left, right.transpose(1, 2))  # (groups, N, Cout/groups)
    return out.transpose(0, 1).reshape(n, -1, *(1 for _ in spatial))


@define(Kind.DERIVED, view=True)
def crop(x: Tensor, *, extent: tuple[int, ...]) -> Tensor:
    """The leading ``extent`` positions of the last dims."""
    for dim, size in zip(range(x.dim() - len(extent), x.dim()), extent, strict=True):
        x = x.narrow(dim, 0, size)
    return x
