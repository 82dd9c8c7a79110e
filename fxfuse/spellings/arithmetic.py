"""Spellings of pointwise operators of several operands: arithmetic, comparisons, choices."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxfuse.call import call, everywhere, refuse, spells, tensor


def _some_tensor(*operands: Any) -> None:
    if not any(isinstance(o, fx.Node) for o in operands):
        refuse("no operand is a tensor")


def _alpha(alpha: Any) -> None:
    if isinstance(alpha, fx.Node) or alpha != 1:
        refuse(f"alpha={alpha} scales its other operand")


def _binary(name: str, *others: Any) -> None:
    @spells(*everywhere(name), *others)
    def adapter(input, other):
        _some_tensor(input, other)
        return call(name, input, other)


for _name, _others in {
    "mul": (operator.mul, torch.multiply, "multiply", "__mul__", "__rmul__", "aten::multiply"),
    "minimum": (),
    "maximum": (),
    "eq": (operator.eq, "__eq__"),
    "ne": (operator.ne, torch.not_equal, "not_equal", "__ne__"),
    "lt": (operator.lt, torch.less, "less", "__lt__"),
    "le": (operator.le, torch.less_equal, "less_equal", "__le__"),
    "gt": (operator.gt, torch.greater, "greater", "__gt__"),
    "ge": (operator.ge, torch.greater_equal, "greater_equal", "__ge__"),
    "logical_and": (),
    "logical_or": (),
}.items():
    _binary(_name, *_others)


@spells(*everywhere("pow"), operator.pow, "__pow__")
def _pow(input, exponent):
    _some_tensor(input, exponent)
    return call("pow", input, exponent)


@spells("__rpow__")
def _rpow(input, other):
    return call("pow", other, input)


@spells(*everywhere("add"), operator.add, "__add__", "__radd__")
def _add(input, other, alpha=1):
    _some_tensor(input, other)
    _alpha(alpha)
    return call("add", input, other)


@spells(*everywhere("sub"), operator.sub, torch.subtract, "subtract", "__sub__", "aten::subtract")
def _sub(input, other, alpha=1):
    _some_tensor(input, other)
    _alpha(alpha)
    return call("sub", input, other)


@spells(torch.rsub, "aten::rsub", "__rsub__")
def _rsub(input, other, alpha=1):
    _alpha(alpha)
    return call("sub", other, input)


@spells(operator.truediv)
def _truediv(input, other):
    _some_tensor(input, other)
    return call("div", input, other)


@spells(*everywhere("div"), torch.divide, "divide", "__truediv__", "aten::divide")
def _div(input, other, rounding_mode=None):
    if not isinstance(input, fx.Node):
        refuse("torch.div of a number rounds once, the number / a tensor twice")
    if rounding_mode is not None:
        refuse(f"division with rounding_mode={rounding_mode!r}")
    return call("div", input, other)


@spells(torch.true_divide, "true_divide", "aten::true_divide")
def _true_divide(input, other):
    return _div(input, other)


# --- bounds ---------------------------------------------------------------------------------------
@spells(*everywhere("clamp"), *everywhere("clip"))
def _clamp(input, min=None, max=None):
    return call("clamp", input, min, max)


@spells(*everywhere("clamp_min"))
def _clamp_min(input, min):
    return call("clamp", input, min, None)


@spells(*everywhere("clamp_max"))
def _clamp_max(input, max):
    return call("clamp", input, None, max)


# --- choices --------------------------------------------------------------------------------------
@spells(torch.where, "aten::where.self", "aten::where.ScalarOther", "aten::where.ScalarSelf", "aten::where.Scalar")
def _where(condition, input, other):
    return call("where", condition, input, other)


@spells("where")
def _where_method(input, condition, other):
    return call("where", condition, input, other)


@spells(*everywhere("masked_fill"))
def _masked_fill(input, mask, value):
    return call("masked_fill", input, mask, value)


def _logic(name: str, *others: Any) -> None:
    """``&`` and ``|``, which mean ``name`` on two bool tensors."""

    @spells(*others)
    def adapter(input, other):
        if any(not isinstance(o, fx.Node) or tensor(o).dtype is not torch.bool for o in (input, other)):
            refuse("a bitwise operator on integers")
        return call(name, input, other)


_logic("logical_and", operator.and_, *everywhere("bitwise_and"), "__and__", "aten::__and__")
_logic("logical_or", operator.or_, *everywhere("bitwise_or"), "__or__", "aten::__or__")


# --- three operands -------------------------------------------------------------------------------
@spells(*everywhere("lerp"))
def _lerp(input, end, weight):
    return call("lerp", input, end, weight)


@spells(*everywhere("addcmul"))
def _addcmul(input, tensor1, tensor2, value=1):
    return call("addcmul", input, tensor1, tensor2, value=value)


@spells(*everywhere("addcdiv"))
def _addcdiv(input, tensor1, tensor2, value=1):
    return call("addcdiv", input, tensor1, tensor2, value=value)
