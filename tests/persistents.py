"""Functions of a value and its own reductions over one dim, for tests, each with what a kernel names of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor, int], Tensor]


def _gate(y: Tensor, dim: int) -> Tensor:
    return y * torch.sigmoid(y.mean(dim, keepdim=True) + y.amax(dim, keepdim=True))


def _entropy(y: Tensor, dim: int) -> Tensor:
    return -(y.softmax(dim) * y.log_softmax(dim)).sum(dim)


def _by_hand(y: Tensor, dim: int) -> Tensor:
    mean = y.mean(dim, keepdim=True)
    return (y - mean) / torch.sqrt(y.var(dim, keepdim=True, unbiased=False) + 0.25) + mean


def _in_stages(y: Tensor, dim: int) -> Tensor:
    p = torch.softmax(y.clamp(-3, 3), dim)
    mean = p.mean(dim, keepdim=True)
    return torch.where(p > mean, p - mean, (p - mean) * p.amin(dim, keepdim=True))


#: name -> the function, and the operators that one kernel makes of it
FUNCTIONS: dict[str, tuple[Function, str]] = {
    "gate": (_gate, "mean > amax > add > sigmoid > mul"),
    "PixelNorm": (
        lambda y, dim: y * torch.rsqrt(torch.mean(y**2, dim=dim, keepdim=True) + 0.25),
        "pow > mean > add > rsqrt > mul",
    ),
    "less its mean, without the dim": (lambda y, dim: y - y.mean(dim).unsqueeze(dim), "mean > reshape > sub"),
    "two of them": (lambda y, dim: y.sum(dim) * 0.01 + y.abs().amax(dim).sqrt(), "sum > mul > abs > amax > sqrt > add"),
    "by the largest": (
        lambda y, dim: y.relu() / (y.abs().amax(dim, keepdim=True) + 0.5),
        "relu > abs > amax > add > div",
    ),
    "entropy": (_entropy, "softmax > log_softmax > mul > sum > neg"),
    "by hand": (_by_hand, "mean > sub > var > add > sqrt > div > add"),
    "in stages": (_in_stages, "clamp > softmax > mean > gt > sub > sub > amin > mul > where"),
    "logsumexp": (
        lambda y, dim: (y - y.logsumexp(dim, keepdim=True)).exp() * y.std(dim, keepdim=True),
        "logsumexp > sub > exp > std > mul",
    ),
    "normalize twice": (
        lambda y, dim: F.normalize(y, dim=dim) + F.normalize(y.tanh(), dim=dim, eps=0.5),
        "normalize > tanh > normalize > add",
    ),
}  # fmt: skip
