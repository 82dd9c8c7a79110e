"""Clamps of clamps, and numbers that meet numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    INF,
    agree,
    conv,
    data,
    gradients,
    max_pool,
    program,
    rewrite,
    salted,
    same_gradients,
    same_special,
)
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.patterns import DEFAULT_RULES, MergeClamps, MergeNumbers, MoveMonotoneBehindMaxPool

CLAMPS, NUMBERS = MergeClamps(), MergeNumbers()


def test_the_rules_are_those_that_optimize_applies() -> None:
    assert {MergeClamps, MergeNumbers} <= {type(r) for r in DEFAULT_RULES}
    assert MergeClamps.legality.value == "bitwise" and MergeNumbers.legality.value == "reassociating"
    assert not MergeNumbers.forward_only


# --- clamps ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (["relu({})", "relu({})"], "v0 = relu(x0)\nv0"),
        (["relu({})", "relu({})", "relu({})"], "v0 = relu(x0)\nv0"),
        (["clamp({}, -1, 1)", "relu({})"], "v0 = clamp(x0, 0.0, 1.0)\nv0"),
        (["relu6({})", "hardtanh({}, min_val=-1.0, max_val=1.0)"], "v0 = clamp(x0, 0.0, 1.0)\nv0"),
        (["clamp({}, None, 2)", "clamp({}, -3, None)"], "v0 = clamp(x0, -3.0, 2.0)\nv0"),
        (["clamp({}, None, -2)", "relu({})"], "v0 = clamp(x0, 0.0, 0.0)\nv0"),
        (["clamp({}, -1, None)", "relu({})"], "v0 = relu(x0)\nv0"),
        (["clamp({}, -inf, inf)", "clamp({}, -inf, None)"], "x0"),
    ],
)
def test_what_merged_clamps_leave(maps: list[str], expected: str) -> None:
    lines = [f"m{i + 1} = {m.format(f'm{i}')}" for i, m in enumerate(maps)]
    result = rewrite(program("m0: f64[40]", "\n".join([*lines, f"m{len(maps)}"])), [CLAMPS])
    assert result.text == expected and result.rules == ["MergeClamps"] * (len(maps) - 1)
    agree(result, bitwise=True)


bounds = st.one_of(st.none(), st.integers(-3, 3), st.sampled_from([-INF, INF, 0.5, -1.25]))
clamps = st.one_of(
    st.sampled_from(["relu({})", "relu6({})"]),
    st.tuples(bounds, bounds).filter(lambda b: b != (None, None)).map(lambda b: f"clamp({{}}, {b[0]}, {b[1]})"),
    st.tuples(st.integers(-3, 3), st.integers(0, 3)).map(
        lambda b: f"hardtanh({{}}, min_val={float(b[0])}, max_val={float(b[0] + b[1])})"
    ),
)


@given(st.lists(clamps, min_size=2, max_size=4), st.sampled_from(["f64", "f32", "f16"]))
def test_merged_clamps_of_any_bounds(maps: list[str], dtype: str) -> None:
    lines = [f"m{i + 1} = {m.format(f'm{i}')}" for i, m in enumerate(maps)]
    source = program(f"m0: {dtype}[60]", "\n".join([*lines, f"m{len(maps)}"]))
    result = rewrite(source, [CLAMPS])
    assert result.rules == ["MergeClamps"] * (len(maps) - 1)
    x = torch.cat([torch.arange(-4, 4, 0.25), torch.randn(28) * 3]).to(source.inputs[0][1].dtype)
    x = salted(x, 0)
    (before,), (after,) = source.run([x]), result.rewritten.run([x])
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        ("x: f64[4], t: f64[4]", "a = clamp(x, t, None)\nr = relu(a)\nr", "a bound is a tensor"),
        ("x: f64[4], t: f64[4]", "a = relu(x)\nr = clamp(a, None, t)\nr", "a bound is a tensor"),
        ("x: f64[4]", "a = clamp(x, nan, 1.0)\nr = relu(a)\nr", "a bound is NaN"),
        ("x: i64[4]", "a = clamp(x, 1, 3)\nr = relu(a)\nr", "the clamp changes the dtype, or is one of integers"),
        ("x: f64[4]", "a = clamp(x, 1, 3)\nr = relu(a)\nr, a", "the value of clamp is also used elsewhere"),
    ],
)
def test_clamps_that_do_not_merge(inputs: str, body: str, reason: str) -> None:
    assert rewrite(program(inputs, body), [CLAMPS]).reason("MergeClamps") == reason


def test_merged_clamps_differ_in_the_gradient_at_a_bound() -> None:
    result = rewrite(program("x: f64[1]", "a = clamp(x, -1, 1)\nr = relu(a)\nr"), [CLAMPS])
    x = torch.zeros(1, dtype=torch.float64)
    (before,), (after,) = (gradients(p, [x], [True]) for p in (result.original, result.rewritten))
    assert before.item() == 0 and after.item() == 0.5 and MergeClamps.forward_only


# --- numbers --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (["mul({}, 2.0)", "mul(3.0, {})"], "v0 = mul(x0, 6.0)\nv0"),
        (["div({}, 4.0)", "mul({}, -3)"], "v0 = mul(x0, -0.75)\nv0"),
        (["mul({}, 2)", "div({}, 8)"], "v0 = mul(x0, 0.25)\nv0"),
        (["mul({}, 2.0)", "mul({}, 0.5)"], "x0"),
        (["mul({}, 0.0)", "mul({}, 5.0)"], "v0 = mul(x0, 0.0)\nv0"),
        (["add({}, 1)", "add(2, {})"], "v0 = add(x0, 3)\nv0"),
        (["sub({}, 1.5)", "sub({}, 2)"], "v0 = add(x0, -3.5)\nv0"),
        (["add({}, 0.0)", "add({}, 2.0)", "add({}, 1.0)"], "v0 = add(x0, 3.0)\nv0"),
    ],
)
def test_what_merged_numbers_leave(maps: list[str], expected: str) -> None:
    lines = [f"m{i + 1} = {m.format(f'm{i}')}" for i, m in enumerate(maps)]
    for dtype in ("f64", "f32"):
        result = rewrite(program(f"m0: {dtype}[40]", "\n".join([*lines, f"m{len(maps)}"])), [NUMBERS])
        assert result.text == expected
        agree(result)


def test_the_scales_of_a_weight_merge() -> None:
    body = "a = scale_weight(w, 2.0, groups=1)\nr = scale_weight(a, -1.0, groups=1)\nr"
    result = rewrite(program("w: f64[2, 3, 3]", body), [NUMBERS])
    assert result.text == "v0 = scale_weight(x0, -2.0, groups=1)\nv0"
    agree(result)


numbers = st.one_of(st.integers(-4, 4), st.floats(-8, 8).map(lambda v: round(v, 3)), st.just(0.0))
steps = st.tuples(st.sampled_from(["mul({0}, {1})", "div({0}, {1})", "add({0}, {1})", "sub({0}, {1})"]), numbers)


@given(st.lists(steps, min_size=2, max_size=4))
def test_merged_numbers_of_any_chain(chain: list[tuple[str, float]]) -> None:
    lines = [f"m{i + 1} = {m.format(f'm{i}', n)}" for i, (m, n) in enumerate(chain)]
    source = program("m0: f64[60]", "\n".join([*lines, f"m{len(chain)}"]))
    result = rewrite(source, [NUMBERS])
    x = torch.linspace(-5, 5, 60, dtype=torch.float64)
    if all(n != 0 for m, n in chain if m.startswith("div")):
        agree(result, [x])
        same_gradients(result, [x])
    same_special(result, [salted(x, 0)])


@pytest.mark.parametrize(
    ("dtype", "one", "two", "reason"),
    [
        ("f64", "add(x, 8e14)", "sub(a, 8e14)", "shifts of opposite sign may be there to round"),
        ("f64", "add(x, 1.0)", "add(a, 8e15)", "a shift of 8000000000000000.0 may be there to round to whole numbers"),
        ("f64", "mul(x, 1e-200)", "mul(a, 1e-200)", "0.0 leaves the range of torch.float64"),
        ("f32", "mul(x, 1e-30)", "mul(a, 1e-30)", "1.0000000000000001e-60 leaves the range of torch.float32"),
        ("f32", "mul(x, 1e30)", "mul(a, 1e30)", "1.0000000000000001e+60 leaves the range of torch.float32"),
        ("f64", "mul(x, inf)", "mul(a, 2.0)", "mul with inf leaves the range of torch.float64"),
        ("f64", "mul(x, 2.0)", "div(a, 0)", "div with 0 leaves the range of torch.float64"),
        ("f64", "add(x, nan)", "add(a, 2.0)", "add with nan leaves the range of torch.float64"),
        ("f16", "mul(x, 2.0)", "mul(a, 2.0)", "torch.float16 to torch.float16: only float32 and float64 are merged"),
        ("i64", "mul(x, 2)", "mul(a, 0.5)", "torch.int64 to torch.float32: only float32 and float64 are merged"),
    ],
)
def test_numbers_that_do_not_merge(dtype: str, one: str, two: str, reason: str) -> None:
    result = rewrite(program(f"x: {dtype}[4]", f"a = {one}\nr = {two}\nr"), [NUMBERS])
    assert result.reason("MergeNumbers") == reason


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("mul(x, 2.0)", "add(a, 2.0)"),
        ("mul(x, t)", "mul(a, 2.0)"),
        ("sub(1.0, x)", "add(a, 2.0)"),
        ("add(x, x)", "add(a, 1.0)"),
    ],
)
def test_arithmetic_of_other_kinds_is_no_near_miss(one: str, two: str) -> None:
    result = rewrite(program("x: f64[4], t: f64[4]", f"a = {one}\nr = {two}\nr"), [NUMBERS])
    assert result.rules == [] and result.rejected == []


def test_numbers_behind_a_convolution_fold_one_by_one() -> None:
    source = program(
        "x: f64[4, 3, 9], w: f64[3, 2, 3], b: f64[2]", f"y = {conv()}\na = mul(y, 2.0)\nr = mul(a, 3.0)\nr"
    )
    assert rewrite(source, [NUMBERS]).reason("MergeNumbers") == "both fold into the convolution's weights instead"
    both = rewrite(source, DEFAULT_RULES)
    assert both.text.startswith("v0 = scale_weight(x1, 6.0, groups=1)\nv1 = mul(x2, 6.0)\n")
    agree(both)


@pytest.mark.parametrize(
    ("factor", "before", "behind"),
    [
        ("mul(x, 2.0)", None, 0.5),
        ("mul(x, -2.0)", -0.5, None),
        ("mul(x, 0.0)", 0.0, None),
        ("div(-4.0, x)", "div(-4.0, x0)", "div(v1, 4.0)"),  # no factor
        ("mul(x, t)", "mul(x0, x1)", "div(v1, 4.0)"),
        ("mul(x, -1e-320)", "mul(x0, -1e-320)", "div(v1, 4.0)"),  # does not merge
    ],
)
def test_factors_go_behind_a_max_pool_together_or_not_at_all(factor: str, before: Any, behind: Any) -> None:
    chain = f"a = {factor}\nb = div(a, 4.0)\nc = clone(b)\nr = relu(c)\nq = {max_pool('r', 3, 3)}\nq"
    result = rewrite(program("x: f64[2, 3, 9], t: f64[3, 1]", chain), DEFAULT_RULES)
    before = f"mul(x0, {before})" if isinstance(before, float) else before
    behind = f"mul(v0, {behind})" if isinstance(behind, float) else behind
    maps = [line.split(" = ")[1] for line in result.text.splitlines()[:-1]]
    pool = max_pool("x0" if before is None else "v0", 3, 3)
    last = len(maps) - 2
    assert maps == [*filter(None, (before, pool, behind)), f"relu(v{last})"]
    agree(result)


def test_a_factor_that_merges_with_a_negative_one_stays_before_a_max_pool() -> None:
    source = program("x: f64[2, 3, 9]", f"a = mul(x, -2.0)\nb = div(a, 4.0)\nq = {max_pool('b', 3, 3)}\nq")
    result = rewrite(source, [MoveMonotoneBehindMaxPool()])
    assert result.reason("MoveMonotoneBehindMaxPool") == "it merges with a factor before it that is negative or zero"


def test_a_negative_factor_that_is_also_used_elsewhere_keeps_none_before_a_max_pool() -> None:
    chain = f"a = mul(x, -2.0)\nb = mul(a, 4.0)\nq = {max_pool('b', 3, 3)}\nq, a"
    result = rewrite(program("x: f64[2, 3, 9]", chain), DEFAULT_RULES)
    assert result.text == f"v0 = mul(x0, -2.0)\nv1 = {max_pool('v0', 3, 3)}\nv2 = mul(v1, 4.0)\nv2, v0"
    agree(result)


def test_a_value_between_that_is_also_used_elsewhere_stays() -> None:
    result = rewrite(program("x: f64[4]", "a = mul(x, 2.0)\nr = mul(a, 3.0)\nr, a"), [NUMBERS])
    assert result.reason("MergeNumbers") == "the value of mul is also used elsewhere"


def test_a_shift_that_rounds_is_kept() -> None:
    """6755399441055744 added and subtracted rounds to whole numbers: neither merged, nor folded, nor moved."""
    magic = 1.5 * 2.0**52
    source = program(
        "x: f64[4, 3, 9], w: f64[3, 2, 3], b: f64[2]",
        f"y = {conv()}\na = add(y, {magic})\nr = sub(a, {magic})\nq = mean(r, dims=(2,), keepdim=True)\nq",
    )
    result = rewrite(source, DEFAULT_RULES)
    assert result.rules == []
    (value,) = result.rewritten.run(data(source))
    assert torch.equal((value * 11).round(), value * 11)
