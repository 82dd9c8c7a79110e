"""Spellings of the transposed convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.call import Call, Param, call, ints, module, rank, refuse, spells, tensor
from fxfuse.spellings.products import of_one_position
from fxfuse.vocabulary.conv import output_size as natural_size


def _conv_transpose(n: int) -> None:
    name = f"conv_transpose{n}d"

    @spells(getattr(F, name), f"aten::{name}")
    def functional(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        return _call(n, input, weight, bias, stride, padding, output_padding, dilation, groups)

    @module({1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[n])
    def modular(m, param: Param, input, output_size=None):
        extra = m.output_padding
        if output_size is not None:
            extra = _output_padding(m, tensor(input), output_size, n)
        return functional(input, param("weight"), param("bias"), m.stride, m.padding, extra, m.groups, m.dilation)


@spells("aten::convolution")
def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    n = rank(weight) - 2
    if not transposed:
        return of_one_position(n, input, weight, bias, padding, groups)
    return _call(n, input, weight, bias, stride, padding, output_padding, dilation, groups)


def _call(n, input, weight, bias, stride, padding, output_padding, dilation, groups) -> Call:
    return call(
        "conv_transpose",
        input,
        weight,
        bias,
        stride=ints(stride, n),
        padding=ints(padding, n),
        output_padding=ints(output_padding, n),
        dilation=ints(dilation, n),
        groups=groups,
    )


def _output_padding(m: Any, x: torch.Tensor, output_size: Any, n: int) -> tuple[int, ...]:
    """What nn.ConvTransposeNd derives from ``output_size=``; refuses sizes that it would not accept."""
    wanted = tuple(output_size)[-n:]
    if len(output_size) not in (n, x.dim()) or not all(isinstance(s, int) for s in (*wanted, *x.shape[-n:])):
        refuse("output_size is not known before the call")
    extra = []
    for d in range(n):
        plain = natural_size(x.shape[x.dim() - n + d], m.kernel_size[d], m.stride[d], m.padding[d], 0, m.dilation[d])
        if not 0 <= wanted[d] - plain < m.stride[d]:
            refuse(f"output_size {wanted} cannot be reached")
        extra.append(wanted[d] - plain)
    return tuple(extra)


for _n in (1, 2, 3):
    _conv_transpose(_n)
