"""Reductions over named dims. ``dims`` are non-negative, sorted; () never means "all"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.op import Kind, define


@define(Kind.REDUCTION)
def sum_(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.sum(x, dims, keepdim)


@define(Kind.REDUCTION)
def mean(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.mean(x, dims, keepdim)


@define(Kind.REDUCTION)
def amax(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """Maximum, NaN wins. In a backward, ties share the gradient evenly."""
    return torch.amax(x, dims, keepdim)


@define(Kind.REDUCTION)
def amin(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """Minimum, NaN wins. In a backward, ties share the gradient evenly."""
    return torch.amin(x, dims, keepdim)


@define(Kind.REDUCTION)
def max_(x: Tensor, *, dim: int, keepdim: bool) -> Tensor:
    """Maximum over one dim; in a backward one winner takes the gradient (torch.max's, unlike amax's)."""
    return torch.max(x, dim, keepdim).values


@define(Kind.REDUCTION)
def min_(x: Tensor, *, dim: int, keepdim: bool) -> Tensor:
    """Minimum over one dim; in a backward one winner takes the gradient (torch.min's, unlike amin's)."""
    return torch.min(x, dim, keepdim).values


@define(Kind.REDUCTION)
def prod(x: Tensor, *, dim: int, keepdim: bool) -> Tensor:
    return torch.prod(x, dim, keepdim)


@define(Kind.REDUCTION)
def logsumexp(x: Tensor, *, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.logsumexp(x, dims, keepdim)


@define(Kind.REDUCTION)
def var(x: Tensor, *, dims: tuple[int, ...], correction: float, keepdim: bool) -> Tensor:
    return torch.var(x, dims, correction=correction, keepdim=keepdim)


@define(Kind.REDUCTION)
def std(x: Tensor, *, dims: tuple[int, ...], correction: float, keepdim: bool) -> Tensor:
    return torch.std(x, dims, correction=correction, keepdim=keepdim)


@define(Kind.REDUCTION)
def vector_norm(x: Tensor, *, ord: float, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """``(sum |x|^ord)^(1/ord)``."""
    result: Tensor = torch.linalg.vector_norm(x, ord, dims, keepdim)
    return result


@define(Kind.REDUCTION)
def normalize(x: Tensor, *, ord: float, dims: tuple[int, ...], eps: float) -> Tensor:
    """``x / max(vector_norm(x, ord), eps)``."""
    return F.normalize(x, ord, dims[0] if len(dims) == 1 else dims, eps)  # type: ignore[arg-type]


@define(Kind.REDUCTION)
def softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.softmax(x, dim)


@define(Kind.REDUCTION)
def log_softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.log_softmax(x, dim)
