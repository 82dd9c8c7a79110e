"""Spellings of products with a matrix: linear layers, and convolutions of one position."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxfuse.call import Call, Param, call, ints, module, rank, refuse, spells, tensor


@spells(F.linear, "aten::linear")
def linear(input, weight, bias=None):
    if rank(input) != 2:
        refuse("a linear layer is in the vocabulary only where it reads one vector per sample")
    if rank(weight) != 2:
        refuse("a linear layer whose weight is a vector")
    return call("linear", input, weight, bias)


@module(nn.Linear)
def _linear_module(m, param: Param, input):
    return linear(input, param("weight"), param("bias"))


def _convolution(n: int) -> None:
    name = f"conv{n}d"

    @spells(getattr(F, name), f"aten::{name}")
    def functional(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return of_one_position(n, input, weight, bias, padding, groups)

    @module({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n])
    def modular(m, param: Param, input):
        return functional(input, param("weight"), param("bias"), m.stride, m.padding, m.dilation, m.groups)


def of_one_position(n: int, input: Any, weight: Any, bias: Any, padding: Any, groups: Any) -> Call:
    """A convolution of ``n`` spatial dims that sees one position of each sample; others are refused."""
    sizes = [*tensor(input).shape[2:], *tensor(weight).shape[2:]]
    if rank(input) != n + 2 or any(type(s) is not int or s != 1 for s in sizes):
        refuse("a convolution is in the vocabulary only where it reads one position per sample")
    if groups != 1:
        refuse(f"a convolution of one position in {groups} groups")
    if padding != "valid" and padding != "same" and any(ints(padding, n)):
        refuse("a convolution of one position, padded")
    return call("linear", input, weight, bias)


for _n in (1, 2, 3):
    _convolution(_n)
