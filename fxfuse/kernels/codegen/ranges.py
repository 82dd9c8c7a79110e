"""Between which bounds the values of a program lie, as far as their operators say so.

Some formulas are good for small arguments only: this says which arguments are small. NaN is in every range. Bounds
hold for what kernels compute, and not for real numbers alone: rounding to float32 and to the value's dtype moves them
outward; functions that are approximated, and means, have some room on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fxfuse.instr import Instr, Operand, Ref, TensorType
from fxfuse.kernels.codegen.arithmetic import held
from fxfuse.program import Program


class Range(NamedTuple):
    low: float
    high: float

    def within(self, size: float) -> bool:
        """Whether no number in it is larger than ``size``, whatever its sign."""
        return max(-self.low, self.high) <= size


ALL = Range(-math.inf, math.inf)
#: what an approximated function may exceed its bounds by, some units in the last place
APPROXIMATE = 2.0**-20
_UNIT, _SIGNED = Range(0.0, 1.0 + APPROXIMATE), Range(-1.0 - APPROXIMATE, 1.0 + APPROXIMATE)
_ZERO, _SIX, _BOOL = Range(0.0, 0.0), Range(6.0, 6.0), Range(0.0, 1.0)


def ranges_of(program: Program, types: Mapping[str, TensorType]) -> dict[str, Range]:
    """The range of every value of ``program``, whose ``types`` are known with their sizes."""
    found = {name: _of_dtype(kind.dtype) for name, kind in types.items()}
    for instr in program.body:
        rule = _RULES.get(instr.op)
        if rule is None or len(instr.outs) > 1:
            continue
        (out,) = instr.outs
        dtype = types[out].dtype
        if not dtype.is_floating_point:
            continue  # integers wrap around
        operands = [_number(o, dtype) if not isinstance(o, Ref) else found[o.name] for o in instr.operands]
        found[out] = _rounded(rule(_Given(instr, operands, types)), dtype)
    return found


class _Given(NamedTuple):
    """What a rule looks at: an instruction, and the ranges of its operands."""

    instr: Instr
    operands: Sequence[Range]
    types: Mapping[str, TensorType]

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self.instr.attributes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first operand, which is a tensor."""
        first = self.instr.operands[0]
        assert isinstance(first, Ref)
        return tuple(s or 0 for s in self.types[first.name].shape)


def _of_dtype(dtype: torch.dtype) -> Range:
    return _BOOL if dtype is torch.bool else ALL


def _number(number: Operand, dtype: torch.dtype) -> Range:
    """A number, which operators round to float32 or to ``dtype``; ALL for an operand that is absent."""
    if number is None or isinstance(number, Ref) or math.isnan(number):
        return ALL
    ways = held(number, torch.float32), held(number, dtype)
    return Range(min(ways), max(ways))


def _rounded(exact: Range, dtype: torch.dtype) -> Range:
    """Where values in ``exact`` lie, rounded to float32, to ``dtype``, or not at all, as in a multiply-add.

    Rounding is monotone. That float64 has rounded the bounds before changes nothing: it has twice as many bits.
    """
    if math.isnan(exact.low) or math.isnan(exact.high):
        return ALL  # Inf less Inf
    low, high = ([bound, held(bound, torch.float32), held(bound, dtype)] for bound in exact)
    return Range(min(low), max(high))


# --- one operand ----------------------------------------------------------------------------------
_Rule = Callable[[_Given], Range]


def _always(found: Range) -> _Rule:
    return lambda given: found


def _same(given: _Given) -> Range:
    return given.operands[0]


def _relu(given: _Given) -> Range:
    return _maximum(given.operands[0], _ZERO)


def _relu6(given: _Given) -> Range:
    return _minimum(_relu(given), _SIX)


def _hardtanh(given: _Given) -> Range:
    low, high = (_number(given.attributes[k], torch.float32) for k in ("min_val", "max_val"))
    return _minimum(_maximum(given.operands[0], low), high)


def _clamp(given: _Given) -> Range:
    x, low, high = given.operands
    x = x if given.instr.operands[1] is None else _maximum(x, low)
    return x if given.instr.operands[2] is None else _minimum(x, high)


def _neg(given: _Given) -> Range:
    (x,) = given.operands
    return Range(-x.high, -x.low)


def _abs(given: _Given) -> Range:
    (x,) = given.operands
    return Range(max(x.low, -x.high, 0.0), max(-x.low, x.high))


def _square(given: _Given) -> Range:
    return _times(_abs(given), _abs(given))


def _exp(given: _Given) -> Range:
    high = given.operands[0].high
    return Range(0.0, math.exp(high) * (1.0 + APPROXIMATE) if high < 80.0 else math.inf)


# --- several operands -----------------------------------------------------------------------------
def _add(given: _Given) -> Range:
    a, b = given.operands
    return Range(a.low + b.low, a.high + b.high)


def _sub(given: _Given) -> Range:
    a, b = given.operands
    return Range(a.low - b.high, a.high - b.low)


def _times(a: Range, b: Range) -> Range:
    corners = [x * y if x and y else 0.0 for x in a for y in b]  # zero times Inf is NaN, which is in every range
    return Range(min(corners), max(corners))


def _mul(given: _Given) -> Range:
    return _times(*given.operands)


def _div(given: _Given) -> Range:
    a, b = given.operands
    if b.low <= 0.0 <= b.high or math.inf in (b.high, -b.low):
        return ALL
    corners = [x / y for x in a for y in b]
    return Range(min(corners), max(corners))


def _maximum(a: Range, b: Range) -> Range:
    return Range(max(a.low, b.low), max(a.high, b.high))


def _minimum(a: Range, b: Range) -> Range:
    return Range(min(a.low, b.low), min(a.high, b.high))


def _either(a: Range, b: Range) -> Range:
    return Range(min(a.low, b.low), max(a.high, b.high))


# --- pools and reductions -------------------------------------------------------------------------
def _max_pool(given: _Given) -> Range:
    """A window may lie in the padding altogether, which is -Inf, where it is dilated or the padding is wide."""
    kernel, padding, dilation = (given.attributes[k] for k in ("kernel", "padding", "dilation"))
    inside = not any(padding) or all(d == 1 and 2 * p <= k for k, p, d in zip(kernel, padding, dilation, strict=True))
    return given.operands[0] if inside else Range(-math.inf, given.operands[0].high)


def _averaged(x: Range, count: int) -> Range:
    """Of the sum of ``count`` numbers over their count: every addition may round it away from zero."""
    room = max(-x.low, x.high) * (count + 4) * 2.0**-23
    return Range(max(x.low - room, 0.0) if x.low >= 0.0 else x.low - room, x.high + room)


def _mean(given: _Given) -> Range:
    return _averaged(given.operands[0], math.prod(given.shape[d] for d in given.attributes["dims"]))


def _avg_pool(given: _Given) -> Range:
    """Zeros in the padding take part."""
    if given.attributes["divisor_override"]:
        return ALL
    return _averaged(_either(given.operands[0], _ZERO), math.prod(given.attributes["kernel"]))


def _adaptive_avg_pool(given: _Given) -> Range:
    sizes = given.attributes["size"]
    lengths = given.shape[len(given.shape) - len(sizes) :]
    most = math.prod(length // (size or length) + 2 for length, size in zip(lengths, sizes, strict=True))
    return _averaged(given.operands[0], most)


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("softmax", "sigmoid", "hardsigmoid"), _always(_UNIT)),
    **dict.fromkeys(("tanh", "sin", "cos", "erf", "softsign", "sign"), _always(_SIGNED)),
    **dict.fromkeys(("clone", "contiguous", "detach", "cast", "reshape", "permute"), _same),
    **dict.fromkeys(("amax", "amin", "max", "min", "adaptive_max_pool"), _same),
    "relu": _relu,
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "neg": _neg,
    "abs": _abs,
    "square": _square,
    "exp": _exp,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "maximum": lambda given: _maximum(*given.operands),
    "minimum": lambda given: _minimum(*given.operands),
    "where": lambda given: _either(*given.operands[1:]),
    "masked_fill": lambda given: _either(given.operands[0], given.operands[2]),
    "max_pool": _max_pool,
    "mean": _mean,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
}
