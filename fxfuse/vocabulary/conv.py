"""The anchor: a transposed convolution in one, two or three spatial dims."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.op import Kind, define

#: torch's function per number of spatial dims
CONVOLUTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@define(Kind.ANCHOR)
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    extent: tuple[int, ...] | None = None,
) -> Tensor:
    """``y[n, o, q] = bias[o] + sum of x[n, c, i] * weight[c, o, k]`` over i*stride - padding + k*dilation = q.

    x: (N, Cin, *spatial) or (Cin, *spatial); weight: (Cin, Cout/groups, *kernel); bias: (Cout,).
    ``extent``, where given, is the number of leading positions per dim that are computed and
    returned: the rest of the output is dead.
    """
    geometry = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    y = conv_transpose_untrimmed(x, weight, bias, groups=groups, extent=extent, **geometry)
    return y if extent is None else leading(y, extent)


def conv_transpose_untrimmed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    extent: tuple[int, ...] | None,
) -> Tensor:
    """:data:`conv_transpose`, but the result may be longer than ``extent``: by what comes for free."""
    if extent is not None:
        x, output_padding = _crop(x, weight, stride, padding, output_padding, dilation, extent)
    return CONVOLUTIONS[len(stride)](x, weight, bias, stride, padding, output_padding, groups, dilation)


def leading(x: Tensor, extent: tuple[int, ...]) -> Tensor:
    """The leading ``extent`` positions of the last dims: ``x`` itself where it has no more."""
    for dim, size in zip(range(x.dim() - len(extent), x.dim()), extent, strict=True):
        if x.shape[dim] != size:
            x = x.narrow(dim, 0, size)
    return x


def _crop(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    extent: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """Drop the inputs that reach no output below ``extent``; give the output padding that then reaches it."""
    first = x.dim() - len(extent)
    crop_padding = []
    for d, size in enumerate(extent):
        length = x.shape[first + d]
        # input i reaches outputs from i*stride - padding on
        keep = min(length, (size - 1 + padding[d]) // stride[d] + 1)
        # torch gives (keep-1)*stride - 2*padding + dilation*(kernel-1) + 1 + output_padding positions
        plain = (keep - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1
        extra = output_padding[d] if keep == length else min(max(size - plain, 0), max(stride[d], dilation[d]) - 1)
        if plain + extra < size:  # a short kernel: the inputs beyond still lengthen the output
            keep, extra = length, output_padding[d]
            plain = (keep - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1
        if keep < length:
            x = x.narrow(first + d, 0, keep)
        crop_padding.append(extra)
    return x, tuple(crop_padding)


def output_size(length: int, kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> int:
    """Output positions of a transposed convolution along one dim (torch.nn.ConvTranspose3d's formula)."""
    return (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
