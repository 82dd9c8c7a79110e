"""What test_expression.py runs: for every pointwise operator, some lines of a program."""

from __future__ import annotations

import dataclasses

from fxfuse import vocabulary


@dataclasses.dataclass(frozen=True)
class Case:
    """``ulps``: of the true value, 0 for bits as in torch. ``near``: besides, ulps of the largest operand."""

    lines: str
    ulps: float = 4
    near: float = 0  # where terms cancel


def calls(op: str, *arguments: str, near: float = 0) -> list[Case]:
    return [Case(f"r = {op}({a})", near=near) for a in arguments]


OTHERS = (
    *("a", "b", "ch", "ch5", "row", "one", "s", "plane", "wide", "half", "brain", "hs", "bs", "double_", "m", "ni32"),
    *("y", "0.1", "-2", "True", "1e-3"),
)
BINARY = ("add", "mul", "div", "minimum", "maximum", "eq", "ne", "lt", "le", "gt", "ge")
BOUNDS = (
    *("0, None", "None, 0.3", "-1, 1", "1, -1", "nan, None", "0.0, nan", "-inf, inf"),
    *("a, None", "None, ch", "b, ch5", "0.1, a", "half, None"),
)
EXPONENTS = ("0.5", "2", "3", "-0.5", "-1", "-2", "0", "1", "2.5", "-3", "4.0", "True", "a", "row")

CASES: dict[str, list[Case]] = {
    **{op: calls(op, "y") for op in sorted(vocabulary.pointwise.UNARY)},
    **{op: calls(op, *(f"y, {o}" for o in OTHERS), "a, y", "0.7, y", "3, y") for op in BINARY},
    "tanhshrink": calls("tanhshrink", "y", near=2),
    "sub": calls("sub", "y, a", "y, ch", "0.1, y", "y, 0.1", "brain, y", "y, half"),
    "leaky_relu": calls("leaky_relu", *(f"y, negative_slope={s}" for s in ("0.2", "0", "-1.5"))),
    "elu": calls("elu", *(f"y, alpha={a}" for a in ("1.0", "0.7", "-2"))),
    "celu": calls("celu", *(f"y, alpha={a}" for a in ("1.0", "0.7", "-2"))),
    "gelu": calls("gelu", "y, approximate='none'", "y, approximate='tanh'", near=2),
    "hardtanh": calls("hardtanh", "y, min_val=-1, max_val=1", "y, min_val=0.1, max_val=0.3"),
    "hardshrink": calls("hardshrink", "y, lambd=0.5", "y, lambd=0"),
    "softshrink": calls("softshrink", "y, lambd=0.5", "y, lambd=0"),
    "threshold": calls(
        "threshold", "y, threshold=0.5, value=0.1", "y, threshold=-3, value=nan", "y, threshold=0, value=-0.0"
    ),
    "softplus": calls("softplus", "y, beta=1, threshold=20", "y, beta=0.5, threshold=1.5", "y, beta=-2.0, threshold=3"),
    "clone": calls("clone", "y"),
    "contiguous": calls("contiguous", "y"),
    "detach": calls("detach", "y"),
    "cast": [Case(f"r = cast(y, dtype={d})", 0) for d in ("f16", "bf16", "f32", "f64", "b1")],
    "pow": calls("pow", *(f"y, {e}" for e in EXPONENTS), "2, y", "0.25, y", "1, y", "p, y"),
    "logical_and": calls("logical_and", "y, a", "y, m", "ni32, y"),
    "logical_or": calls("logical_or", "y, a", "m, y", "y, mw"),
    "clamp": calls("clamp", *(f"y, {b}" for b in BOUNDS)),
    # what is rounded is the exponent: half a unit of -88 at most
    "exp_below": [Case(f"q = maximum(y, {o}); r = exp_below(y, q)", 100) for o in ("a", "ch", "one", "half")],
    "prelu": calls("prelu", "y, weight", "y, one"),
    "where": calls(
        "where",
        *("m, y, a", "mw, y, 0.1", "m, 2, y", "m, nan, y", "m, y, -inf", "m, y, half", "m, y, ni64"),
    ),
    "masked_fill": calls("masked_fill", "y, m, 0.1", "y, mw, s", "y, m, -inf", "y, m, 3"),
    "lerp": calls("lerp", "y, b, 0.3", "y, b, 0.5", "b, y, -2", "b, p, y", "y, wide, plane", near=4),
    "addcmul": calls("addcmul", "y, b, ch, value=1", "b, p, y, value=-2", near=4),
    "addcdiv": calls("addcdiv", "y, b, p, value=1", "y, row, ch, value=-2", near=8),
}
#: operators among others: integers, bools, casts in the middle
MORE: dict[str, list[Case]] = {
    "cast": [
        *(
            Case(f"k = clamp(b, -120, 120); q = cast(k, dtype={d}); k2 = mul(q, ch); r = add(k2, y)", 2, 2)
            for d in ("i8", "i16", "i32", "i64")
        ),
        *(Case(f"k = clamp(b, 0, 120); q = cast(k, dtype={d}); r = mul(q, y)", 0) for d in ("u8", "u16", "u32")),
        Case("q = isnan(y); k = where(q, 0, y); k2 = clamp(k, -120, 120); r = cast(k2, dtype=i16)", 0),
        Case("k = where(m, half, brain); q = cast(k, dtype=bf16); k2 = cast(q, dtype=f16); r = add(k2, y)", 1),
    ],
    "where": [Case("q = gt(y, a); r = where(q, y, a)"), Case("q = where(m, 1, ni8); r = add(q, y)")],
    "eq": [
        Case(f"q = eq({i}, 7); r = where(q, y, 0.5)")
        for i in ("ni8", "ni16", "ni32", "ni64", "nu8", "nu16", "nu32", "m")
    ],
    "lt": [
        Case("q = lt(ni64, ni8); r = masked_fill(y, q, 0.5)"),
        Case("q = lt(ni32, 0.5); r = masked_fill(y, q, 0.5)"),
    ],
    "maximum": [Case("q = maximum(ni32, 3); r = mul(q, y)"), Case("q = maximum(m, mw); r = mul(q, y)")],
    "minimum": [Case("q = minimum(ni64, nu8); r = mul(q, y)"), Case("q = minimum(m, mw); r = mul(q, y)")],
    "logical_not": [Case("q = logical_not(m); r = mul(q, y)"), Case("q = lt(y, a); r = logical_not(q)")],
    "ne": [Case("q = ne(y, y); r = masked_fill(y, q, 0.25)")],
    "isnan": [
        Case("q = isnan(ni32); r = masked_fill(y, q, 0.25)"),
        Case("q = isnan(half); r = masked_fill(y, q, 1)"),
    ],
    # torch has float32's sigmoid of -97 as 0; times 3e38 it is not
    "sigmoid": [Case("q = sigmoid(ni32); r = mul(q, y)", near=1), Case("q = sigmoid(m); r = mul(q, y)", 8)],
    "addcmul": [Case("k = clamp(y, -1e30, 1e30); r = addcmul(b, k, ch, value=0.3)", 4, 4)],
    "addcdiv": [Case("k = clamp(y, -1e30, 1e30); r = addcdiv(b, k, p, value=0.3)", 4, 4)],
}
ALL = [(op, case) for op in CASES for case in CASES[op] + MORE.get(op, [])]
