"""Arithmetic and BatchNorm folded into a transposed convolution; biases that statistics cancel."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from harness import (
    INF,
    NAN,
    agree,
    conv,
    data,
    draw_conv,
    program,
    rewrite,
    salted,
    same_gradients,
    same_nonfinite,
    same_special,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from fxfuse.patterns import (
    DEFAULT_RULES,
    CancelBiasBeforeStatistics,
    FoldBatchNormIntoConvTranspose,
    FoldScaleIntoConvTranspose,
    FoldShiftIntoConvTranspose,
    Rule,
)

#: an input, a weight and a bias whose convolution has more elements than the weight
XWB = "x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[4]"
GROUPED = conv(stride=2, groups=1)
SCALE, SHIFT = FoldScaleIntoConvTranspose(), FoldShiftIntoConvTranspose()


def test_the_rules_are_those_that_optimize_applies() -> None:
    """What is tested here by name runs by default, and none of them is kept from a backward."""
    classes = {type(r) for r in DEFAULT_RULES}
    for rule in (SCALE, SHIFT, FoldBatchNormIntoConvTranspose(), CancelBiasBeforeStatistics()):
        assert type(rule) in classes and not rule.forward_only and rule.legality.value == "reassociating"


# --- exact results --------------------------------------------------------------------------------
IN = "x: f64[2, 3, 9], w: f64[3, 2, 3], b: f64[2], t: f64[2, 1], z: f64[()]"
_AT = "stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,), groups=1)"
WITH, WITHOUT = conv("x, w, b"), conv("x, w, None")


@pytest.mark.parametrize(
    ("call", "map_", "expected"),
    [
        (WITH, "mul(y, 2.0)", ["scale_weight(x1, 2.0, groups=1)", "mul(x2, 2.0)", "conv_transpose(x0, v0, v1, "]),
        (WITH, "mul(2.0, y)", ["scale_weight(x1, 2.0, groups=1)", "mul(x2, 2.0)", "conv_transpose(x0, v0, v1, "]),
        (WITH, "div(y, 4)", ["scale_weight(x1, 0.25, groups=1)", "mul(x2, 0.25)", "conv_transpose(x0, v0, v1, "]),
        (WITH, "neg(y)", ["scale_weight(x1, -1.0, groups=1)", "mul(x2, -1.0)", "conv_transpose(x0, v0, v1, "]),
        (WITHOUT, "mul(y, 2.0)", ["scale_weight(x1, 2.0, groups=1)", "conv_transpose(x0, v0, None, "]),
        (WITHOUT, "mul(y, t)", ["scale_weight(x1, x3, groups=1)", "conv_transpose(x0, v0, None, "]),
        (WITH, "mul(y, z)", ["scale_weight(x1, x4, groups=1)", "mul(x2, x4)", "conv_transpose(x0, v0, v1, "]),
        (
            WITH,
            "mul(t, y)",
            [
                "scale_weight(x1, x3, groups=1)",
                "to_channels(x3, x1, channels=2)",
                "mul(x2, v1)",
                "conv_transpose(x0, v0, v2, ",
            ],
        ),
        (
            WITH,
            "div(y, t)",
            [
                "reciprocal(x3)",
                "scale_weight(x1, v0, groups=1)",
                "to_channels(v0, x1, channels=2)",
                "mul(x2, v2)",
                "conv_transpose(x0, v1, v3, ",
            ],
        ),
        (WITH, "add(y, 1.5)", ["add(x2, 1.5)", "conv_transpose(x0, x1, v0, "]),
        (WITH, "add(z, y)", ["add(x2, x4)", "conv_transpose(x0, x1, v0, "]),
        (WITH, "sub(y, 1.5)", ["sub(x2, 1.5)", "conv_transpose(x0, x1, v0, "]),
        (WITH, "sub(1.5, y)", ["neg(x1)", "sub(1.5, x2)", "conv_transpose(x0, v0, v1, "]),
        (WITH, "add(y, t)", ["to_channels(x3, x1, channels=2)", "add(x2, v0)", "conv_transpose(x0, x1, v1, "]),
        (WITHOUT, "add(y, 1.5)", ["to_channels(1.5, x1, channels=2)", "conv_transpose(x0, x1, v0, "]),
        (WITHOUT, "sub(y, 1.5)", ["to_channels(-1.5, x1, channels=2)", "conv_transpose(x0, x1, v0, "]),
        (WITHOUT, "sub(y, t)", ["to_channels(x3, x1, channels=2)", "neg(v0)", "conv_transpose(x0, x1, v1, "]),
        (WITHOUT, "sub(t, y)", ["neg(x1)", "to_channels(x3, x1, channels=2)", "conv_transpose(x0, v0, v1, "]),
    ],
)
def test_what_a_fold_leaves(call: str, map_: str, expected: list[str]) -> None:
    result = rewrite(program(IN, f"y = {call}\nr = {map_}\nr"), [SCALE, SHIFT])
    assert len(result.rules) == 1
    lines = [f"v{i} = {line}" for i, line in enumerate(expected)]
    lines[-1] += _AT
    assert result.text == "\n".join([*lines, f"v{len(lines) - 1}"])
    agree(result)
    same_gradients(result)


NORM = "x: f64[2, 3, 9], w: f64[3, 2, 3], b: f64[2], mean: f64[2], var: f64[2], g: f64[2], h: f64[2]"


def test_what_batch_norm_leaves() -> None:
    result = rewrite(
        program(NORM, f"y = {WITH}\nr = batch_norm(y, mean, var, g, h, eps=0.001)\nr"),
        [FoldBatchNormIntoConvTranspose()],
    )
    assert result.text == (
        "v0 = add(x4, 0.001)\nv1 = rsqrt(v0)\nv2 = mul(v1, x5)\nv3 = scale_weight(x1, v2, groups=1)\n"
        "v4 = sub(x2, x3)\nv5 = mul(v4, v2)\nv6 = add(v5, x6)\n"
        f"v7 = conv_transpose(x0, v3, v6, {_AT}\nv7"
    )
    agree(result)
    same_gradients(result)


def test_what_batch_norm_without_parameters_leaves() -> None:
    result = rewrite(
        program(NORM, f"y = {WITHOUT}\nr = batch_norm(y, mean, var, None, None, eps=0.001)\nr"),
        [FoldBatchNormIntoConvTranspose()],
    )
    assert result.text == (
        "v0 = add(x4, 0.001)\nv1 = rsqrt(v0)\nv2 = scale_weight(x1, v1, groups=1)\nv3 = neg(x3)\n"
        f"v4 = mul(v3, v1)\nv5 = conv_transpose(x0, v2, v4, {_AT}\nv5"
    )
    agree(result)


def test_what_a_cancelled_bias_leaves() -> None:
    body = f"y = {WITH}\nr, m, v = batch_norm_train(y, g, h, eps=0.001)\nr, m, v"
    result = rewrite(program(NORM, body), [CancelBiasBeforeStatistics()])
    assert result.text == (
        f"v0 = conv_transpose(x0, x1, None, {_AT}\nv1 = sub(x2, x2)\nv2 = add(x6, v1)\n"
        "v3_0, v3_1, v3_2 = batch_norm_train(v0, x5, v2, eps=0.001)\nv4 = add(v3_1, x2)\nv5 = add(v3_2, v1)\n"
        "v3_0, v4, v5"
    )
    agree(result)
    same_gradients(result)
    result = rewrite(
        program(NORM, f"y = {WITH}\nr = instance_norm(y, None, None, eps=0.001)\nr"), [CancelBiasBeforeStatistics()]
    )
    assert result.text == (
        f"v0 = conv_transpose(x0, x1, None, {_AT}\nv1 = sub(x2, x2)\nv2 = instance_norm(v0, None, v1, eps=0.001)\nv2"
    )
    agree(result)


# --- any geometry ---------------------------------------------------------------------------------
MAPS = [
    "mul(y, 1.5)",
    "mul(y, 0.0)",
    "div(y, -3)",
    "neg(y)",
    "mul(c, y)",
    "div(y, c)",
    "mul(y, z)",
    "add(y, -0.5)",
    "add(c, y)",
    "sub(y, c)",
    "sub(c, y)",
    "sub(2, y)",
    "sub(y, z)",
]


def test_maps_of_any_convolution() -> None:
    fired: Counter[bool] = Counter()

    @given(st.data())
    def check(draw: st.DataObject) -> None:
        case, map_ = draw_conv(draw, batched=None, bias=None), draw.draw(st.sampled_from(MAPS))
        source = program(f"{case.inputs}, c: {case.column}, z: f64[()]", f"y = {case.call}\nr = {map_}\nr")
        result = rewrite(source, [SCALE, SHIFT])
        fired[bool(result.rules)] += 1
        if not result.rules:
            assert "elements, the output only" in result.rejected[0].reason
            return
        agree(result)
        same_gradients(result)
        tensors = data(source, draw.draw(st.integers(0, 99)))
        index = draw.draw(st.sampled_from([0, 0, 1, 2] if len(tensors) == 5 else [0, 0, 1]))
        tensors[index] = salted(tensors[index], 1)  # the input, the weight, the bias
        same_special(result, tensors)

    check()
    assert fired[True] > 3 * fired[False], fired


def test_batch_norm_of_any_convolution() -> None:
    fired: Counter[bool] = Counter()

    @given(st.data())
    def check(draw: st.DataObject) -> None:
        case = draw_conv(draw, sizes=(5, 7))
        c = f"f64[{case.channels}]"
        body = f"y = {case.call}\nr = batch_norm(y, mean, var, g, h, eps=0.01)\nr"
        source = program(f"{case.inputs}, mean: {c}, var: {c}, g: {c}, h: {c}", body)
        result = rewrite(source, [FoldBatchNormIntoConvTranspose()])
        fired[bool(result.rules)] += 1
        if not result.rules:
            assert "elements, the output only" in result.reason("FoldBatchNormIntoConvTranspose")
            return
        agree(result)
        same_gradients(result)
        tensors = data(source)
        index = draw.draw(st.sampled_from([0, 0, 0, 1, -4, -1]))  # the input, the weight, the mean, the shift
        tensors[index] = salted(tensors[index], 2)
        same_special(result, tensors)
        tensors = data(source)
        tensors[-2] = torch.zeros_like(tensors[-2])  # a scale of 0: Inf * 0 is NaN before and after
        tensors[0] = salted(tensors[0], 3)
        same_special(result, tensors)

    check()
    assert fired[True] > 3 * fired[False], fired


NORMS = [
    "batch_norm_batch(y, g, h, eps=0.1)",
    "instance_norm(y, g, h, eps=0.1)",
    "group_norm(y, g, h, groups=C, eps=0.1)",
]


@given(st.data())
def test_biases_before_any_statistics(draw: st.DataObject) -> None:
    case, norm = draw_conv(draw, bias=True), draw.draw(st.sampled_from(NORMS))
    assume(math.prod(case.shape[2:]) > 1)
    c = f"f64[{case.channels}]"
    body = f"y = {case.call}\nr = {norm.replace('C', str(case.channels))}\nr"
    result = rewrite(program(f"{case.inputs}, g: {c}, h: {c}", body), [CancelBiasBeforeStatistics()])
    assert result.rules == ["CancelBiasBeforeStatistics"]
    agree(result)
    same_gradients(result)
    for index in (0, 1, 2):
        tensors = data(result.original)
        tensors[index] = salted(tensors[index], draw.draw(st.integers(0, 99)))
        same_special(result, tensors)


# --- Inf and NaN in parameters --------------------------------------------------------------------
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("map_", ["mul(y, c)", "div(y, c)", "add(y, c)", "sub(c, y)", "mul(y, z)", "add(z, y)"])
@pytest.mark.parametrize("bias", ["b", "None"])
def test_special_constants(map_: str, value: float, bias: str) -> None:
    """Also where no tap reaches: stride 3, kernel 1, output padding, no bias."""
    call = conv(f"x, w, {bias}", stride=3, output_padding=2)
    source = program(
        "x: f64[2, 3, 4], w: f64[3, 2, 1], b: f64[2], c: f64[2, 1], z: f64[()]", f"y = {call}\nr = {map_}\nr"
    )
    result = rewrite(source, [SCALE, SHIFT])
    assert len(result.rules) == 1
    tensors = data(source)
    tensors[3][1] = value
    tensors[4].fill_(value)
    same_nonfinite(result, tensors)
    if map_.startswith(("add", "sub")) or value != value:
        same_special(result, tensors)


@pytest.mark.parametrize(
    ("name", "value"), [("var", INF), ("var", NAN), ("var", -1.0), ("g", NAN), ("h", INF), ("mean", INF)]
)
def test_special_statistics(name: str, value: float) -> None:
    source = program(NORM, f"y = {WITH}\nr = batch_norm(y, mean, var, g, h, eps=0.001)\nr")
    result = rewrite(source, [FoldBatchNormIntoConvTranspose()])
    tensors = data(source)
    tensors[[n for n, _ in source.inputs].index(name)][1] = value
    same_special(result, tensors)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 refuses the eps of 0 that makes the scale infinite")
def test_an_infinite_scale_leaves_nothing_finite() -> None:
    """What the class promises of parameters that are Inf: still not finite, but NaN where Inf + -Inf meet."""
    source = program(NORM, f"y = {WITH}\nr = batch_norm(y, mean, var, g, h, eps=0.0)\nr")
    result = rewrite(source, [FoldBatchNormIntoConvTranspose()])
    tensors = data(source)
    tensors[4][0] = 0.0
    same_nonfinite(result, tensors)


def test_outputs_that_no_tap_reaches_get_a_bias_only_where_a_scale_could_be_nan() -> None:
    inputs = "x: f64[2, 3, 9], w: f64[3, 2, 1], c: f64[2, 1]"
    reached = rewrite(program(inputs, f"y = {conv('x, w, None')}\nr = mul(y, c)\nr"), [SCALE])
    assert "to_channels" not in reached.text
    unreached = rewrite(program(inputs, f"y = {conv('x, w, None', stride=2)}\nr = mul(y, c)\nr"), [SCALE])
    assert "v2 = mul(v1, 0.0)" in unreached.text
    number = rewrite(program(inputs, f"y = {conv('x, w, None', stride=2)}\nr = mul(y, 3.0)\nr"), [SCALE])
    assert "to_channels" not in number.text


# --- refusals -------------------------------------------------------------------------------------
MORE = "x: f64[2, 3, 9], w: f64[3, 2, 3], b: f64[2], t: f64[2, 1], s: f64[11], n: f64[2, 1, 1], k: c128[2, 1]"
ALONE = "x: f64[3, 9], w: f64[3, 1, 3], b: f64[1], t: f64[2, 1], u: f64[4, 1, 1]"
HALF = "x: f16[2, 3, 9], w: f16[3, 2, 3], b: f16[2]"
FOLDS = {"add": SHIFT, "sub": SHIFT, "mul": SCALE, "div": SCALE, "neg": SCALE}


@pytest.mark.parametrize(
    ("inputs", "map_", "reason"),
    [
        (MORE, "add(y, s)", "its other operand does not have one value per channel"),
        (MORE, "mul(y, s)", "its other operand does not have one value per channel"),
        (MORE, "mul(y, n)", "its other operand does not have one value per channel"),
        (MORE, "div(2.0, y)", "the convolution is the divisor"),
        (MORE, "div(t, y)", "the convolution is the divisor"),
        (MORE, "mul(y, y)", "both operands are the convolution"),
        (MORE, "mul(y, k)", "the result is torch.complex128, the convolution torch.float64"),
        (MORE, "mul(y, inf)", "mul with inf leaves the range of torch.float64"),
        (MORE, "div(y, 0)", "div with 0 leaves the range of torch.float64"),
        (MORE, "div(y, 5e-324)", "div with 5e-324 leaves the range of torch.float64"),
        (MORE, "add(y, 3e15)", "a shift of 3000000000000000.0 may be there to round to whole numbers"),
        (MORE, "sub(y, nan)", "sub with nan leaves the range of torch.float64"),
        (ALONE, "mul(y, t)", "its other operand broadcasts over the channels"),
        (ALONE, "add(y, u)", "its other operand adds dims"),
        (HALF, "add(y, 1.0)", "folding would round the torch.float16 weights a second time"),
        (HALF, "neg(y)", "folding would round the torch.float16 weights a second time"),
    ],
)
def test_maps_that_do_not_fold(inputs: str, map_: str, reason: str) -> None:
    rule = FOLDS[map_.split("(")[0]]
    result = rewrite(program(inputs, f"y = {WITH}\nr = {map_}\nr"), [rule])
    assert result.reason(rule.name) == reason


def test_a_number_outside_the_dtype_does_not_fold() -> None:
    inputs = "x: f32[2, 3, 9], w: f32[3, 2, 3], b: f32[2]"
    for map_ in ("add(y, 1e300)", "mul(y, 1e-45)"):
        rule = FOLDS[map_[:3]]
        reason = rewrite(program(inputs, f"y = {WITH}\nr = {map_}\nr"), [rule]).reason(rule.name)
        assert reason.endswith("leaves the range of torch.float32")


@pytest.mark.parametrize(
    ("rule", "map_"),
    [
        (SCALE, "mul(y, 2.0)"),
        (SHIFT, "add(y, 2.0)"),
        (FoldBatchNormIntoConvTranspose(), "batch_norm(y, mean, var, g, h, eps=0.1)"),
        (CancelBiasBeforeStatistics(), "instance_norm(y, g, h, eps=0.1)"),
    ],
    ids=lambda v: v.name if isinstance(v, Rule) else None,
)
def test_a_convolution_that_is_also_used_elsewhere_stays(rule: Rule, map_: str) -> None:
    for outputs in ("y, r", "r, q"):
        result = rewrite(program(NORM, f"y = {WITH}\nr = {map_}\nq = relu(y)\n{outputs}"), [rule])
        assert result.reason(rule.name) == "the value of conv_transpose is also used elsewhere"


@pytest.mark.parametrize(
    ("map_", "rule"),
    [
        ("mul(y, 2.0)", SCALE),
        ("neg(y)", SCALE),
        ("sub(1.0, y)", SHIFT),
        ("batch_norm(y, mean, var, g, h, eps=0.1)", FoldBatchNormIntoConvTranspose()),
    ],
)
def test_a_weight_larger_than_the_output_is_not_multiplied(map_: str, rule: Rule) -> None:
    inputs = "x: f64[1, 3, 2], w: f64[3, 2, 3], b: f64[2], mean: f64[2], var: f64[2], g: f64[2], h: f64[2]"
    result = rewrite(program(inputs, f"y = {WITH}\nr = {map_}\nr"), [rule])
    assert result.reason(rule.name) == "the weight has 18 elements, the output only 8"
    shift = rewrite(program(inputs, f"y = {WITH}\nr = add(y, 2.0)\nr"), [SHIFT])
    assert shift.rules == ["FoldShiftIntoConvTranspose"]  # the bias alone: always worth it


def test_dead_outputs_do_not_change_what_a_fold_is_worth() -> None:
    """The order of the rules must not matter: the output counts with what a pool does not read."""
    full = conv("x, w, b", dims=1)
    for extent in (None, (2,)):
        call = full if extent is None else conv("x, w, b", extent=extent)
        result = rewrite(program("x: f64[1, 3, 7], w: f64[3, 2, 3], b: f64[2]", f"y = {call}\nr = neg(y)\nr"), [SCALE])
        assert result.rules == ["FoldScaleIntoConvTranspose"]


def test_statistics_that_do_not_cancel_a_bias() -> None:
    rule = CancelBiasBeforeStatistics()
    grouped = program(
        "x: f64[2, 3, 9], w: f64[3, 4, 3], b: f64[4]",
        f"y = {WITH}\nr = group_norm(y, None, None, groups=2, eps=0.1)\nr",
    )
    assert rewrite(grouped, [rule]).reason(rule.name) == "2 groups of 4 channels: a group's mean mixes biases"
    for norm in ("batch_norm_batch(y, None, None, eps=0.1)", "instance_norm(y, None, None, eps=0.1)"):
        dims = 1 if "batch" in norm else 2
        inputs = (
            "x: f64[3, 9], w: f64[3, 4, 3], b: f64[4]"
            if dims == 1
            else "x: f64[3, 5, 9], w: f64[3, 4, 3, 3], b: f64[4]"
        )
        alone = program(inputs, f"y = {conv(dims=dims)}\nr = {norm}\nr")
        assert rewrite(alone, [rule]).reason(rule.name) == "an input without a batch dim has its channels elsewhere"
    half = program(HALF, f"y = {WITH}\nr = instance_norm(y, None, None, eps=0.1)\nr")
    assert rewrite(half, [rule]).reason(rule.name) == "folding would round the torch.float16 weights a second time"
    bare = program(NORM, f"y = {WITHOUT}\nr = instance_norm(y, None, None, eps=0.1)\nr")
    assert rewrite(bare, [rule]).rejected == []  # no bias, no near miss


def test_batch_norms_that_do_not_fold() -> None:
    rule = FoldBatchNormIntoConvTranspose()
    alone = program(
        "x: f64[3, 5, 9], w: f64[3, 4, 3, 3], b: f64[4], mean: f64[7], var: f64[7]",
        f"y = {conv(dims=2)}\nr = batch_norm(y, mean, var, None, None, eps=0.1)\nr",
    )
    assert rewrite(alone, [rule]).reason(rule.name) == "an input without a batch dim has its channels elsewhere"
    half = program(
        "x: f16[2, 3, 9], w: f16[3, 2, 3], b: f16[2], mean: f32[2], var: f32[2]",
        f"y = {WITH}\nr = batch_norm(y, mean, var, None, None, eps=0.1)\nr",
    )
    assert rewrite(half, [rule]).reason(rule.name) == "folding would round the torch.float16 weights a second time"


def test_batch_norm_in_training_counts_the_bias_in_the_running_mean() -> None:
    body = f"y = {WITH}\nr, m, v = batch_norm_train(y, g, h, eps=0.001)\nr, m, v"
    source = program(NORM, body)
    result = rewrite(source, [CancelBiasBeforeStatistics()])
    for value in (INF, -INF, NAN):
        tensors = data(source)
        tensors[2][1] = value
        same_special(result, tensors)


def test_float32_stays_as_near_to_the_truth() -> None:
    inputs = XWB.replace("f64", "f32") + ", mean: f32[2], var: f32[2], g: f32[2], h: f32[2]"
    source = program(
        inputs.replace("b: f32[4]", "b: f32[2]"),
        f"y = {GROUPED}\nz = mul(y, 2.0)\nr = batch_norm(z, mean, var, g, h, eps=0.001)\nr",
    )
    result = rewrite(source, DEFAULT_RULES)
    assert result.rules == ["FoldScaleIntoConvTranspose", "FoldBatchNormIntoConvTranspose"]
    for seed in range(20):
        agree(result, data(source, seed))


def test_a_second_round_changes_nothing() -> None:
    source = program(NORM, f"y = {WITH}\nz = sub(1.0, y)\na = div(z, 3.0)\nr = instance_norm(a, g, h, eps=0.1)\nr")
    first = rewrite(source, DEFAULT_RULES)
    assert [i.op for i in first.rewritten.body][-2:] == ["add", "instance_norm"]
    second = rewrite(first.rewritten, DEFAULT_RULES)
    assert second.rules == [] and second.rewritten == first.rewritten
    agree(first)


@pytest.mark.parametrize(("cin", "groups"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("scale", ["s", "0.5"])
def test_a_scaled_weight_keeps_its_strides(cin: int, groups: int, scale: str) -> None:
    """torch's convolution takes the layout of its result from the weight's where x, of one position, tells of none."""
    columns = 4
    inputs = f"x: f32[2, {cin}, 1, 1], w: f32[{cin}, {columns}, 2, 2], s: f32[{columns * groups}, 1, 1]"
    source = program(inputs, f"y = {conv('x, w, None', groups=groups, dims=2)}\nz = mul(y, {scale})\nz")
    result = rewrite(source, [SCALE])
    assert result.rules == ["FoldScaleIntoConvTranspose"]
    x, weight, factors = data(source)
    last = weight.contiguous(memory_format=torch.channels_last)
    results = [p.run([x, last, factors])[0] for p in (source, result.rewritten)]
    assert [r.stride() for r in results] == [(columns * groups * 4, 1, columns * groups * 2, columns * groups)] * 2
