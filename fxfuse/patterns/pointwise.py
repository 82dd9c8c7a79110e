"""Pointwise operators that follow one another."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from fxfuse.chain import Builder, attributes, dtype, op_name, op_of, operands
from fxfuse.patterns.placement import (
    WIDE,
    copies,
    foldable,
    moved_behind,
    number_refusal,
    ordinary,
    source,
    weight_refusal,
)
from fxfuse.patterns.rule import Legality, Match, P, Pat, Reject, Rule, X

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
        return _clamp_refusal(match["inner"]) or _clamp_refusal(match["outer"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        x: fx.Node = operands(match["inner"])[0]
        (a, b), (c, d) = _bounds(match["inner"]), _bounds(match["outer"])
        return _clamp(build, x, max(a, c), min(max(b, c), d))


def _clamp_refusal(node: fx.Node) -> Reject | None:
    """Why a clamp does not keep numbers between two others; None where it does."""
    if any(isinstance(o, fx.Node) for o in operands(node)[1:]):
        return Reject("a bound is a tensor", node)
    if dtype(node) is not dtype(operands(node)[0]) or not dtype(node).is_floating_point:
        return Reject("the clamp changes the dtype, or is one of integers", node)
    if any(math.isnan(b) for b in _bounds(node)):
        return Reject("a bound is NaN", node)
    return None


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


def _clamp(build: Builder, x: fx.Node, low: float, high: float) -> fx.Node:
    """``x`` between two numbers, where the upper one wins, by the shortest operator."""
    low = min(low, high)
    if (low, high) == (0, math.inf):
        return build.call("relu", x)
    if (low, high) == (-math.inf, math.inf):
        return x
    return build.call("clamp", x, None if low == -math.inf else low, None if high == math.inf else high)


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
        refusal = _merge_refusal(match["inner"], match.root)
        if refusal is None and source(match.root) is not None:
            return Reject("both fold into the convolution's weights instead")
        return refusal

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


def _merge_refusal(inner: fx.Node, root: fx.Node) -> Reject | None:
    """Why the numbers of two operators of one kind, ``root`` the later one, do not merge; None where they do."""
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
    return None


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


class MoveScaleBeforeClamp(Rule):
    """clamp(conv(x); a, b) * s = clamp(conv(x) * s; a*s, b*s) for a number s, also relu, relu6, hardtanh, leaky_relu

    Also / s. The scale then folds into the convolution's weights. s < 0 swaps the bounds, and leaves no
    leaky_relu. A scale that moves behind a mean or a pool is left to do so. At a bound itself the clamps
    of torch differ in their gradient.
    """

    legality = Legality.REASSOCIATING
    forward_only = True
    pattern = P(
        ("mul", "div"),
        P((*_CLAMPS, "leaky_relu"), P("conv_transpose", name="conv"), name="clamp"),
        Pat(name="other"),
        commutative=True,
    )

    def check(self, match: Match) -> Reject | None:
        conv, clamp, root = match["conv"], match["clamp"], match.root
        refusal = foldable(conv) or _factor_refusal(root, clamp)
        if refusal is None:
            refusal = _slope_refusal(clamp, root) if op_name(clamp) == "leaky_relu" else _bound_refusal(clamp, root)
        return refusal or weight_refusal(conv) or self._goes_elsewhere(root, clamp)

    @staticmethod
    def _goes_elsewhere(root: fx.Node, clamp: fx.Node) -> Reject | None:
        reader = _reader(root)
        if reader is not None and _kind(reader) == "mul" and _merge_refusal(root, reader) is None:
            return Reject("it merges with the next factor first", reader)
        reduce = moved_behind(root, clamp)
        if reduce is None or (op_name(reduce) == "max_pool" and _number(root) < 0):
            return None
        return Reject(f"it moves behind the {op_name(reduce)} instead", reduce)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        clamp, root, conv = match["clamp"], match.root, match["conv"]
        scaled = build.call(op_of(root).name, *(conv if o is clamp else o for o in operands(root)))
        if op_name(clamp) == "leaky_relu":
            return build.call("leaky_relu", scaled, **attributes(clamp))
        return _clamp(build, scaled, *_scaled_bounds(clamp, root))


def _factor_refusal(root: fx.Node, value: fx.Node) -> Reject | None:
    """Why ``root`` is not ``value`` times or divided by an ordinary number other than zero; None where it is."""
    if op_name(root) == "div" and operands(root)[0] is not value:
        return Reject("the clamp is the divisor", root)
    if _kind(root) is None:
        return Reject("the factor is a tensor, whose sign is not known before the call", root)
    if dtype(root) is not dtype(value):
        return Reject("the factor changes the dtype", root)
    refusal = number_refusal(root)
    if refusal is None and _number(root) == 0:
        return Reject("the factor is zero", root)
    return refusal


def _slope_refusal(clamp: fx.Node, root: fx.Node) -> Reject | None:
    if _number(root) < 0:
        return Reject(f"a factor of {_number(root)} turns leaky_relu upside down", root)
    if not math.isfinite(attributes(clamp)["negative_slope"]):
        return Reject("the slope is not finite", clamp)
    return None


def _bound_refusal(clamp: fx.Node, root: fx.Node) -> Reject | None:
    refusal = _clamp_refusal(clamp)
    if refusal is not None:
        return refusal
    for bound in _bounds(clamp):
        scaled = _scaled(bound, root)
        if math.isinf(bound) or bound == 0:
            continue
        if scaled == 0 or not all(ordinary(b, "mul", dtype(root)) for b in (bound, scaled)):
            return Reject(f"a bound of {bound:g}, or of {scaled:g}, leaves the range of {dtype(root)}", clamp)
    return None


def _scaled(bound: float, root: fx.Node) -> float:
    """What ``root``, which multiplies with a number or divides by one, makes of ``bound``; zero without a sign."""
    return (bound / operands(root)[1] if op_name(root) == "div" else bound * _number(root)) + 0.0


def _scaled_bounds(clamp: fx.Node, root: fx.Node) -> tuple[float, float]:
    """Between which numbers a clamp lies behind the factor ``root``: its upper bound wins where its bounds cross."""
    low, high = _bounds(clamp)
    one, two = _scaled(min(low, high), root), _scaled(high, root)
    return min(one, two), max(one, two)


def _reader(node: fx.Node) -> fx.Node | None:
    """The only operator that reads a value, through copies; None where there are several."""
    while len(node.users) == 1:
        (node,) = node.users
        if not copies(node):
            return node
    return None
