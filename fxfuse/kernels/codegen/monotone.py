"""Pointwise operators that are monotone in the value that a pool looks at.

For a chain f of them the maximum of f over a window is f of the window's largest or of its smallest value, whichever is
larger: two numbers per window go through f, and no others. That holds for every number, as these operators round
monotonously, too (functions that are approximated: but for an error of theirs), and for NaN, which spreads. It does
not hold where f makes a NaN of a number between both: zero times Inf, zero divided by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fxfuse.instr import Instr
from fxfuse.kernels.codegen.arithmetic import Given, Value

#: of one operand, whatever their attributes
_ALWAYS = (
    "clone", "contiguous", "detach", "neg", "relu", "relu6", "hardtanh", "sigmoid", "tanh", "selu", "hardsigmoid",
    "exp", "expm1", "erf", "floor", "ceil", "round",
)  # fmt: skip
#: those that are so for attributes that are not negative
_FOR_ATTRIBUTE = {"leaky_relu": "negative_slope", "elu": "alpha"}
#: those of two operands that are so in either, whatever the other one is
_EITHER = ("add", "sub", "maximum", "minimum")


def condition(instr: Instr, position: int, operands: Sequence[Given]) -> str | None:
    """What has to hold of the other operands so that ``instr`` is monotone in the one at ``position``: C++, or "" where
    nothing has to. None where it is not monotone.
    """
    if instr.op in _ALWAYS or instr.op in _EITHER:
        return ""
    if instr.op in _FOR_ATTRIBUTE:
        return "" if dict(instr.attributes)[_FOR_ATTRIBUTE[instr.op]] >= 0 else None
    if instr.op == "clamp":
        return "" if position == 0 else None
    if instr.op == "mul":
        return _holds(operands[1 - position], "fxfuse::pw::is_finite({})", math.isfinite)
    if instr.op == "div" and position == 0:
        return _holds(operands[1], "{} != 0.0f", bool)
    return None


def _holds(operand: Given, text: str, known: Callable[[float], bool]) -> str | None:
    if isinstance(operand, Value):
        return text.format(operand.code) if operand.dtype.is_floating_point else None
    return "" if operand is not None and known(operand) else None
