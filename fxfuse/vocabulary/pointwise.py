"""Pointwise operators: arithmetic, activations, comparisons, casts.

Operands are tensors of any broadcastable shape or Python scalars; the result follows torch's
broadcasting and type promotion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.vocabulary.op import Kind, Op, define, register

Operand = Tensor | float | int | bool


def _enter(name: str, fn: Callable[..., Any], inplace: Callable[..., Any] | None, differentiable: bool) -> Op:
    return register(Op(name, Kind.POINTWISE, fn, inplace=inplace, differentiable=differentiable))


def _unary(
    function: Callable[[Tensor], Tensor],
    inplace: Callable[[Tensor], Tensor] | None = None,
    *,
    differentiable: bool = True,
) -> Op:
    def reference(x: Tensor) -> Tensor:
        return function(x)

    reference.__doc__ = function.__doc__
    return _enter(function.__name__, reference, inplace, differentiable)


# --- one operand, no attributes -------------------------------------------------------------------
#: every unary operator without attributes, with its in-place form where torch has one
UNARY: dict[str, Op] = {
    op.name: op
    for op in (
        _unary(torch.abs, torch.abs_),
        _unary(torch.neg, torch.neg_),
        _unary(torch.sign),
        _unary(torch.exp, torch.exp_),
        _unary(torch.expm1),
        _unary(torch.log, torch.log_),
        _unary(torch.log1p, torch.log1p_),
        _unary(torch.sqrt, torch.sqrt_),
        _unary(torch.rsqrt, torch.rsqrt_),
        _unary(torch.reciprocal, torch.reciprocal_),
        _unary(torch.square, torch.square_),
        _unary(torch.sin, torch.sin_),
        _unary(torch.cos, torch.cos_),
        _unary(torch.erf, torch.erf_),
        _unary(torch.floor, torch.floor_),
        _unary(torch.ceil, torch.ceil_),
        _unary(torch.round, torch.round_),
        _unary(torch.sigmoid, torch.sigmoid_),
        _unary(torch.tanh, torch.tanh_),
        _unary(torch.relu, torch.relu_),
        _unary(torch.selu, torch.selu_),
        _unary(F.relu6, lambda x: F.relu6(x, inplace=True)),
        _unary(F.silu, lambda x: F.silu(x, inplace=True)),
        _unary(F.mish, lambda x: F.mish(x, inplace=True)),
        _unary(F.hardswish, lambda x: F.hardswish(x, inplace=True)),
        _unary(F.hardsigmoid, lambda x: F.hardsigmoid(x, inplace=True)),
        _unary(F.softsign),
        _unary(F.logsigmoid),
        _unary(F.tanhshrink),
        _unary(torch.isnan, differentiable=False),
        _unary(torch.isinf, differentiable=False),
        _unary(torch.isfinite, differentiable=False),
        _unary(torch.logical_not, differentiable=False),
    )
}


# --- one operand, attributes ----------------------------------------------------------------------
@define(Kind.POINTWISE, inplace=F.leaky_relu_)
def leaky_relu(x: Tensor, *, negative_slope: float) -> Tensor:
    return F.leaky_relu(x, negative_slope)


@define(Kind.POINTWISE, inplace=F.elu_)
def elu(x: Tensor, *, alpha: float) -> Tensor:
    return F.elu(x, alpha)


@define(Kind.POINTWISE, inplace=torch.celu_)
def celu(x: Tensor, *, alpha: float) -> Tensor:
    return F.celu(x, alpha)


@define(Kind.POINTWISE)
def gelu(x: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


@define(Kind.POINTWISE, inplace=F.hardtanh_)
def hardtanh(x: Tensor, *, min_val: float, max_val: float) -> Tensor:
    return F.hardtanh(x, min_val, max_val)


@define(Kind.POINTWISE)
def hardshrink(x: Tensor, *, lambd: float) -> Tensor:
    return F.hardshrink(x, lambd)


@define(Kind.POINTWISE)
def softshrink(x: Tensor, *, lambd: float) -> Tensor:
    return F.softshrink(x, lambd)


@define(Kind.POINTWISE, inplace=torch.threshold_)
def threshold(x: Tensor, *, threshold: float, value: float) -> Tensor:
    return F.threshold(x, threshold, value)


@define(Kind.POINTWISE)
def softplus(x: Tensor, *, beta: float, threshold: float) -> Tensor:
    return F.softplus(x, beta, threshold)


@define(Kind.POINTWISE)
def cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """x in another dtype, always in memory of its own."""
    return x.to(dtype, copy=True)


@define(Kind.POINTWISE)
def clone(x: Tensor) -> Tensor:
    """x in memory of its own, laid out as it is."""
    return x.clone()


@define(Kind.POINTWISE)
def contiguous(x: Tensor) -> Tensor:
    """x in memory of its own, laid out contiguously: what follows the region may rely on it."""
    return x.clone(memory_format=torch.contiguous_format)


@define(Kind.POINTWISE, view=True, differentiable=False)
def detach(x: Tensor) -> Tensor:
    """x, through which no gradient passes."""
    return x.detach()


# --- several operands -----------------------------------------------------------------------------
def _tensors(*operands: Operand) -> list[Tensor]:
    """Scalars as 0-dim tensors that do not take part in type promotion beyond their category."""
    device = next(o.device for o in operands if isinstance(o, Tensor))
    return [
        o if isinstance(o, Tensor) else torch.scalar_tensor(o, dtype=_scalar_type(o), device=device) for o in operands
    ]


def _scalar_type(value: Operand) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.get_default_dtype()


def _binary(
    name: str,
    function: Callable[..., Tensor],
    inplace: Callable[..., Any] | None = None,
    *,
    differentiable: bool = True,
) -> Op:
    def reference(a: Operand, b: Operand) -> Tensor:
        return function(a, b)

    reference.__doc__ = function.__doc__
    return _enter(name, reference, inplace, differentiable)


def _rsub_safe(a: Operand, b: Operand) -> Tensor:
    return torch.sub(a, b) if isinstance(a, Tensor) else torch.rsub(b, a)  # type: ignore[arg-type]


def _div_safe(a: Operand, b: Operand) -> Tensor:
    return a / b  # type: ignore[return-value]


def _compare(function: Callable[..., Tensor], mirrored: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: function(a, b) if isinstance(a, Tensor) else mirrored(b, a)


def _symmetric(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: function(a, b) if isinstance(a, Tensor) else function(b, a)


def _extremum(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: function(*_tensors(a, b))


#: every operator of two operands without attributes
BINARY: dict[str, Op] = {
    op.name: op
    for op in (
        _binary("add", _symmetric(torch.add), Tensor.add_),
        _binary("sub", _rsub_safe, Tensor.sub_),
        _binary("mul", _symmetric(torch.mul), Tensor.mul_),
        _binary("div", _div_safe, Tensor.div_),
        _binary("pow", torch.pow, Tensor.pow_),
        _binary("minimum", _extremum(torch.minimum)),
        _binary("maximum", _extremum(torch.maximum)),
        _binary("eq", _symmetric(torch.eq), differentiable=False),
        _binary("ne", _symmetric(torch.ne), differentiable=False),
        _binary("lt", _compare(torch.lt, torch.gt), differentiable=False),
        _binary("le", _compare(torch.le, torch.ge), differentiable=False),
        _binary("gt", _compare(torch.gt, torch.lt), differentiable=False),
        _binary("ge", _compare(torch.ge, torch.le), differentiable=False),
        _binary("logical_and", torch.logical_and, differentiable=False),
        _binary("logical_or", torch.logical_or, differentiable=False),
    )
}


def _bounds(x: Tensor, low: Operand | None, high: Operand | None) -> Any:
    """Two numbers or two tensors, as torch asks for."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return [b if b is None or isinstance(b, Tensor) else _tensors(x, b)[1] for b in (low, high)]
    return low, high


def _clamp_inplace(x: Tensor, low: Operand | None, high: Operand | None) -> Tensor:
    return torch.clamp_(x, *_bounds(x, low, high))


@define(Kind.POINTWISE, inplace=_clamp_inplace)
def clamp(x: Tensor, low: Operand | None, high: Operand | None) -> Tensor:
    """min(max(x, low), high); a bound of None is absent."""
    return torch.clamp(x, *_bounds(x, low, high))


@define(Kind.POINTWISE)
def exp_below(x: Tensor, maximum: Tensor) -> Tensor:
    """``exp(x - maximum)`` of what is not above that: what kernels make of a softmax."""
    return torch.exp(x - maximum)


@define(Kind.POINTWISE)
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` where positive, ``weight * x`` otherwise; weight: (1,) or one per channel (dim 1)."""
    return F.prelu(x, weight)


@define(Kind.POINTWISE)
def where(condition: Tensor, a: Operand, b: Operand) -> Tensor:
    return torch.where(condition, a, b)


@define(Kind.POINTWISE)
def masked_fill(x: Tensor, mask: Tensor, value: Operand) -> Tensor:
    return x.masked_fill(mask, value)


@define(Kind.POINTWISE)
def lerp(start: Tensor, end: Tensor, weight: Operand) -> Tensor:
    return torch.lerp(start, end, weight)


@define(Kind.POINTWISE)
def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float) -> Tensor:
    return torch.addcmul(x, a, b, value=value)


@define(Kind.POINTWISE)
def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float) -> Tensor:
    return torch.addcdiv(x, a, b, value=value)
