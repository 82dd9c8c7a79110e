"""A number behind a clamp of a convolution, which moves in front of it and folds into the weights."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from harness import (
    INF,
    agree,
    avg_pool,
    conv,
    draw_conv,
    gradients,
    max_pool,
    program,
    rewrite,
    salted,
    same_special,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.patterns import DEFAULT_RULES, Legality, MoveScaleBeforeClamp
from fxfuse.program import Program

MOVE = MoveScaleBeforeClamp()
NAME = "MoveScaleBeforeClamp"
LAYER = "x: {0}[{1}, 2, 9], w: {0}[2, 3, 4], b: {0}[3], g: f64[3], h: f64[3], m: f64[3], var: f64[3], c: f64[3, 1]"
NORM = "batch_norm({}, m, var, g, h, eps=0.125)"
RELU = "relu({})"


def chain(*maps: str, dtype: str = "f64", batch: int = 4, also: str = "") -> Program:
    """A convolution, then ``maps``, each of the value before it."""
    lines = [f"v{i + 1} = {m.format(f'v{i}')}" for i, m in enumerate(maps)]
    return program(LAYER.format(dtype, batch), "\n".join([f"v0 = {conv()}", *lines, f"v{len(maps)}{also}"]))


def operators(text: str) -> list[str]:
    return [line.split(" = ")[1].split("(")[0] for line in text.splitlines()[:-1]]


def test_the_rule_is_one_that_optimize_applies() -> None:
    assert MoveScaleBeforeClamp in {type(r) for r in DEFAULT_RULES}
    assert MOVE.legality is Legality.REASSOCIATING and MOVE.forward_only


# --- it fires -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("clamp", "scale", "scaled", "expected"),
    [
        ("clamp({}, -1.0, None)", "div({}, 2)", "div(v0, 2)", "clamp(v1, -0.5, None)"),
        ("clamp({}, -1, 3)", "mul(2.0, {})", "mul(2.0, v0)", "clamp(v1, -2.0, 6.0)"),
        ("clamp({}, -1, 3)", "mul({}, -2)", "mul(v0, -2)", "clamp(v1, -6.0, 2.0)"),
        ("clamp({}, None, 3)", "div({}, -4)", "div(v0, -4)", "clamp(v1, -0.75, None)"),
        ("clamp({}, 3, 1)", "mul({}, 2)", "mul(v0, 2)", "clamp(v1, 2.0, 2.0)"),  # torch's upper bound wins
        ("clamp({}, 3, 1)", "mul({}, -2)", "mul(v0, -2)", "clamp(v1, -2.0, -2.0)"),
        ("clamp({}, -inf, 1)", "mul({}, -2)", "mul(v0, -2)", "clamp(v1, -2.0, None)"),
        ("clamp({}, inf, None)", "mul({}, -2)", "mul(v0, -2)", "clamp(v1, None, -inf)"),
        ("clamp({}, -inf, inf)", "mul({}, 2)", "mul(v0, 2)", None),
        ("clamp({}, None, 0.0)", "mul({}, -2)", "mul(v0, -2)", "relu(v1)"),
        ("relu({})", "mul({}, 3.0)", "mul(v0, 3.0)", "relu(v1)"),
        ("relu({})", "mul({}, -3.0)", "mul(v0, -3.0)", "clamp(v1, None, 0.0)"),
        ("relu6({})", "div({}, 6)", "div(v0, 6)", "clamp(v1, 0.0, 1.0)"),
        ("hardtanh({}, min_val=-2.0, max_val=1.0)", "mul({}, 0.5)", "mul(v0, 0.5)", "clamp(v1, -1.0, 0.5)"),
        ("leaky_relu({}, negative_slope=0.2)", "div({}, 2)", "div(v0, 2)", "leaky_relu(v1, negative_slope=0.2)"),
    ],
)
def test_what_a_moved_scale_leaves(clamp: str, scale: str, scaled: str, expected: str | None) -> None:
    for dtype in ("f64", "f32"):
        result = rewrite(chain(clamp, scale, dtype=dtype), [MOVE])
        maps = [line.split(" = ")[1] for line in result.text.splitlines()[1:-1]]
        assert maps == [scaled, *([] if expected is None else [expected])] and result.rules == [NAME]
        agree(result)


def test_the_scale_folds_into_the_weights() -> None:
    result = rewrite(chain("clamp({}, -1.0, None)", "div({}, 2)"), DEFAULT_RULES)
    assert result.text == (
        "v0 = scale_weight(x1, 0.5, groups=1)\nv1 = mul(x2, 0.5)\n"
        f"v2 = {conv('x0, v0, v1')}\nv3 = clamp(v2, -0.5, None)\nv3"
    )
    assert result.rules == [NAME, "FoldScaleIntoConvTranspose"]
    agree(result)


@pytest.mark.parametrize(
    ("maps", "left"),
    [
        (["mul({}, 3.0)", "relu({})", "mul({}, 2.0)"], ["scale_weight", "mul", "conv_transpose", "relu"]),
        (["clone({})", "relu({})", "clone({})", "div({}, 2.0)"], ["scale_weight", "mul", "conv_transpose", "relu"]),
        (["relu({})", "relu6({})", "mul({}, 2.0)"], ["scale_weight", "mul", "conv_transpose", "clamp"]),
        (["relu({})", "mul({}, 2.0)", "relu6({})"], ["scale_weight", "mul", "conv_transpose", "clamp"]),
        (["relu({})", "mul({}, 2.0)", "div({}, -4.0)"], ["scale_weight", "mul", "conv_transpose", "clamp"]),
        (["relu({})", "mul({}, 2.0)", "relu6({})", "mul({}, 4.0)"], ["scale_weight", "mul", "conv_transpose", "clamp"]),
        (["relu({})", "mul({}, 2.0)", "tanh({})"], ["scale_weight", "mul", "conv_transpose", "relu", "tanh"]),
        (["relu({})", "mul({}, 2.0)", NORM], ["scale_weight", "mul", "conv_transpose", "relu", "batch_norm"]),
        (
            ["relu({})", "mul({}, -2.0)", max_pool("{}", 2, 2)],
            ["scale_weight", "mul", "conv_transpose", "max_pool", "clamp"],
        ),
        (
            ["relu({})", "mul({}, 2.0)", "add({}, c)", max_pool("{}", 2, 2)],
            ["scale_weight", "mul", "conv_transpose", "relu", "add", "max_pool"],
        ),
        (
            ["relu({})", "mul({}, 2.0)", avg_pool("{}", 3, 2, 1)],
            ["scale_weight", "mul", "conv_transpose", "relu", "avg_pool"],
        ),
        (
            ["relu({})", "mul({}, 2.0)", "relu6({})", "sum({}, dims=(1,), keepdim=True)"],
            ["scale_weight", "mul", "conv_transpose", "clamp", "sum"],
        ),
    ],
)
def test_further_maps_lead_to_one_program_in_any_order(maps: list[str], left: list[str]) -> None:
    source = chain(*maps)
    first = rewrite(source, DEFAULT_RULES)
    assert operators(first.text) == left and NAME in first.rules
    agree(first)
    in_any_order(source, first.text)


def in_any_order(source: Program, text: str) -> None:
    again = rewrite(rewrite(source, DEFAULT_RULES).rewritten, DEFAULT_RULES)
    assert again.rules == []
    for seed in range(8):
        rules = random.Random(seed).sample(DEFAULT_RULES, len(DEFAULT_RULES))
        assert rewrite(source, rules).text == text


numbers = st.one_of(st.integers(-4, 4), st.floats(-8, 8)).filter(lambda n: abs(n) > 1e-3)
bounds = st.one_of(st.none(), st.integers(-3, 3), st.sampled_from([-INF, INF, 0.5, -1.25, -0.0]))
clamps = st.one_of(
    st.sampled_from([RELU, "relu6({})", "leaky_relu({}, negative_slope=0.25)", "leaky_relu({}, negative_slope=-0.5)"]),
    st.tuples(bounds, bounds).filter(lambda b: b != (None, None)).map(lambda b: f"clamp({{}}, {b[0]}, {b[1]})"),
    st.tuples(st.integers(-3, 3), st.integers(0, 3)).map(
        lambda b: f"hardtanh({{}}, min_val={float(b[0])}, max_val={float(b[0] + b[1])})"
    ),
)


@given(st.data(), clamps, st.sampled_from(["mul({0}, {1})", "mul({1}, {0})", "div({0}, {1})"]), numbers)
def test_any_convolution_clamp_and_number(draw: st.DataObject, clamp: str, scale: str, number: float) -> None:
    made = draw_conv(draw, batched=None)
    source = program(made.inputs, f"y = {made.call}\nz = {clamp.format('y')}\nr = {scale.format('z', number)}\nr")
    result = rewrite(source, [MOVE])
    if result.rules == []:
        reason = result.reason(NAME)
        assert "turns leaky_relu upside down" in reason if number < 0 and "leaky" in clamp else "elements" in reason
        return
    tensors = [torch.randn([s or 0 for s in kind.shape], dtype=kind.dtype) for _, kind in source.inputs]
    agree(result, tensors)
    tensors[0] = salted(tensors[0], 0)
    same_special(result, tensors)
    same_special(rewrite(source, DEFAULT_RULES), tensors)


def test_inf_and_nan_in_the_weights_and_the_bias() -> None:
    for clamp in ("clamp({}, -1.0, 2.0)", "clamp({}, -1.0, None)", RELU, "leaky_relu({}, negative_slope=0.5)"):
        result = rewrite(chain(clamp, "div({}, 3)"), DEFAULT_RULES)
        assert NAME in result.rules
        for which in range(3):
            tensors = [torch.randn([s or 0 for s in k.shape], dtype=k.dtype) for _, k in result.original.inputs]
            tensors[which] = salted(tensors[which], which, part=0.1)
            same_special(result, tensors)


def test_the_gradient_differs_at_a_bound_alone() -> None:
    result = rewrite(chain("relu({})", "mul({}, -2.0)"), [MOVE])
    x, w, b, *rest = (torch.randn([s or 0 for s in k.shape], dtype=k.dtype) for _, k in result.original.inputs)
    needs = [False, False, True, *(False for _ in rest)]
    before, after = (gradients(p, [x, w, b, *rest], needs) for p in (result.original, result.rewritten))
    torch.testing.assert_close(before, after)
    zero = [torch.zeros_like(x), w, torch.zeros_like(b), *rest]
    (before,), (after,) = (gradients(p, zero, needs) for p in (result.original, result.rewritten))
    assert before.abs().max() == 0 and after.abs().min() > 0


# --- it refuses -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("clamp", "scale", "reason"),
    [
        (RELU, "mul({}, c)", "the factor is a tensor, whose sign is not known before the call"),
        (RELU, "mul({0}, {0})", "the factor is a tensor, whose sign is not known before the call"),
        (RELU, "div(2.0, {})", "the clamp is the divisor"),
        (RELU, "mul({}, 0.0)", "the factor is zero"),
        (RELU, "mul({}, inf)", "mul with inf leaves the range of torch.float64"),
        (RELU, "mul({}, nan)", "mul with nan leaves the range of torch.float64"),
        (RELU, "div({}, 0)", "div with 0 leaves the range of torch.float64"),
        (RELU, "mul({}, 1e-310)", "mul with 1e-310 leaves the range of torch.float64"),
        ("clamp({}, c, None)", "mul({}, 2.0)", "a bound is a tensor"),
        ("clamp({}, None, nan)", "mul({}, 2.0)", "a bound is NaN"),
        ("clamp({}, -1e300, 1.0)", "mul({}, 1e9)", "a bound of -1e+300, or of -inf, leaves the range of torch.float64"),
        ("clamp({}, 0, 1e-300)", "mul({}, 1e-9)", "a bound of 1e-300, or of 1e-309, leaves the range of torch.float64"),
        ("clamp({}, 0, 1e-300)", "mul({}, 1e-99)", "a bound of 1e-300, or of 0, leaves the range of torch.float64"),
        ("clamp({}, 0, 1e-310)", "mul({}, 1e9)", "a bound of 1e-310, or of 1e-301, leaves the range of torch.float64"),
        ("leaky_relu({}, negative_slope=0.1)", "div({}, -2)", "a factor of -0.5 turns leaky_relu upside down"),
        ("leaky_relu({}, negative_slope=inf)", "div({}, 2)", "the slope is not finite"),
    ],
)
def test_factors_and_bounds_that_stay(clamp: str, scale: str, reason: str) -> None:
    assert rewrite(chain(clamp, scale), [MOVE]).reason(NAME) == reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (chain(RELU, "mul({}, 2.0)", dtype="f16"), "folding would round the torch.float16 weights a second time"),
        (chain(RELU, "mul({}, 2.0)", dtype="bf16"), "folding would round the torch.bfloat16 weights a second time"),
        (chain("clamp({}, -1e39, 1.0)", "mul({}, 0.1)", dtype="f32"),
         "a bound of -1e+39, or of -1e+38, leaves the range of torch.float32"),
        (chain(RELU, "mul({}, 2.0)", also=", v0"), "the value of conv_transpose is also used elsewhere"),
        (chain(RELU, "mul({}, 2.0)", also=", v1"), "the value of relu is also used elsewhere"),
        (program("x: f64[1, 2, 1], w: f64[2, 3, 4], b: f64[3]",
                 f"y = {conv(padding=1)}\nz = relu(y)\nr = mul(z, 2.0)\nr"),
         "the weight has 24 elements, the output only 6"),
    ],
)  # fmt: skip
def test_chains_whose_weights_do_not_take_it(source: Program, reason: str) -> None:
    result = rewrite(source, [MOVE])
    assert result.reason(NAME) == reason
    assert "FoldScaleIntoConvTranspose" not in rewrite(source, DEFAULT_RULES).rules


@pytest.mark.parametrize(
    ("maps", "where"),
    [
        ([max_pool("{}", 2, 2)], "max_pool"),
        (["add({}, 1.0)", "clone({})", "relu({})", max_pool("{}", 2, 2)], "max_pool"),
        ([max_pool("{}", 3, 2), max_pool("{}", 3, 1, 1)], "max_pool"),  # they leave a crop
        ([avg_pool("{}", 2, 2)], "avg_pool"),
        (["adaptive_avg_pool({}, size=(2,))"], "adaptive_avg_pool"),
        ([NORM, "clone({})", avg_pool("{}", 2, 2)], "avg_pool"),
        (["mean({}, dims=(2,), keepdim=True)"], "mean"),
        (["add({}, c)", "mean({}, dims=(0, 2), keepdim=True)"], "mean"),
        (["sum({}, dims=(1,), keepdim=True)"], "sum"),
    ],
)
def test_a_scale_that_moves_behind_a_pool_or_a_mean_does_so(maps: list[str], where: str) -> None:
    source = chain("clamp({}, -1.0, 1.0)", "mul({}, 2.0)", *maps)
    assert rewrite(source, [MOVE]).reason(NAME) == f"it moves behind the {where} instead"
    first = rewrite(source, DEFAULT_RULES)
    assert NAME not in first.rules and "scale_weight" not in first.text
    left = operators(first.text)
    assert left.index(where) < left.index("mul")
    agree(first)
    in_any_order(source, first.text)


def test_factors_merge_first() -> None:
    """So that a bound is multiplied once: 0.1 * 0.2 * 0.3 is not 0.1 * (0.2 * 0.3)."""
    source = chain("clamp({}, -0.1, None)", "mul({}, 0.2)", "clone({})", "mul({}, 0.3)")
    assert rewrite(source, [MOVE]).reason(NAME) == "it merges with the next factor first"
    source = chain("clamp({}, -0.1, None)", "mul({}, 0.2)", "mul({}, 0.3)")
    first = rewrite(source, DEFAULT_RULES)
    assert f"clamp(v2, {-0.1 * (0.2 * 0.3)}, None)" in first.text
    in_any_order(source, first.text)


@pytest.mark.parametrize("second", ["mul({}, 1e-200)", "mul({}, c)"])
def test_factors_that_do_not_merge_do_not_wait(second: str) -> None:
    source = chain(RELU, "mul({}, 1e-200)", second)
    first = rewrite(source, DEFAULT_RULES)
    assert first.rules[:2] == [NAME, "FoldScaleIntoConvTranspose"]
    in_any_order(source, first.text)


@pytest.mark.parametrize("maps", [["tanh({})", "mul({}, 2.0)"], ["relu({})", "tanh({})", "mul({}, 2.0)"]])
def test_other_maps_are_no_near_miss(maps: list[str]) -> None:
    result = rewrite(chain(*maps), [MOVE])
    assert result.rules == [] and result.rejected == []


# --- in models ------------------------------------------------------------------------------------
class Twice(nn.Module):
    """One layer, used twice; in-place operators."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(3, 3, 3, stride=1, padding=1)

    def forward(self, x: Any) -> Any:
        y = self.up(x).relu_() * 2.0
        return self.up(y).clamp(-1.0).div_(-4.0)


def test_a_layer_that_is_used_twice_is_not_changed() -> None:
    model, x = Twice().double().eval(), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    fast = fxfuse.optimize(model, x, verify=True)
    applied = [a.rule for r in fast.fxfuse_report.regions for a in r.rules]
    assert applied.count(NAME) == 2
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        model.up.weight.mul_(2.0)  # the fold follows
        torch.testing.assert_close(fast(x), model(x))
        model.up.weight.div_(2.0)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_gradients_are_those_of_the_original_chain() -> None:
    model, x = Twice().double(), torch.zeros(1, 3, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        model.up.bias.zero_()  # relu of zero: where the clamps differ
    fast = fxfuse.optimize(model, x)
    found = []
    for run in (fast, model):
        model.zero_grad()
        run(x).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
