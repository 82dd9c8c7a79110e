"""Means: of affine maps, of BatchNorm, and of a transposed convolution, tap by tap."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from harness import (
    EVERYTHING,
    INF,
    NAN,
    agree,
    avg_pool,
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
    CollapseMeanOfConvTranspose,
    CollapseNarrowMean,
    FoldScaleIntoConvTranspose,
    MoveAffineBehindAvgPool,
    MoveAffineBehindMean,
    SplitBatchNormBeforeMean,
)
from fxfuse.program import Program

MOVE, POOL, COLLAPSE = MoveAffineBehindMean(), MoveAffineBehindAvgPool(), CollapseMeanOfConvTranspose()
SPLIT, NARROW_MEAN = SplitBatchNormBeforeMean(), CollapseNarrowMean()


def test_the_rules_are_those_that_optimize_applies() -> None:
    classes = {type(r) for r in DEFAULT_RULES}
    for rule in (MOVE, POOL, COLLAPSE, SPLIT, NARROW_MEAN):
        assert type(rule) in classes and not rule.forward_only and rule.legality.value == "reassociating"


# --- affine maps behind a mean --------------------------------------------------------------------
Y = "y: f64[2, 3, 4, 5], c: f64[3, 1, 1], f: f64[1, 3, 1, 1], n: f64[2, 1, 1, 1], z: f64[()], t: f64[4, 1], l: f64[5]"
NORM = "mean: f64[3], var: f64[3], g: f64[3], h: f64[3]"


@pytest.mark.parametrize(
    ("map_", "reduce", "expected"),
    [
        (
            "mul(y, 2.0)",
            "mean(m, dims=(2, 3), keepdim=True)",
            ["mean(x0, dims=(2, 3), keepdim=True)", "mul(v0, 2.0)"],
        ),
        (
            "sub(c, y)",
            "mean(m, dims=(2, 3), keepdim=False)",
            ["mean(x0, dims=(2, 3), keepdim=True)", "sub(x1, v0)", "reshape(v1, shape=(2, 3))"],
        ),
        (
            "div(y, n)",
            "sum(m, dims=(1,), keepdim=True)",
            ["sum(x0, dims=(1,), keepdim=True)", "div(v0, x3)"],
        ),
        (
            "add(y, 3.0)",
            "mean(m, dims=(1, 2), keepdim=False)",
            ["mean(x0, dims=(1, 2), keepdim=False)", "add(v0, 3.0)"],
        ),
        ("neg(y)", "sum(m, dims=(0, 1), keepdim=True)", ["sum(x0, dims=(0, 1), keepdim=True)", "neg(v0)"]),
        (
            "batch_norm(y, mean, var, g, h, eps=0.1)",
            "mean(m, dims=(0, 3), keepdim=False)",
            [
                "mean(x0, dims=(0, 3), keepdim=True)",
                "batch_norm(v0, x7, x8, x9, x10, eps=0.1)",
                "reshape(v1, shape=(3, 4))",
            ],
        ),
    ],
)
def test_what_a_moved_map_leaves(map_: str, reduce: str, expected: list[str]) -> None:
    result = rewrite(program(f"{Y}, {NORM}", f"m = {map_}\nr = {reduce}\nr"), [MOVE])
    assert result.text == "\n".join([*(f"v{i} = {e}" for i, e in enumerate(expected)), f"v{len(expected) - 1}"])
    agree(result)
    same_gradients(result)


MAPS = ["mul({0}, 1.5)", "mul({0}, 0.0)", "div({0}, -3)", "neg({0})", "add({0}, -0.5)", "sub(2, {0})", "sub({0}, 1)"]
MAPS += [f"{op}({{0}}, {o})" for op in ("mul", "add", "sub", "div") for o in "cfnztl"]
MAPS += [f"{op}({o}, {{0}})" for op in ("mul", "add", "sub") for o in "cfnztl"]
MAPS += ["batch_norm({0}, mean, var, g, h, eps=0.1)", "batch_norm({0}, mean, var, None, None, eps=0.1)"]
#: the dims of y along which an operand varies
VARIES = {"c": {1}, "f": {1}, "n": {0}, "z": set(), "t": {2}, "l": {3}}


def test_chains_of_maps_behind_any_mean() -> None:
    fired: Counter[bool] = Counter()

    @given(st.data())
    def check(draw: st.DataObject) -> None:
        dims = tuple(sorted(draw.draw(st.sets(st.integers(0, 3), min_size=1))))
        kind, keepdim = draw.draw(st.sampled_from(["mean", "mean", "sum"])), draw.draw(st.booleans())
        maps = draw.draw(st.lists(st.sampled_from(MAPS), min_size=1, max_size=3))
        lines = [f"m{i} = {m.format('y' if i == 0 else f'm{i - 1}')}" for i, m in enumerate(maps)]
        lines += [f"r = {kind}(m{len(maps) - 1}, dims={dims}, keepdim={keepdim})", "r"]
        source = program(f"{Y}, {NORM}", "\n".join(lines))
        result = rewrite(source, [MOVE])
        movable = [_movable(m, kind, dims) for m in maps]
        count = next((i for i, ok in enumerate(reversed(movable)) if not ok), len(maps))  # the last maps, up to one
        assert len(result.rules) == count, (result.text, movable)
        fired[count > 0] += 1
        agree(result)
        same_gradients(result)
        tensors = data(source, draw.draw(st.integers(0, 99)))
        tensors[0] = salted(tensors[0], 1)
        same_special(result, tensors)

    check()
    assert fired[True] > fired[False], fired


def _movable(map_: str, kind: str, dims: tuple[int, ...]) -> bool:
    if map_.startswith("batch_norm"):
        return kind == "mean" and 1 not in dims
    if kind == "sum" and map_.startswith(("add", "sub")):
        return False
    operand = next((o for o in VARIES if f", {o})" in map_ or f"({o}," in map_), "z")
    return not VARIES[operand] & set(dims)


@pytest.mark.parametrize("value", [INF, -INF, NAN, 0.0])
@pytest.mark.parametrize("map_", ["mul(y, c)", "add(y, c)", "sub(c, y)", "div(y, c)"])
def test_special_constants_behind_a_mean(map_: str, value: float) -> None:
    """A shift of Inf, a factor of 0 or NaN: the same. A factor of Inf: not finite either way."""
    source = program(Y, f"m = {map_}\nr = mean(m, dims=(2, 3), keepdim=True)\nr")
    result = rewrite(source, [MOVE])
    assert result.rules == ["MoveAffineBehindMean"]
    tensors = data(source)
    tensors[1][1] = value
    exact = map_.startswith(("add", "sub")) or value != value or (value == 0) == map_.startswith("mul")
    (same_special if exact else same_nonfinite)(result, tensors)
    tensors[0] = salted(tensors[0], 3)
    same_nonfinite(result, tensors)


@pytest.mark.parametrize(
    ("inputs", "map_", "reduce", "reason"),
    [
        (Y, "mul(y, c)", "mean(m, dims=(1,), keepdim=True)", "both operands vary along the averaged dims"),
        (Y, "add(y, l)", "mean(m, dims=(2, 3), keepdim=True)", "both operands vary along the averaged dims"),
        (Y, "mul(y, y)", "mean(m, dims=(2, 3), keepdim=True)", "both operands vary along the averaged dims"),
        (Y, "div(2.0, y)", "mean(m, dims=(2, 3), keepdim=True)", "the value is the divisor"),
        (Y, "div(c, y)", "mean(m, dims=(2, 3), keepdim=True)", "the value is the divisor"),
        (Y, "mul(y, inf)", "mean(m, dims=(2, 3), keepdim=True)", "mul with inf leaves the range of torch.float64"),
        (Y, "div(y, 0.0)", "mean(m, dims=(2, 3), keepdim=True)", "div with 0.0 leaves the range of torch.float64"),
        (Y, "add(y, 1.0)", "sum(m, dims=(2, 3), keepdim=True)", "a sum counts the shift once per element"),
        ("y: i64[2, 3, 4]", "mul(y, 2)", "sum(m, dims=(2,), keepdim=True)", "a mean of integers"),
        ("y: i64[2, 3, 4]", "mul(y, 0.5)", "mean(m, dims=(2,), keepdim=True)", "the map changes the dtype"),
        (
            "y: bf16[2, 3, 4]",
            "add(y, 0.5)",
            "mean(m, dims=(2,), keepdim=True)",
            "a mean rounded to torch.bfloat16 before the shift could lose what the shift leaves",
        ),
        (
            f"{Y}, {NORM}",
            "batch_norm(y, mean, var, g, h, eps=0.1)",
            "mean(m, dims=(1, 2), keepdim=True)",
            "the mean runs over the channels",
        ),
    ],
)
def test_maps_that_stay_before_the_mean(inputs: str, map_: str, reduce: str, reason: str) -> None:
    result = rewrite(program(inputs, f"m = {map_}\nr = {reduce}\nr"), [MOVE])
    assert result.reason("MoveAffineBehindMean") == reason


def test_scaling_moves_behind_a_mean_in_16_bits() -> None:
    result = rewrite(program("y: f16[2, 3, 4]", "m = mul(y, 0.5)\nr = mean(m, dims=(2,), keepdim=True)\nr"), [MOVE])
    assert result.rules == ["MoveAffineBehindMean"]


def test_a_map_that_is_also_used_elsewhere_stays() -> None:
    result = rewrite(program(Y, "m = mul(y, 2.0)\nr = mean(m, dims=(2,), keepdim=True)\nr, m"), [MOVE])
    assert result.reason("MoveAffineBehindMean") == "the value of mul is also used elsewhere"


# --- fold or move ---------------------------------------------------------------------------------
LAYER = "x: f64[{n}, 3, 9], w: f64[3, 2, 3], b: f64[2], mean: f64[2], var: f64[2], g: f64[2], h: f64[2]"
CHAIN = f"y = {conv()}\nm = mul(y, 2.0)\ns = sub(1.0, m)\nr = batch_norm(s, mean, var, g, h, eps=0.1)\n"


def test_a_map_folds_where_the_weight_is_smaller_than_the_mean() -> None:
    """18 elements of the weight against 2 n of the mean: the cheaper place takes the whole chain."""
    source = program(LAYER.format(n=9), CHAIN + "q = mean(r, dims=(2,), keepdim=True)\nq")
    result = rewrite(source, DEFAULT_RULES)
    assert "MoveAffineBehindMean" not in result.rules and "FoldScaleIntoConvTranspose" in result.rules
    agree(result)
    source = program(LAYER.format(n=8), CHAIN + "q = mean(r, dims=(2,), keepdim=True)\nq")
    result = rewrite(source, DEFAULT_RULES)
    assert result.rules == ["MoveAffineBehindMean"] * 3 + ["CollapseMeanOfConvTranspose"]
    assert [i.op for i in result.rewritten.body][-3:] == ["mul", "sub", "batch_norm"]
    agree(result)
    same_gradients(result)


def test_a_map_folds_where_the_way_to_the_mean_is_barred() -> None:
    """The mean is small, but the shift that varies over space cannot move behind it."""
    source = program(
        LAYER.format(n=1) + ", k: f64[11]",
        f"y = {conv()}\nm = mul(y, 2.0)\ns = add(m, k)\nq = mean(s, dims=(2,), keepdim=True)\nq",
    )
    result = rewrite(source, DEFAULT_RULES)
    assert result.rules == ["FoldScaleIntoConvTranspose"]
    assert result.reason("MoveAffineBehindMean") == "both operands vary along the averaged dims"


def test_why_a_map_neither_folds_nor_moves_is_told() -> None:
    source = program(LAYER.format(n=8), CHAIN + "q = mean(r, dims=(2,), keepdim=True)\nq")
    reason = rewrite(source, [FoldScaleIntoConvTranspose()]).reason("FoldScaleIntoConvTranspose")
    assert reason == "the weight has 18 elements, the mean only 16"
    source = program(LAYER.format(n=9), CHAIN + "q = mean(r, dims=(2,), keepdim=True)\nq")
    assert (
        rewrite(source, [MOVE]).reason("MoveAffineBehindMean") == "the map folds into the convolution's weights instead"
    )


# --- affine maps behind an average pool -----------------------------------------------------------
def test_what_a_map_behind_an_average_pool_leaves() -> None:
    source = program(Y, f"m = sub(c, y)\nr = {avg_pool('m', 2, 1, dims=2)}\nr")
    assert rewrite(source, [POOL]).text == (
        "v0 = avg_pool(x0, kernel=(2, 2), stride=(1, 1), padding=(0, 0), ceil_mode=False, count_include_pad=True, "
        "divisor_override=None)\nv1 = sub(x1, v0)\nv1"
    )
    source = program(Y, "m = mul(y, 3)\nr = adaptive_avg_pool(m, size=(2, None))\nr")
    assert rewrite(source, [POOL]).text == "v0 = adaptive_avg_pool(x0, size=(2, None))\nv1 = mul(v0, 3)\nv1"


@given(st.data())
def test_maps_behind_any_average_pool(draw: st.DataObject) -> None:
    kernel = draw.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pool = avg_pool("m", kernel, draw.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), dims=2)
    if draw.draw(st.booleans()):
        pool = f"adaptive_avg_pool(m, size={(draw.draw(st.integers(1, 4)), draw.draw(st.integers(1, 5)))})"
    maps = [m for m in MAPS if not any(f", {o})" in m or f"({o}," in m for o in "tl")]
    source = program(f"{Y}, {NORM}", f"m = {draw.draw(st.sampled_from(maps)).format('y')}\nr = {pool}\nr")
    result = rewrite(source, [POOL])
    assert result.rules == ["MoveAffineBehindAvgPool"]
    agree(result)
    same_gradients(result)
    tensors = data(source, draw.draw(st.integers(0, 99)))
    tensors[0] = salted(tensors[0], 1)
    same_special(result, tensors)


@pytest.mark.parametrize(
    ("map_", "pool", "reason"),
    [
        ("add(y, 1.0)", avg_pool("m", 2, 2, 1, dims=2), "padding changes the weight of border values"),
        ("mul(y, 2.0)", avg_pool("m", 2, 2, ceil_mode=True, dims=2), "ceil_mode averages partial windows"),
        ("add(y, 1.0)", avg_pool("m", 2, 2, divisor=3, dims=2), "divisor_override is not the window's size"),
        ("mul(y, t)", avg_pool("m", 2, 2, dims=2), "both operands vary along the averaged dims"),
        ("div(c, y)", avg_pool("m", 2, 2, dims=2), "the value is the divisor"),
        ("mul(y, nan)", avg_pool("m", 2, 2, dims=2), "mul with nan leaves the range of torch.float64"),
        ("neg(y)", "adaptive_avg_pool(m, size=(6, 7))", "it is not known to have fewer outputs than inputs"),
    ],
)
def test_maps_that_stay_before_the_average_pool(map_: str, pool: str, reason: str) -> None:
    result = rewrite(program(Y, f"m = {map_}\nr = {pool}\nr"), [POOL])
    assert result.reason("MoveAffineBehindAvgPool") == reason


def test_a_map_before_an_average_pool_folds_or_is_used_elsewhere() -> None:
    body = f"y = {conv()}\nm = neg(y)\nr = {avg_pool('m', 2, 2)}\n"
    result = rewrite(program(LAYER.format(n=2), body + "r"), [POOL])
    assert result.reason("MoveAffineBehindAvgPool") == "the map folds into the convolution's weights instead"
    result = rewrite(program(LAYER.format(n=2), body + "r, m"), [POOL])
    assert result.reason("MoveAffineBehindAvgPool") == "the value of neg is also used elsewhere"
    result = rewrite(program(LAYER.format(n=2), body + "r, y"), [POOL])
    assert result.rules == ["MoveAffineBehindAvgPool"]  # it cannot fold: the convolution is an output too


# --- the mean of a transposed convolution ---------------------------------------------------------
def test_what_a_collapsed_mean_leaves() -> None:
    source = program(
        "x: f64[2, 4, 5], w: f64[4, 3, 4], b: f64[6]",
        f"y = {conv(stride=2, padding=1, groups=2)}\nr = mean(y, dims=(2,), keepdim=False)\nr",
    )
    result = rewrite(source, [COLLAPSE])
    assert result.text == (
        "v0 = tap_sums(x0, dims=(2,), boxes=(((1, 5), (0, 5), (0, 5), (0, 4)),))\n"
        "v1 = contract_taps(v0, x1, dims=(2,), taps=((0, 1, 2, 3),), stride=(), padding=(), output_padding=(), "
        "dilation=(), groups=2)\n"
        "v2 = mul(v1, 0.1)\nv3 = reshape(x2, shape=(-1, 1))\nv4 = add(v2, v3)\nv5 = reshape(v4, shape=(2, 6))\nv5"
    )
    agree(result)
    same_gradients(result)


def test_collapsed_means_of_any_convolution() -> None:
    partial: Counter[bool] = Counter()

    @given(st.data())
    def check(draw: st.DataObject) -> None:
        case = draw_conv(draw, sizes=(1, 5))
        dims = tuple(sorted(draw.draw(st.sets(st.integers(2, 1 + case.dims), min_size=1))))
        kind, keepdim = draw.draw(st.sampled_from(["mean", "sum"])), draw.draw(st.booleans())
        source = program(case.inputs, f"y = {case.call}\nr = {kind}(y, dims={dims}, keepdim={keepdim})\nr")
        result = rewrite(source, [COLLAPSE])
        if not result.rules:
            assert result.reason("CollapseMeanOfConvTranspose") == "no tap reaches an output"
            return
        partial[len(dims) < case.dims] += 1
        agree(result)
        same_gradients(result)
        tensors = data(source)
        tensors[0] = salted(tensors[0], draw.draw(st.integers(0, 99)))
        same_special(result, tensors)
        tensors = data(source)
        for tensor in tensors[1:]:  # a weight of NaN, a bias of Inf
            tensor.view(-1)[draw.draw(st.integers(0, tensor.numel() - 1))] = NAN if tensor is tensors[1] else INF
        same_special(result, tensors)
        tensors[1] = salted(tensors[1], 0, (INF, -INF))
        same_nonfinite(result, tensors)

    check()
    assert partial[True] > 5 and partial[False] > 20, partial


@given(st.data())
def test_collapsed_means_of_the_outputs_that_are_left(draw: st.DataObject) -> None:
    stride, padding = draw.draw(st.integers(1, 3)), draw.draw(st.integers(0, 2))
    extent = tuple(draw.draw(st.integers(1, 3 * stride)) for _ in range(2))
    call = conv(stride=stride, padding=padding, dims=2, extent=extent)
    kind = draw.draw(st.sampled_from(["mean", "sum"]))
    inputs = "x: f64[2, 3, 5, 6], w: f64[3, 2, 4, 5], b: f64[2]"
    result = rewrite(program(inputs, f"y = {call}\nr = {kind}(y, dims=(2, 3), keepdim=True)\nr"), [COLLAPSE])
    assert result.rules == ["CollapseMeanOfConvTranspose"]
    agree(result)
    same_gradients(result)


def test_collapsed_means_tap_by_tap() -> None:
    """Every geometry of one dim: padding beyond the kernel, gaps, dilation on the stride's grid, output padding."""
    grid = itertools.product(range(1, 5), range(1, 5), range(1, 4), range(5), range(3), range(1, 4))
    fired = 0
    for length, k, s, p, extra, d in random.Random(1).sample(list(grid), 350):
        out = (length - 1) * s - 2 * p + d * (k - 1) + 1 + extra
        if extra >= max(s, d) or out < 1:
            continue
        call = conv(stride=s, padding=p, output_padding=extra, dilation=d)
        source = program(
            f"x: f64[1, 1, {length}], w: f64[1, 1, {k}], b: f64[1]",
            f"y = {call}\nr = sum(y, dims=(2,), keepdim=True)\nr",
        )
        result = rewrite(source, [COLLAPSE])
        reached = {i * s - p + t * d for i in range(length) for t in range(k)} & set(range(out))
        assert bool(result.rules) == bool(reached)
        fired += bool(reached)
        if reached:
            agree(result)
            for place in range(length):  # a NaN spreads from exactly the inputs that reach an output
                tensors = data(source)
                tensors[0][..., place] = NAN
                same_special(result, tensors)
            for tap in range(k):
                tensors = data(source)
                tensors[1][..., tap] = NAN
                same_special(result, tensors)
    assert fired > 100, fired


@pytest.mark.parametrize("behind", ["", ", 7"], ids=["all of space", "one dim of it"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_collapsed_means_of_narrow_types_are_summed_in_float32(dtype: str, behind: str) -> None:
    kernel = behind.replace("7", "3")
    inputs = f"x: {dtype}[2, 3, 60{behind}], w: {dtype}[3, 2, 3{kernel}], b: {dtype}[2]"
    call = conv(stride=2, dims=2 if behind else 1)
    source = program(inputs, f"y = {call}\nr = mean(y, dims=(2,), keepdim=True)\nr")
    result = rewrite(source, [COLLAPSE])
    assert result.rules == ["CollapseMeanOfConvTranspose"] and ("cast" in result.text) == (dtype != "f32")
    tensors = data(source)
    tensors[0] = (tensors[0] * 100).abs()  # sums of 16-bit numbers would overflow, or be rounded
    truth = source.run([t.double() for t in tensors])[0]
    (value,) = result.rewritten.run(tensors)
    assert value.dtype is tensors[0].dtype
    limit = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}[dtype]
    assert float((value.double() - truth).abs().max()) <= limit * float(truth.abs().max())


@pytest.mark.parametrize(
    ("inputs", "call", "reduce", "reason"),
    [
        (
            "x: f64[3, 5], w: f64[3, 2, 3], b: f64[2]",
            conv(),
            "mean(y, dims=(1,), keepdim=True)",
            "an input without a batch dim has its channels elsewhere",
        ),
        (
            "x: f64[2, 3, 5], w: f64[3, 2, 3], b: f64[2]",
            conv(),
            "mean(y, dims=(1, 2), keepdim=True)",
            "dims (1, 2) are not dims of space alone",
        ),
        (
            "x: f64[2, 3, 5, 5], w: f64[3, 2, 3, 3], b: f64[2]",
            conv(extent=(4, 6), dims=2),
            "mean(y, dims=(2,), keepdim=True)",
            "some outputs are already dropped",
        ),
        (
            "x: f64[2, 3, 2], w: f64[3, 2, 1], b: f64[2]",
            conv(stride=3, padding=1),
            "mean(y, dims=(2,), keepdim=True)",
            "no tap reaches an output",
        ),
    ],
)
def test_means_that_do_not_collapse(inputs: str, call: str, reduce: str, reason: str) -> None:
    result = rewrite(program(inputs, f"y = {call}\nr = {reduce}\nr"), [COLLAPSE])
    assert result.reason("CollapseMeanOfConvTranspose") == reason


def test_a_convolution_that_is_also_used_elsewhere_does_not_collapse() -> None:
    result = rewrite(
        program(LAYER.format(n=2), f"y = {conv()}\nr = mean(y, dims=(2,), keepdim=True)\ny, r"), [COLLAPSE]
    )
    assert result.reason("CollapseMeanOfConvTranspose") == "the value of conv_transpose is also used elsewhere"


# --- 16-bit means ---------------------------------------------------------------------------------
NARROW = (
    "x: {0}[2, 3, 9], w: {0}[3, 2, 3], b: {0}[2], mean: {0}[2], var: {0}[2], g: {0}[2], h: {0}[2], "
    "mean32: f32[2], var32: f32[2], g32: f32[2], c: {0}[2, 1]"
)
BATCH_NORM = "batch_norm({}, mean, var, g, h, eps=0.125)"
WIDE_STATISTICS = "batch_norm({}, mean32, var32, g32, None, eps=0.125)"


def _narrow_mean(*maps: str, dtype: str = "f16", keepdim: bool = True, also: str = "") -> Program:
    lines = [f"m{i + 1} = {m.format(f'm{i}')}" for i, m in enumerate(maps)]
    lines = [f"m0 = {conv(stride=2)}", *lines, f"r = mean(m{len(maps)}, dims=(2,), keepdim={keepdim})"]
    return program(NARROW.format(dtype), "\n".join([*lines, f"r{also}"]))


def test_what_a_16_bit_mean_of_a_map_leaves() -> None:
    result = rewrite(_narrow_mean("mul({}, 2.0)", BATCH_NORM, keepdim=False), DEFAULT_RULES)
    assert result.rules == ["CollapseNarrowMean"]
    assert result.text == (
        "v0 = tap_sums(x0, dims=(2,), boxes=(((0, 9), (0, 9), (0, 9)),))\n"
        "v1 = contract_taps(v0, x1, dims=(2,), taps=((0, 1, 2),), stride=(), padding=(), "
        "output_padding=(), dilation=(), groups=1)\n"
        "v2 = mul(v1, 0.05263157894736842)\nv3 = reshape(x2, shape=(-1, 1))\nv4 = cast(v3, dtype=f32)\n"
        "v5 = add(v2, v4)\nv6 = mul(v5, 2.0)\n"
        "v7 = cast(x3, dtype=f32)\nv8 = cast(x4, dtype=f32)\nv9 = cast(x5, dtype=f32)\nv10 = cast(x6, dtype=f32)\n"
        "v11 = batch_norm(v6, v7, v8, v9, v10, eps=0.125)\n"
        "v12 = cast(v11, dtype=f16)\nv13 = reshape(v12, shape=(2, 2))\nv13"
    )
    agree(result)
    again = rewrite(result.rewritten, DEFAULT_RULES)
    assert again.rules == [] and again.rewritten == result.rewritten


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@given(st.data())
def test_16_bit_means_of_any_map(dtype: str, draw: st.DataObject) -> None:
    maps = [
        "mul({}, 0.3)",
        "div({}, c)",
        "add({}, c)",
        "sub(3.0, {})",
        "neg({})",
        "clone({})",
        BATCH_NORM,
        WIDE_STATISTICS,
    ]
    chosen = draw.draw(st.lists(st.sampled_from(maps), max_size=3))
    source = _narrow_mean(
        *chosen, draw.draw(st.sampled_from(["add({}, c)", "sub({}, 1.5)", WIDE_STATISTICS])), dtype=dtype
    )
    result = rewrite(source, DEFAULT_RULES)
    assert "CollapseNarrowMean" in result.rules and "conv_transpose" not in result.text
    tensors = data(source, draw.draw(st.integers(0, 99)))
    tensors[-1] = tensors[-1].abs() + 0.5  # a divisor
    (before,), (after,) = result.original.run(tensors), result.rewritten.run(tensors)
    (truth,) = result.original.run([t.double() for t in tensors])
    assert after.dtype is before.dtype and after.shape == before.shape
    half = torch.finfo(before.dtype).eps / 2
    assert bool(((after - truth).abs() <= half * truth.abs() + 1e-4 * truth.abs().max()).all())  # rounded once
    special = [salted(t, draw.draw(st.integers(0, 99))) if i == 0 else t for i, t in enumerate(tensors)]
    (before,), (after,) = result.original.run(special), result.rewritten.run(special)
    assert torch.equal(after.isnan(), before.isnan()) and torch.equal(after.isinf(), before.isinf())
    assert torch.equal(after[after.isinf()], before[before.isinf()])


@pytest.mark.parametrize(
    ("maps", "reduce", "reason"),
    [
        (["add({}, x)"], "mean({}, dims=(2,), keepdim=True)", "both operands vary along the averaged dims"),
        (["div(2.0, {})", "add({}, 1.0)"], "mean({}, dims=(2,), keepdim=True)", "the value is the divisor"),
        (["add({}, inf)"], "mean({}, dims=(2,), keepdim=True)", "add with inf leaves the range of torch.float16"),
        (["add({}, 1.0)"], "mean({}, dims=(1, 2), keepdim=True)", "dims (1, 2) are not dims of space alone"),
        (["add({}, 1.0)"], "mean({}, dims=(0,), keepdim=True)", "dims (0,) are not dims of space alone"),
    ],
)
def test_16_bit_means_that_do_not_collapse(maps: list[str], reduce: str, reason: str) -> None:
    lines = [f"m{i + 1} = {m.format(f'm{i}')}" for i, m in enumerate(maps)]
    text = "\n".join([f"m0 = {conv()}", *lines, f"r = {reduce.format(f'm{len(maps)}')}", "r"])
    result = rewrite(program("x: f16[2, 2, 9], w: f16[2, 2, 1], b: f16[2]", text), [NARROW_MEAN])
    assert result.reason("CollapseNarrowMean") == reason


def test_a_16_bit_mean_of_a_map_that_is_also_used_elsewhere_stays() -> None:
    result = rewrite(_narrow_mean("mul({}, 2.0)", BATCH_NORM, also=", m1"), DEFAULT_RULES)
    assert result.reason("CollapseNarrowMean") == "the value of mul is also used elsewhere"


@pytest.mark.parametrize(
    "source",
    [
        _narrow_mean(BATCH_NORM, dtype="f32"),  # folds
        _narrow_mean("mul({}, 2.0)"),  # moves
        _narrow_mean("relu({})", "add({}, 1.0)"),  # not a convolution's
    ],
)
def test_other_means_are_no_near_miss_of_16_bit_ones(source: Program) -> None:
    result = rewrite(source, [NARROW_MEAN])
    assert result.rules == [] and result.rejected == []


# --- training-mode BatchNorm before a mean --------------------------------------------------------
TRAIN = "y: f64[2, 3, 4, 5], g: f64[3], h: f64[3]"


def test_what_batch_norm_before_a_mean_leaves() -> None:
    body = "r, m, v = batch_norm_train(y, g, h, eps=0.1)\nq = mean(r, dims=(2, 3), keepdim=False)\nq, m, v"
    result = rewrite(program(TRAIN, body), [SPLIT, MOVE])
    assert result.text == (
        "v0_0, v0_1, v0_2, v0_3 = centre(x0)\nv1 = mean(v0_0, dims=(2, 3), keepdim=True)\nv2 = add(v0_2, 0.1)\n"
        "v3 = rsqrt(v2)\nv4 = mul(v3, x1)\nv5 = reshape(v4, shape=(3, 1, 1))\nv6 = mul(v1, v5)\n"
        "v7 = reshape(x2, shape=(3, 1, 1))\nv8 = add(v6, v7)\nv9 = reshape(v8, shape=(2, 3))\nv9, v0_1, v0_3"
    )
    assert result.rules == ["SplitBatchNormBeforeMean", "MoveAffineBehindMean", "MoveAffineBehindMean"]
    agree(result)
    same_gradients(result)


@given(st.data())
def test_batch_norms_before_any_mean(draw: st.DataObject) -> None:
    space = draw.draw(st.lists(st.integers(1, 4), min_size=0, max_size=2))
    shape = (draw.draw(st.integers(1, 3)), 2, *space)
    assume(math.prod(shape) > 2)
    dims = tuple(sorted(draw.draw(st.sets(st.sampled_from([0, *range(2, len(shape))]), min_size=1))))
    gamma, beta = draw.draw(st.sampled_from(["g", "None"])), draw.draw(st.sampled_from(["h", "None"]))
    kept = draw.draw(st.booleans())
    call = (
        f"batch_norm_train(y, {gamma}, {beta}, eps=0.1)" if kept else f"batch_norm_batch(y, {gamma}, {beta}, eps=0.1)"
    )
    lines = [
        f"{'r, m, v' if kept else 'r'} = {call}",
        f"q = mean(r, dims={dims}, keepdim={draw.draw(st.booleans())})",
        "q, m, v" if kept else "q",
    ]
    source = program(f"y: f64[{', '.join(map(str, shape))}], g: f64[2], h: f64[2]", "\n".join(lines))
    result = rewrite(source, [SPLIT, MOVE])
    assert result.rules[0] == "SplitBatchNormBeforeMean" and "batch_norm" not in result.text
    tensors = data(source)
    for a, b in zip(source.run(tensors), result.rewritten.run(tensors), strict=True):
        assert float((a - b).abs().max()) < 1e-12  # a mean over the whole batch is h, or rounding alone
    same_gradients(result)
    for index in draw.draw(st.sampled_from([(0,), (0, 1), (2,)])):
        tensors[index] = salted(tensors[index], draw.draw(st.integers(0, 99)), (NAN,) if index else (NAN, INF, -INF))
    for a, b in zip(source.run(tensors), result.rewritten.run(tensors), strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        (TRAIN, "mean(r, dims=(1, 2), keepdim=True)\nq, m, v", "the mean runs over the channels"),
        (TRAIN, "mean(r, dims=(2,), keepdim=True)\nq, m, v, r", "the normalised value is also used elsewhere"),
        (TRAIN, "mean(r, dims=(2,), keepdim=True)\np = relu(r)\np, q", "the normalised value is also used elsewhere"),
        (
            TRAIN,
            "mean(r, dims=(2,), keepdim=True)\np = mean(r, dims=(3,), keepdim=True)\np, q",
            "the normalised value is also used elsewhere",
        ),
        (
            TRAIN.replace("f64", "bf16"),
            "mean(r, dims=(2,), keepdim=True)\nq, m, v",
            "a mean in torch.bfloat16 would be rounded before it is normalised",
        ),
    ],
)
def test_batch_norms_that_stay_before_the_mean(inputs: str, body: str, reason: str) -> None:
    source = program(inputs, f"r, m, v = batch_norm_train(y, g, h, eps=0.1)\nq = {body}")
    assert rewrite(source, [SPLIT]).reason("SplitBatchNormBeforeMean") == reason


def test_a_batch_norm_without_a_mean_is_no_near_miss() -> None:
    source = program(TRAIN, "r, m, v = batch_norm_train(y, g, h, eps=0.1)\nq = relu(r)\nq, m, v")
    assert rewrite(source, [SPLIT]).rejected == []


def test_folds_and_cancelled_biases_come_before_the_split() -> None:
    plain, head = f"y = {conv()}\n", f"y = {conv()}\ns = add(y, 1.0)\n"
    tail = "r, m, v = batch_norm_train({0}, g, h, eps=0.1)\nq = mean(r, dims=(2,), keepdim=True)\nq, m, v"
    reason = "what lies before it folds into the convolution first"
    assert rewrite(program(LAYER.format(n=2), head + tail.format("s")), [SPLIT]).reason(SPLIT.name) == reason
    reason = "the convolution's bias cancels first"
    assert rewrite(program(LAYER.format(n=2), plain + tail.format("y")), [SPLIT]).reason(SPLIT.name) == reason
    result = rewrite(program(LAYER.format(n=2), head + tail.format("s")), DEFAULT_RULES)
    assert {CancelBiasBeforeStatistics().name, SPLIT.name, MOVE.name} < set(result.rules)
    agree(result)
    same_gradients(result)


def test_split_batch_norm_is_as_exact_as_before() -> None:
    """The mean of y - m, not the difference of two means: float32, values far from zero."""
    source = program(
        "y: f32[4, 3, 400], g: f32[3], h: f32[3]",
        "r = batch_norm_batch(y, g, None, eps=1e-05)\nq = mean(r, dims=(2,), keepdim=True)\nq",
    )
    result = rewrite(source, [SPLIT, MOVE])
    for seed in range(5):
        tensors = data(source, seed)
        tensors[0] += 30.0
        agree(result, tensors)


def test_a_second_round_changes_nothing() -> None:
    source = program(
        LAYER.format(n=2),
        f"y = {conv()}\nk = neg(y)\nr, m, v = batch_norm_train(k, g, h, eps=0.1)\nd = div(r, 3.0)\n"
        "q = mean(d, dims=(2,), keepdim=False)\nq, m, v",
    )
    first = rewrite(source, DEFAULT_RULES, allow=EVERYTHING)
    assert first.rules
    second = rewrite(first.rewritten, DEFAULT_RULES, allow=EVERYTHING)
    assert second.rules == [] and second.rewritten == first.rewritten
    agree(first)
