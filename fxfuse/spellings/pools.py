"""Spellings of pools."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxfuse.call import Param, call, ints, module, rank, refuse, spells


def _stride(stride: Any, kernel: Any) -> Any:
    return kernel if stride is None or stride == () else stride


def _max_pool(n: int) -> None:
    @spells(getattr(F, f"max_pool{n}d"), getattr(torch, f"max_pool{n}d"), f"aten::max_pool{n}d")
    def functional(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        if return_indices:
            refuse("a max pool that returns indices")
        return call(
            "max_pool",
            input,
            kernel=ints(kernel_size, n),
            stride=ints(_stride(stride, kernel_size), n),
            padding=ints(padding, n),
            dilation=ints(dilation, n),
            ceil_mode=ceil_mode,
        )

    @module(getattr(nn, f"MaxPool{n}d"))
    def modular(m, param: Param, input):
        return functional(input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _avg_pool(n: int) -> None:
    @spells(getattr(F, f"avg_pool{n}d"), f"aten::avg_pool{n}d")
    def functional(
        input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ):
        return call(
            "avg_pool",
            input,
            kernel=ints(kernel_size, n),
            stride=ints(_stride(stride, kernel_size), n),
            padding=ints(padding, n),
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
        )

    @module(getattr(nn, f"AvgPool{n}d"))
    def modular(m, param: Param, input):
        divisor = getattr(m, "divisor_override", None)
        return functional(input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)


def _size(output_size: Any, n: int) -> tuple[int | None, ...]:
    size = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * n
    if len(size) != n or not all(s is None or isinstance(s, int) for s in size):
        refuse(f"output_size {output_size} is not known before the call")
    return size


def _adaptive_avg_pool(n: int) -> None:
    @spells(getattr(F, f"adaptive_avg_pool{n}d"), f"aten::adaptive_avg_pool{n}d")
    def functional(input, output_size):
        size = _size(output_size, n)
        if all(s == 1 for s in size):  # as torch computes it, too
            return call("mean", input, dims=tuple(range(rank(input) - n, rank(input))), keepdim=True)
        return call("adaptive_avg_pool", input, size=size)

    @module(getattr(nn, f"AdaptiveAvgPool{n}d"))
    def modular(m, param: Param, input):
        return functional(input, m.output_size)


def _adaptive_max_pool(n: int) -> None:
    @spells(getattr(F, f"adaptive_max_pool{n}d"))
    def functional(input, output_size, return_indices=False):
        if return_indices:
            refuse("a max pool that returns indices")
        return call("adaptive_max_pool", input, size=_size(output_size, n))

    @module(getattr(nn, f"AdaptiveMaxPool{n}d"))
    def modular(m, param: Param, input):
        return functional(input, m.output_size, m.return_indices)


for _n in (1, 2, 3):
    _max_pool(_n)
    _avg_pool(_n)
    _adaptive_avg_pool(_n)
    _adaptive_max_pool(_n)
