"""Spellings of reductions and softmaxes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse.call import Call, Param, all_dims, call, module, one_dim, rank, refuse, spells, tensor


def _same_dtype(input: Any, dtype: Any) -> None:
    """Refuse a ``dtype=`` that is not the input's own floating-point type."""
    if dtype is not None and (dtype is not tensor(input).dtype or not dtype.is_floating_point):
        refuse(f"a reduction into dtype={dtype}")


# --- sums and means -------------------------------------------------------------------------------
def _total(name: str) -> None:
    @spells(getattr(torch, name), name, {"sum": "aten::sum.dim_IntList", "mean": "aten::mean.dim"}[name])
    def adapter(input, dim=None, keepdim=False, dtype=None):
        _same_dtype(input, dtype)
        return call(name, input, dims=all_dims(input, dim), keepdim=keepdim)

    @spells(f"aten::{name}.default")
    def whole(input, dtype=None):
        return adapter(input, dtype=dtype)


_total("sum")
_total("mean")


@spells(torch.prod, "prod", "aten::prod.dim_int")
def _prod(input, dim=None, keepdim=False, dtype=None):
    _same_dtype(input, dtype)
    if dim is None:
        refuse("a product over all dims")
    return call("prod", input, dim=one_dim(input, dim), keepdim=keepdim)


@spells(torch.logsumexp, torch.special.logsumexp, "logsumexp", "aten::logsumexp", "aten::special_logsumexp")
def _logsumexp(input, dim, keepdim=False):
    return call("logsumexp", input, dims=all_dims(input, dim), keepdim=keepdim)


# --- extrema --------------------------------------------------------------------------------------
def _amax(name: str) -> None:
    @spells(getattr(torch, name), name, f"aten::{name}")
    def adapter(input, dim=(), keepdim=False):
        return call(name, input, dims=all_dims(input, dim), keepdim=keepdim)


_amax("amax")
_amax("amin")


def max_values(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.max(input, dim).values``, as one function (see :func:`fxfuse.normalize.values_only`)."""
    return torch.max(input, *args, **kwargs).values  # type: ignore[no-any-return]


def min_values(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.min(input, dim).values``, as one function (see :func:`fxfuse.normalize.values_only`)."""
    return torch.min(input, *args, **kwargs).values  # type: ignore[no-any-return]


def _max(name: str, values: Any, reduction: str, elementwise: str) -> None:
    @spells(values)
    def along(input, dim, keepdim=False):
        return call(name, input, dim=one_dim(input, dim), keepdim=keepdim)

    @spells(getattr(torch, name), name)
    def adapter(input, *args, **kwargs):
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, fx.Node):
            return call(elementwise, input, other)
        if args or kwargs:
            refuse(f"a {name} that also returns indices")
        return whole(input)

    @spells(f"aten::{name}.default")
    def whole(input):
        return call(reduction, input, dims=all_dims(input, None), keepdim=False)

    @spells(f"aten::{name}.other")
    def binary(input, other):
        return call(elementwise, input, other)


_max("max", max_values, "amax", "maximum")
_max("min", min_values, "amin", "minimum")


# --- spreads --------------------------------------------------------------------------------------
def _spread(name: str) -> None:
    def spread(input: Any, dim: Any, degrees: Any, keepdim: Any) -> Call:
        return call(name, input, dims=all_dims(input, dim), correction=float(degrees), keepdim=keepdim)

    @spells(getattr(torch, name), name)
    def adapter(input, dim=None, unbiased=None, keepdim=False, *, correction=None):
        if isinstance(dim, bool):  # var(x, False)
            unbiased, dim = dim, None
        if unbiased is not None and correction is not None:
            refuse("both unbiased= and correction=")
        if correction is None:
            correction = 1 if unbiased is None or unbiased else 0
        return spread(input, dim, correction, keepdim)

    @spells(f"aten::{name}.correction")
    def with_correction(input, dim=None, *, correction=None, keepdim=False):
        return spread(input, dim, 1 if correction is None else correction, keepdim)

    @spells(f"aten::{name}.dim")
    def with_dim(input, dim, unbiased=True, keepdim=False):
        return spread(input, dim, 1 if unbiased else 0, keepdim)

    @spells(f"aten::{name}.default")
    def whole(input, unbiased=True):
        return spread(input, None, 1 if unbiased else 0, False)


_spread("var")
_spread("std")


# --- norms of vectors -----------------------------------------------------------------------------
@spells(torch.linalg.vector_norm, "aten::linalg_vector_norm")
def _vector_norm(input, ord=2, dim=None, keepdim=False, *, dtype=None):
    _same_dtype(input, dtype)
    return call("vector_norm", input, ord=float(ord), dims=all_dims(input, dim), keepdim=keepdim)


@spells(torch.linalg.norm, "aten::linalg_norm")
def _linalg_norm(input, ord=None, dim=None, keepdim=False, *, dtype=None):
    if ord is not None and not isinstance(dim, int):
        refuse("a norm of matrices")
    return _vector_norm(input, 2 if ord is None else ord, dim, keepdim, dtype=dtype)


@spells(torch.norm, "norm")
def _norm(input, p="fro", dim=None, keepdim=False, dtype=None):
    if p is None:
        p = 2
    if p == "fro":
        p = 2
    if isinstance(p, str):
        refuse(f"a norm with p={p!r}")
    return _vector_norm(input, p, dim, keepdim, dtype=dtype)


@spells(F.normalize)
def _normalize(input, p=2.0, dim=1, eps=1e-12):
    if not isinstance(p, (int, float)):
        refuse("a norm that is not known before the call")
    return call("normalize", input, ord=float(p), dims=all_dims(input, dim), eps=float(eps))


# --- softmax --------------------------------------------------------------------------------------
def _softmax(name: str, kind: type[nn.Module]) -> None:
    @spells(getattr(torch, name), name, f"aten::{name}.int")
    def adapter(input, dim, dtype=None):
        _same_dtype(input, dtype)
        if dim is None:
            refuse(f"{name} without a dim")
        return call(name, input, dim=one_dim(input, dim))

    @spells(getattr(torch.special, name))
    def special(input, dim, *, dtype=None):
        return adapter(input, dim, dtype)

    @spells(getattr(F, name))
    def functional(input, dim=None, _stacklevel=3, dtype=None):
        return adapter(input, dim, dtype)

    @module(kind)
    def modular(m, param: Param, input):
        return adapter(input, m.dim)


_softmax("softmax", nn.Softmax)
_softmax("log_softmax", nn.LogSoftmax)


@module(nn.Softmax2d)
def _softmax2d(m, param: Param, input):
    if rank(input) not in (3, 4):
        refuse(f"Softmax2d on an input of {rank(input)} dims")
    return call("softmax", input, dim=rank(input) - 3)
