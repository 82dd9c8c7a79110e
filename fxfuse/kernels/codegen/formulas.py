"""The C++ text of every pointwise operator, over operands {0}, {1}, ... and attributes by name.

``fxfuse::pw`` is ``cuh/pointwise.cuh``. All of it computes in float32, as torch's CUDA kernels do
for float32, float16 and bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Formula:
    """``cost``: rough, in additions. ``extra``: numbers that ``text`` names besides the attributes.

    ``rounds``: torch rounds its numbers to the operand's dtype, not to float32.
    """

    text: str
    cost: int = 1
    rounds: bool = False
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)


#: the same element
COPIES = frozenset({"clone", "contiguous", "detach"})
#: made in the operands' common dtype, of a bool result
COMPARISONS: Mapping[str, str] = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
#: one of the operands, of any dtype; which operand is the condition, if any
SELECTIONS: Mapping[str, int | None] = {"where": 0, "masked_fill": 1, "minimum": None, "maximum": None}
#: of operands taken as bools
LOGIC: Mapping[str, str] = {"logical_not": "!{0}", "logical_and": "{0} && {1}", "logical_or": "{0} || {1}"}


def _call(name: str, *arguments: str, cost: int = 1, rounds: bool = False) -> Formula:
    return Formula(f"fxfuse::pw::{name}({', '.join(arguments)})", cost, rounds)


def _gelu(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    if attributes["approximate"] == "tanh":
        return _call("gelu_tanh", "{0}", cost=9)
    return _call("gelu", "{0}", cost=17)


def _celu(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    if attributes["alpha"] == 0:
        raise ValueError("alpha cannot be 0")
    inverse = {"inverse": 1.0 / attributes["alpha"]}
    return dataclasses.replace(_call("celu", "{0}", "{alpha}", "{inverse}", cost=20), extra=inverse)


#: what torch makes of these exponents
_POWERS = {
    0.5: Formula("sqrtf({0})", 8),
    2.0: Formula("{0} * {0}"),
    3.0: Formula("{0} * {0} * {0}", 2),
    -0.5: _call("reciprocal_root", "{0}", cost=8),
    -1.0: _call("divide", "1.0f", "{0}", cost=8),
    -2.0: _call("divide", "1.0f", "{0} * {0}", cost=9),
}


def _pow(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    exponent = operands[1]
    special = _POWERS.get(float(exponent)) if isinstance(exponent, (int, float)) else None
    return special or Formula("powf({0}, {1})", 50)


def _div(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    """Torch's CUDA kernels multiply by the reciprocal of a number, too."""
    number = operands[1]
    if isinstance(number, (int, float)) and 2.0**-126 <= abs(number) <= 2.0**126:
        (held,) = struct.unpack("f", struct.pack("f", number))
        return Formula("{0} * {inverse}", extra={"inverse": 1.0 / held})
    return _call("divide", "{0}", "{1}", cost=8)


def _clamp(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    text, cost = "{0}", 0
    for place, number, tensor in ((1, "at_least", "maximum"), (2, "at_most", "minimum")):
        bound = operands[place]
        if bound is not None:
            plain = isinstance(bound, (int, float)) and not math.isnan(bound)
            text, cost = f"fxfuse::pw::{number if plain else tensor}({text}, {{{place}}})", cost + 1
    return Formula(text, cost)


def _addcmul(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    if attributes["value"] == 1:
        return Formula("fmaf({1}, {2}, {0})", 2)
    return Formula("fmaf({value}, {1} * {2}, {0})", 3)


def _addcdiv(attributes: Mapping[str, Any], operands: Sequence[object]) -> Formula:
    if attributes["value"] == 1:
        return Formula("{0} + fxfuse::pw::divide({1}, {2})", 9)
    return Formula("fmaf({value}, fxfuse::pw::divide({1}, {2}), {0})", 10)


#: operator -> its formula, or what makes it of the attributes and the operands as they are given; it raises
#: ValueError where torch would refuse to run
FORMULAS: Mapping[str, Formula | Callable[[Mapping[str, Any], Sequence[object]], Formula]] = {
    "abs": Formula("fabsf({0})"),
    "neg": Formula("-{0}"),
    "sign": _call("sign", "{0}", cost=2),
    "exp": Formula("expf({0})", 10),
    "expm1": Formula("expm1f({0})", 18),
    "log": Formula("logf({0})", 15),
    "log1p": Formula("log1pf({0})", 18),
    "sqrt": Formula("sqrtf({0})", 8),
    "rsqrt": _call("reciprocal_root", "{0}", cost=8),
    "reciprocal": _call("divide", "1.0f", "{0}", cost=8),
    "square": Formula("{0} * {0}"),
    "sin": Formula("sinf({0})", 25),
    "cos": Formula("cosf({0})", 25),
    "erf": Formula("erff({0})", 20),
    "floor": Formula("floorf({0})"),
    "ceil": Formula("ceilf({0})"),
    "round": Formula("rintf({0})"),
    "sigmoid": _call("sigmoid", "{0}", cost=8),
    "tanh": Formula("tanhf({0})", 20),
    "relu": _call("relu", "{0}"),
    "selu": _call("selu", "{0}", cost=20),
    "relu6": _call("clamp", "{0}", "0.0f", "6.0f", cost=2),
    "silu": _call("silu", "{0}", cost=9),
    "mish": _call("mish", "{0}", cost=8),
    "hardswish": _call("hardswish", "{0}", cost=5),
    "hardsigmoid": _call("hardsigmoid", "{0}", cost=4),
    "softsign": _call("softsign", "{0}", cost=10),
    "log_sigmoid": _call("log_sigmoid", "{0}", cost=30),
    "tanhshrink": _call("tanhshrink", "{0}", cost=21),
    "isnan": _call("is_nan", "{0}"),
    "isinf": _call("is_inf", "{0}"),
    "isfinite": _call("is_finite", "{0}"),
    "leaky_relu": _call("leaky_relu", "{0}", "{negative_slope}", cost=2),
    "elu": _call("elu", "{0}", "{alpha}", cost=20),
    "celu": _celu,
    "gelu": _gelu,
    "hardtanh": _call("clamp", "{0}", "{min_val}", "{max_val}", cost=2),
    "hardshrink": _call("hardshrink", "{0}", "{lambd}", cost=3, rounds=True),
    "softshrink": _call("softshrink", "{0}", "{lambd}", cost=4, rounds=True),
    "threshold": _call("threshold", "{0}", "{threshold}", "{value}", rounds=True),
    "softplus": _call("softplus", "{0}", "{beta}", "{threshold}", cost=40),
    "add": Formula("{0} + {1}"),
    "sub": Formula("{0} - {1}"),
    "mul": Formula("{0} * {1}"),
    "div": _div,
    "pow": _pow,
    "minimum": _call("minimum", "{0}", "{1}"),
    "maximum": _call("maximum", "{0}", "{1}"),
    **{op: Formula(f"{{0}} {sign} {{1}}") for op, sign in COMPARISONS.items()},
    "clamp": _clamp,
    "exp_below": _call("exponential", "{0} - {1}", cost=4),
    "prelu": _call("prelu", "{0}", "{1}", cost=2),
    "where": Formula("{0} ? {1} : {2}"),
    "masked_fill": Formula("{1} ? {2} : {0}"),
    "lerp": _call("lerp", "{0}", "{1}", "{2}", cost=6),
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
}

#: the size up to which a number is small: 1, and what rounding to bfloat16 makes of a little more
SMALL_NUMBER = 1.0 + 2.0**-7
#: cheaper formulas, of a first operand that is a small number
OF_SMALL: Mapping[str, Formula] = {
    "sigmoid": _call("sigmoid_of_small", "{0}", cost=5),
    "silu": _call("silu_of_small", "{0}", cost=6),
    "tanh": _call("tanh_of_small", "{0}", cost=8),
}
