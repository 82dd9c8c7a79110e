"""Pointwise operators that follow one another."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fxfuse.chain import Builder, attributes, dtype, op_name, operands
from fxfuse.patterns.placement import WIDE, number_refusal, ordinary, source
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule, X

_ARITHMETIC = ("mul", "div", "add", "sub", "scale_weight")
_CLAMPS = ("relu", "relu6", "hardtanh", "clamp")


class MergeClamps(Rule):
    """clamp(clamp(x; a, b); c, d) = clamp(x; max(a, c), min(max(b, c), d)), also relu, relu6 and hardtanh

    clamp(x; a, b) = min(max(x, a), b), and max(min(u, b), c) = min(max(u, c), max(b, c)). So relu of relu
    is relu. NaN stays NaN. At a bound itself the clamps of torch differ in their gradient.
    """

    legality = Legality.BITWISE
    forward_only = True
    pattern = P(_CLAMPS, P(_CLAMPS, name="inner"), name="outer")

    def check(self, match: Match) -> Reject | None:
        for node in (match["inner"], match["outer"]):
            if any(isinstance(o, fx.Node) for o in operands(node)[1:]):
                return Reject("a bound is a tensor", node)
            if dtype(node) is not dtype(operands(node)[0]) or not dtype(node).is_floating_point:
                return Reject("the clamp changes the dtype, or is one of integers", node)
            if any(math.isnan(b) for b in _bounds(node)):
                return Reject("a bound is NaN", node)
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        x: fx.Node = operands(match["inner"])[0]
        (a, b), (c, d) = _bounds(match["inner"]), _bounds(match["outer"])
        low, high = max(a, c), min(max(b, c), d)
        if (low, high) == (0, math.inf):
            return build.call("relu", x)
        if (low, high) == (-math.inf, math.inf):
            return x
        return build.call("clamp", x, None if low == -math.inf else low, None if high == math.inf else high)


def _bounds(node: fx.Node) -> tuple[float, float]:
    """The numbers between which a clamp keeps its result."""
    given: tuple[Any, Any] = {
        "relu": lambda: (0.0, None),
        "relu6": lambda: (0.0, 6.0),
        "hardtanh": lambda: (attributes(node)["min_val"], attributes(node)["max_val"]),
        "clamp": lambda: operands(node)[1:],
    }[str(op_name(node))]()
    low, high = given
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


class MergeNumbers(Rule):
    """(x * a) * b = x * (a*b) and (x + a) + b = x + (a + b) for numbers a and b

    Also / and -, and the scaling of weights. Shifts of opposite sign are left alone: they may be there
    to round.
    """

    legality = Legality.REASSOCIATING
    pattern = P(_ARITHMETIC, P(_ARITHMETIC, name="inner"), X, commutative=True)

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None or _kind(root) is None or _kind(root) != _kind(match["inner"]):
            return None
        return match

    def check(self, match: Match) -> Reject | None:
        inner, root = match["inner"], match.root
        if dtype(root) not in WIDE or dtype(_value(inner)) is not dtype(root) or dtype(inner) is not dtype(root):
            return Reject(f"{dtype(_value(inner))} to {dtype(root)}: only float32 and float64 are merged")
        refusal = number_refusal(inner) or number_refusal(root)
        if refusal is not None:
            return refusal
        one, two = _number(inner), _number(root)
        if _kind(root) == "add" and one * two < 0:
            return Reject("shifts of opposite sign may be there to round")
        both = one + two if _kind(root) == "add" else one * two
        underflow = _kind(root) != "add" and both == 0 and 0 not in (one, two)
        if underflow or not ordinary(both, str(_kind(root)), dtype(root)):
            return Reject(f"{both} leaves the range of {dtype(root)}")
        if source(root) is not None:
            return Reject("both fold into the convolution's weights instead")
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        inner, root = match["inner"], match.root
        x, one, two = _value(inner), _number(inner), _number(root)
        if _kind(root) == "add":
            return build.call("add", x, one + two)
        if one * two == 1:
            return x
        if op_name(root) == "scale_weight":
            return build.call("scale_weight", x, one * two, **attributes(root))
        return build.call("mul", x, one * two)


def _kind(node: fx.Node) -> str | None:
    """ "mul" or "add" for arithmetic of one value with one number, "scale" for weights; None for all else."""
    if op_name(node) is None or sum(isinstance(o, fx.Node) for o in operands(node)) != 1 or len(operands(node)) != 2:
        return None
    if op_name(node) in ("sub", "div") and not isinstance(operands(node)[0], fx.Node):
        return None
    return {"mul": "mul", "div": "mul", "add": "add", "sub": "add", "scale_weight": "scale"}.get(str(op_name(node)))


def _value(node: fx.Node) -> fx.Node:
    (value,) = (o for o in operands(node) if isinstance(o, fx.Node))
    return value


def _number(node: fx.Node) -> float:
    """What a node adds, or what it multiplies with."""
    number: float
    (number,) = (o for o in operands(node) if not isinstance(o, fx.Node))
    if op_name(node) == "sub":
        return -number
    return 1.0 / number if op_name(node) == "div" else number
