"""Pools of pools, pools of monotone maps: against torch, window by window."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from harness import agree, avg_pool, conv, gradients, max_pool, program, rewrite, same_gradients, same_special
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.patterns import (
    DEFAULT_RULES,
    CollapseMeanOfConvTranspose,
    ComposeAvgPools,
    ComposeMaxPools,
    DropDeadOutputs,
    MergeAvgPoolIntoMean,
    MoveAffineBehindAvgPool,
    MoveAffineBehindMean,
    MoveMonotoneBehindMaxPool,
)
from fxfuse.program import Program

NAN, INF = float("nan"), float("inf")


def special(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Quantised values, so that windows have ties; a few NaN, Inf and -Inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    pick = torch.rand(shape, generator=generator)
    for limit, value in ((0.06, NAN), (0.04, INF), (0.02, -INF)):
        x[pick < limit] = value
    return x


# --- max of max -----------------------------------------------------------------------------------
def two_max_pools(length: int, one: tuple[int, int, int, bool], two: tuple[int, int, int, bool]) -> Program:
    return program(
        f"x: f64[2, 3, {length}]",
        f"m = {max_pool('x', *one[:3], ceil_mode=one[3])}\nr = {max_pool('m', *two[:3], ceil_mode=two[3])}\nr",
    )


def test_two_max_pools_become_one() -> None:
    source = program(
        "x: f32[1, 2, 13, 13, 13]",
        f"m = {max_pool('x', 2, 2, dims=3)}\nr = {max_pool('m', 3, 3, dims=3)}\nr",
    )
    result = rewrite(source, [ComposeMaxPools()])
    assert result.text == (
        "v0 = max_pool(x0, kernel=(6, 6, 6), stride=(6, 6, 6), padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"
        "\nv0"
    )
    agree(result, bitwise=True)


def test_three_max_pools_become_one() -> None:
    source = program(
        "x: f64[2, 3, 40]",
        f"a = {max_pool('x', 3, 2, 1)}\nb = {max_pool('a', 2, 2)}\nc = {max_pool('b', 3, 1, 1)}\nc",
    )
    result = rewrite(source, [ComposeMaxPools()])
    assert result.rules == ["ComposeMaxPools"] * 2
    assert len([i for i in result.rewritten.body if i.op == "max_pool"]) == 1
    agree(result, [special((2, 3, 40))], bitwise=True)


@pytest.mark.parametrize(
    ("length", "one", "two", "crop"),
    [
        (11, (3, 2, 1, False), (3, 2, 1, False), None),
        (12, (3, 2, 0, False), (3, 1, 1, False), (11,)),  # the outer padding must not read the last input
        (12, (2, 2, 0, False), (4, 4, 0, True), None),
    ],
)
def test_padding_and_ceil_mode_of_the_outer_pool(length, one, two, crop) -> None:  # type: ignore[no-untyped-def]
    result = rewrite(two_max_pools(length, one, two), [ComposeMaxPools()])
    assert result.rules == ["ComposeMaxPools"]
    crops = [dict(i.attributes)["extent"] for i in result.rewritten.body if i.op == "crop"]
    assert crops == ([] if crop is None else [crop])
    for seed in range(5):
        agree(result, [special((2, 3, length), seed)], bitwise=True)


def every_pool(kernels: range, strides: range) -> list[tuple[int, int, int, bool]]:
    """Kernel, stride, padding, ceil_mode: all that torch accepts."""
    return [(k, s, p, ceil) for k in kernels for s in strides for p in range(k // 2 + 1) for ceil in (False, True)]


def test_composed_max_pools_against_torch_over_many_sizes() -> None:
    """Padding and ceil_mode of either pool. 2 % of the shapes go wrong without the crop: hand-picked cases miss it."""
    cases = list(
        itertools.product(range(3, 14), every_pool(range(1, 5), range(1, 4)), every_pool(range(1, 5), range(1, 4)))
    )
    fired = cropped = 0
    for number, (length, one, two) in enumerate(random.Random(0).sample(cases, 500)):
        try:
            result = rewrite(two_max_pools(length, one, two), [ComposeMaxPools()])
        except RuntimeError:
            continue  # a window larger than its input
        agree(result, [special((2, 3, length), number)], bitwise=True)
        fired += result.rules == ["ComposeMaxPools"]
        cropped += "crop" in result.text
        if not result.rules:
            reason = result.reason("ComposeMaxPools")
            gap = one[1] > one[0] and two[0] > 1
            assert reason == (
                f"stride {one[1]} > kernel {one[0]} leaves gaps between the inner windows"
                if gap
                else "no single window gives both pools' output sizes"
            )
    assert fired > 200 and cropped > 10, (fired, cropped)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kept", [5, 6, 7, 8])
def test_max_pools_compose_through_a_crop(kept: int, padding: int) -> None:
    """Only the inner windows that the crop leaves are the outer pool's to read."""
    body = f"m = {max_pool('x', 3, 2, 1)}\nc = crop(m, extent=({kept},))\nr = {max_pool('c', 3, 2, padding)}\nr"
    source = program("x: f64[2, 3, 17]", body)
    result = rewrite(source, [ComposeMaxPools()])
    assert [i.op for i in result.rewritten.body] == ["crop", "max_pool"]
    for seed in range(5):
        agree(result, [special((2, 3, 17), seed)], bitwise=True)


@given(st.data())
def test_composed_max_pools_in_two_dims(draw: st.DataObject) -> None:
    shapes = st.tuples(st.integers(6, 12), st.integers(6, 12))
    shape = draw.draw(shapes)
    pools = []
    for _ in range(2):
        kernel = draw.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        stride = tuple(draw.draw(st.integers(1, k)) for k in kernel)
        padding = tuple(draw.draw(st.integers(0, k // 2)) for k in kernel)
        pools.append((kernel, stride, padding, draw.draw(st.booleans())))
    lines = [
        f"{out} = {max_pool(x, *p[:3], ceil_mode=p[3], dims=2)}" for x, out, p in zip("xm", "mr", pools, strict=True)
    ]
    result = rewrite(program(f"x: f32[2, {shape[0]}, {shape[1]}]", "\n".join([*lines, "r"])), [ComposeMaxPools()])
    agree(result, [special((2, *shape), draw.draw(st.integers(0, 99)), torch.float32)], bitwise=True)
    if result.rules == []:
        assert result.reason("ComposeMaxPools") == "no single window gives both pools' output sizes"


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        (
            "x: f64[2, 8, 8]",
            f"m = {max_pool('x', 2, 2)}\nr = {max_pool('m', 2, 2, dims=2)}\nr",
            "the pools run over different dims",
        ),
        (
            "x: f64[2, 3, 12]",
            f"m = {max_pool('x', 2, 2, dilation=2)}\nr = {max_pool('m', 2, 2)}\nr",
            "dilation (2,) makes a window with holes",
        ),
        (
            "x: f64[2, 3, 12]",
            f"m = {max_pool('x', 2, 2)}\nr = {max_pool('m', 2, 2, dilation=2)}\nr",
            "dilation (2,) makes a window with holes",
        ),
        (
            "x: f64[2, 3, 12]",
            f"m = {max_pool('x', 2, 3)}\nr = {max_pool('m', 2, 2)}\nr",
            "stride 3 > kernel 2 leaves gaps between the inner windows",
        ),
        (
            "x: f64[2, 3, 12]",
            f"m = {max_pool('x', 2, 2)}\nr = {max_pool('m', 2, 2)}\nm, r",
            "the value of max_pool is also used elsewhere",
        ),
    ],
)
def test_max_pools_that_do_not_compose(inputs: str, body: str, reason: str) -> None:
    result = rewrite(program(inputs, body), [ComposeMaxPools()])
    assert result.reason("ComposeMaxPools") == reason
    assert result.rewritten.body == rewrite(program(inputs, body), []).rewritten.body


def test_composed_max_pools_route_the_gradient_of_ties_elsewhere() -> None:
    """Why the rule is forward_only: block by block another of the equal values comes first than row by row."""
    source = program("x: f64[1, 1, 4, 4]", f"m = {max_pool('x', 2, 2, dims=2)}\nr = {max_pool('m', 2, 2, dims=2)}\nr")
    result = rewrite(source, [ComposeMaxPools()])
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 0, 2] = x[0, 0, 1, 0] = 1.0
    (before,), (after,) = (gradients(p, [x], [True]) for p in (result.original, result.rewritten))
    assert before.sum() == after.sum() and not torch.equal(before, after)
    assert ComposeMaxPools.forward_only


# --- average of average ---------------------------------------------------------------------------
def test_two_average_pools_become_one() -> None:
    source = program("x: f64[2, 3, 17]", f"m = {avg_pool('x', 2, 2)}\nr = {avg_pool('m', 3, 2)}\nr")
    result = rewrite(source, [ComposeAvgPools()])
    assert result.text == (
        "v0 = avg_pool(x0, kernel=(6,), stride=(4,), padding=(0,), ceil_mode=False, count_include_pad=True, "
        "divisor_override=None)\nv0"
    )
    agree(result)
    same_gradients(result)
    assert not ComposeAvgPools.forward_only


@given(st.data())
def test_composed_average_pools(draw: st.DataObject) -> None:
    kernel, second = draw.draw(st.integers(1, 3)), draw.draw(st.integers(1, 3))
    stride = kernel if second > 1 else draw.draw(st.integers(1, 4))
    length = draw.draw(st.integers(kernel * second + stride, 20))
    source = program(
        f"x: f64[2, 3, {length}]",
        f"m = {avg_pool('x', kernel, stride)}\nr = {avg_pool('m', second, draw.draw(st.integers(1, 3)))}\nr",
    )
    result = rewrite(source, [ComposeAvgPools()])
    assert result.rules == ["ComposeAvgPools"]
    agree(result)
    same_special(result, [special((2, 3, length), draw.draw(st.integers(0, 99)))])


@pytest.mark.parametrize(
    ("one", "two", "reason"),
    [
        (avg_pool("x", 2, 2, 1), avg_pool("m", 2, 2), "padding changes the weight of border values"),
        (avg_pool("x", 2, 2), avg_pool("m", 2, 2, 1), "padding changes the weight of border values"),
        (avg_pool("x", 2, 2, ceil_mode=True), avg_pool("m", 2, 2), "ceil_mode averages partial windows"),
        (avg_pool("x", 2, 2), avg_pool("m", 2, 2, ceil_mode=True), "ceil_mode averages partial windows"),
        (avg_pool("x", 3, 2), avg_pool("m", 2, 2), "stride 2 != kernel 3: the inner windows overlap or leave gaps"),
        (avg_pool("x", 2, 3), avg_pool("m", 2, 2), "stride 3 != kernel 2: the inner windows overlap or leave gaps"),
    ],
)
def test_average_pools_that_do_not_compose(one: str, two: str, reason: str) -> None:
    result = rewrite(program("x: f64[2, 3, 13]", f"m = {one}\nr = {two}\nr"), [ComposeAvgPools()])
    assert result.reason("ComposeAvgPools") == reason


def test_average_pools_with_a_divisor_or_over_other_dims_do_not_compose() -> None:
    body = f"m = {avg_pool('x', 2, 2, dims=2, divisor=3)}\nr = {avg_pool('m', 2, 2, dims=2)}\nr"
    result = rewrite(program("x: f64[2, 3, 8, 8]", body), [ComposeAvgPools()])
    assert result.reason("ComposeAvgPools") == "divisor_override is not the window's size"
    body = f"m = {avg_pool('x', 2, 2)}\nr = {avg_pool('m', 2, 2, dims=2)}\nr"
    result = rewrite(program("x: f64[2, 8, 8]", body), [ComposeAvgPools()])
    assert result.reason("ComposeAvgPools") == "the pools run over different dims"
    body = f"m = {avg_pool('x', 2, 2)}\nr = {avg_pool('m', 2, 2)}\nr, m"
    result = rewrite(program("x: f64[2, 3, 8]", body), [ComposeAvgPools()])
    assert result.reason("ComposeAvgPools") == "the value of avg_pool is also used elsewhere"


# --- mean of an average pool ------------------------------------------------------------------------
LAYER = "x: f64[2, 3, 5, 6], w: f64[3, 4, 3, 3], b: f64[4], c: f64[4, 1, 1], z: f64[11, 13]"
#: of 11 and 13 outputs, of which windows of 3 leave two and one out
CONV = f"y = {conv(stride=2, dims=2)}"
TILES = avg_pool("y", 3, 3, dims=2)
MERGE = [MergeAvgPoolIntoMean()]


@pytest.mark.parametrize(
    ("kernel", "dims", "keepdim"),
    [((3, 5), (2, 3), True), ((1, 5), (3,), False)],  # windows of one leave a dim that the mean keeps
)
def test_the_mean_of_an_average_pool_is_a_mean(kernel: tuple[int, int], dims: tuple[int, ...], keepdim: bool) -> None:
    mean = f"mean({{}}, dims={dims}, keepdim={keepdim})"
    body = f"m = {avg_pool('x', kernel, kernel, dims=2)}\nr = {mean.format('m')}\nr"
    result = rewrite(program("x: f64[2, 3, 12, 10]", body), MERGE)
    assert result.text == f"v0 = {mean.format('x0')}\nv0"
    agree(result)
    same_gradients(result)
    same_special(result, [special((2, 3, 12, 10))])
    assert not MergeAvgPoolIntoMean.forward_only


def test_outputs_that_no_window_reads_are_dropped_from_the_mean() -> None:
    source = program(LAYER, f"{CONV}\nm = {TILES}\nr = mean(m, dims=(2, 3), keepdim=True)\nr")
    result = rewrite(source, MERGE)
    assert [i.op for i in result.rewritten.body] == ["conv_transpose", "crop", "mean"]
    assert "crop(v0, extent=(9, 12))" in result.text
    agree(result)
    result = rewrite(source, [*MERGE, DropDeadOutputs(), CollapseMeanOfConvTranspose()])
    assert result.rules == ["MergeAvgPoolIntoMean", "DropDeadOutputs", "CollapseMeanOfConvTranspose"]
    agree(result)
    same_gradients(result)


@given(st.data())
def test_means_of_average_pools(draw: st.DataObject) -> None:
    """With maps between, one of which moves behind the pool; all rules that speak of it lead to the same program."""
    kernel = tuple(draw.draw(st.integers(1, 4)) for _ in range(2))
    body = [CONV]
    for name in draw.draw(
        st.sampled_from([(), ("mul",), ("relu",), ("relu", "mul"), ("mul", "relu"), ("relu", "pool")])
    ):
        call = {"mul": "mul(y, c)", "relu": "relu(y)", "pool": avg_pool("y", 2, 2, dims=2)}[name]
        body.append(f"y{len(body)} = {call.replace('(y', f'(y{len(body) - 1}' if len(body) > 1 else '(y')}")
    last = "y" if len(body) == 1 else f"y{len(body) - 1}"
    body += [
        f"m = {avg_pool(last, kernel, kernel, dims=2)}",
        f"r = mean(m, dims=(2, 3), keepdim={draw.draw(st.booleans())})",
    ]
    source = program(LAYER, "\n".join([*body, "r"]))
    result = rewrite(source, DEFAULT_RULES)
    assert "MergeAvgPoolIntoMean" in result.rules and "avg_pool" not in result.text and "crop" not in result.text
    agree(result)
    rules = draw.draw(st.permutations(DEFAULT_RULES))
    assert rewrite(source, rules).text == result.text


@pytest.mark.parametrize(
    ("pool", "mean", "reason"),
    [
        (avg_pool("y", 3, 2, dims=2), (2, 3), "stride 2 != kernel 3: the windows overlap or leave gaps"),
        (avg_pool("y", 2, 3, dims=2), (2, 3), "stride 3 != kernel 2: the windows overlap or leave gaps"),
        (avg_pool("y", 3, 3, 1, dims=2), (2, 3), "padding changes the weight of border values"),
        (avg_pool("y", 3, 3, ceil_mode=True, dims=2), (2, 3), "ceil_mode averages partial windows"),
        (avg_pool("y", 3, 3, divisor=2, dims=2), (2, 3), "divisor_override is not the window's size"),
        (TILES, (3,), "dim 2, along which windows lie, is kept"),
        (TILES, (2,), "dim 3, along which windows lie, is kept"),
        (TILES, (1, 2, 3), "the mean runs over samples or channels, too"),
        (TILES, (0, 2, 3), "the mean runs over samples or channels, too"),
    ],
)
def test_average_pools_that_stay_before_a_mean(pool: str, mean: tuple[int, ...], reason: str) -> None:
    result = rewrite(program(LAYER, f"{CONV}\nm = {pool}\nr = mean(m, dims={mean}, keepdim=True)\nr"), MERGE)
    assert result.reason("MergeAvgPoolIntoMean") == reason


ELSE = "positions that no window reads are not those of a convolution alone"


@pytest.mark.parametrize(
    ("before", "kernel", "outputs", "reason"),
    [
        ("mul(y, c)", 3, "r", "the map before the pool moves behind it, or into a convolution"),
        (avg_pool("y", 2, 2, dims=2), 2, "r", "the pool becomes one with the pool before it"),
        ("softmax(y, dim=1)", 3, "r", ELSE),
        ("mul(y, z)", 3, "r", ELSE),
        ("relu(y)", 3, "r, y", ELSE),
        ("relu(y)", 3, "r, u", ELSE),
        ("relu(y)", 3, "r, m", "the value of avg_pool is also used elsewhere"),
    ],
)
def test_where_a_mean_of_an_average_pool_waits_or_stays(before: str, kernel: int, outputs: str, reason: str) -> None:
    pool = avg_pool("u", kernel, kernel, dims=2)
    body = f"{CONV}\nu = {before}\nm = {pool}\nr = mean(m, dims=(2, 3), keepdim=True)\n{outputs}"
    assert rewrite(program(LAYER, body), MERGE).reason("MergeAvgPoolIntoMean") == reason


@pytest.mark.parametrize(("kernel", "dims"), [((2, 2, 2), (1, 2, 3)), ((1, 2, 2), (2, 3))])
def test_a_pool_over_more_dims_than_space_is_left_alone(kernel: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Torch takes a batched 2-D value for a sample of a 3-D one: its channels are no space."""
    layer = f"y = {conv('x, w, None', stride=2, dims=2)}\nm = {avg_pool('y', kernel, kernel, dims=3)}"
    body = f"{layer}\nr = mean(m, dims={dims}, keepdim=True)\nr"
    result = rewrite(program(LAYER.replace("[3, 4, 3, 3]", "[3, 5, 3, 3]"), body), DEFAULT_RULES)
    assert result.rules == []
    agree(result)


@pytest.mark.parametrize("first", [avg_pool("y", 2, 2, dims=2), "mul(y, c)"])
def test_what_another_rule_does_not_move_is_merged(first: str) -> None:
    """The value before the pool is an output, too: the two pools stay two, and the map where it is."""
    pool = avg_pool("u", 1, 1, dims=2)
    body = f"{CONV}\nu = {first}\nm = {pool}\nr = mean(m, dims=(2, 3), keepdim=True)\nr, u"
    result = rewrite(program(LAYER, body), MERGE)
    assert result.rules == ["MergeAvgPoolIntoMean"]
    agree(result)


def test_a_map_behind_which_a_pool_was_moves_behind_the_mean() -> None:
    rules = [MoveAffineBehindMean(), MoveAffineBehindAvgPool(), *MERGE]
    body = f"u = relu(x)\nv = mul(u, c)\nm = {avg_pool('v', 4, 4)}\nr = mean(m, dims=(2,), keepdim=True)\nr"
    for order in itertools.permutations(rules):
        result = rewrite(program("x: f64[2, 3, 12], c: f64[3, 1]", body), order)
        assert [i.op for i in result.rewritten.body] == ["relu", "mean", "mul"]
        agree(result)


# --- max of a monotone map ------------------------------------------------------------------------
MONOTONE = [
    "relu(x)",
    "relu6(x)",
    "hardtanh(x, min_val=-1.5, max_val=1.0)",
    "clamp(x, -1, None)",
    "clamp(x, None, 2)",
    "clamp(x, 2, 1)",
    "leaky_relu(x, negative_slope=0.3)",
    "add(x, -1.25)",
    "add(0.5, x)",
    "sub(x, 3)",
    "mul(x, 0.7)",
    "mul(3, x)",
    "div(x, 1.3)",
]


@pytest.mark.parametrize("map_", MONOTONE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_monotone_map_moves_behind_the_pool(map_: str, dtype: torch.dtype) -> None:
    name = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    source = program(f"x: {name}[2, 3, 11]", f"f = {map_}\nr = {max_pool('f', 3, 2, 1, ceil_mode=True)}\nr")
    result = rewrite(source, [MoveMonotoneBehindMaxPool()])
    assert [i.op for i in result.rewritten.body] == ["max_pool", map_.split("(")[0]]
    for seed in range(3):
        tensors = [special((2, 3, 11), seed, dtype) * 1.37]
        for a, b in zip(source.run(tensors), result.rewritten.run(tensors), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def test_the_map_behind_the_pool_keeps_the_pools_geometry() -> None:
    source = program("x: f64[2, 3, 11]", f"f = add(0.5, x)\nr = {max_pool('f', 3, 2, 1, ceil_mode=True)}\nr")
    assert rewrite(source, [MoveMonotoneBehindMaxPool()]).text == (
        "v0 = max_pool(x0, kernel=(3,), stride=(2,), padding=(1,), dilation=(1,), ceil_mode=True)\n"
        "v1 = add(0.5, v0)\nv1"
    )


@given(st.data())
def test_monotone_maps_behind_pools_of_any_geometry(draw: st.DataObject) -> None:
    kernel = draw.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw.draw(st.integers(0, k // 2)) for k in kernel)
    stride = draw.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = (1, 1) if any(padding) else draw.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pool = max_pool("f", kernel, stride, padding, dilation=dilation, ceil_mode=draw.draw(st.booleans()), dims=2)
    shape = draw.draw(st.tuples(st.integers(6, 9), st.integers(6, 9)))
    source = program(f"x: f64[2, {shape[0]}, {shape[1]}]", f"f = {draw.draw(st.sampled_from(MONOTONE))}\nr = {pool}\nr")
    result = rewrite(source, [MoveMonotoneBehindMaxPool()])
    assert result.rules == ["MoveMonotoneBehindMaxPool"]
    agree(result, [special((2, *shape), draw.draw(st.integers(0, 99)))], bitwise=True)


@pytest.mark.parametrize(
    ("map_", "reason"),
    [
        ("sub(1.0, x)", "a number minus or divided by the value is not non-decreasing"),
        ("div(1.0, x)", "a number minus or divided by the value is not non-decreasing"),
        ("add(x, t)", "its other operand is a tensor, whose values are not known before the call"),
        ("clamp(x, t, None)", "its other operand is a tensor, whose values are not known before the call"),
        ("mul(x, 0.0)", "a factor of 0.0 is not positive"),
        ("mul(x, -2.0)", "a factor of -2.0 is not positive"),
        ("div(x, -2.0)", "a factor of -2.0 is not positive"),
        ("div(x, 0.0)", "a factor of 0.0 is not positive"),
        ("mul(x, inf)", "one of its numbers is not finite"),
        ("add(x, nan)", "one of its numbers is not finite"),
        ("clamp(x, -inf, 1.0)", "one of its numbers is not finite"),
        ("hardtanh(x, min_val=-1.0, max_val=inf)", "one of its numbers is not finite"),
        ("leaky_relu(x, negative_slope=0.0)", "a slope of 0.0 is not positive: it turns the order, or -Inf into NaN"),
        ("leaky_relu(x, negative_slope=-0.1)", "a slope of -0.1 is not positive: it turns the order, or -Inf into NaN"),
        ("mul(x, 1e-320)", "mul with 1e-320 leaves the range of torch.float64"),
        ("div(x, 1e-320)", "div with 1e-320 leaves the range of torch.float64"),
    ],
)
def test_maps_that_stay_before_the_pool(map_: str, reason: str) -> None:
    source = program("x: f64[2, 3, 8], t: f64[3, 1]", f"f = {map_}\nr = {max_pool('f', 2, 2)}\nr")
    assert rewrite(source, [MoveMonotoneBehindMaxPool()]).reason("MoveMonotoneBehindMaxPool") == reason


def test_a_factor_that_vanishes_in_the_dtype_stays() -> None:
    source = program("x: f32[2, 3, 8]", f"f = mul(x, 1e-50)\nr = {max_pool('f', 2, 2)}\nr")
    reason = rewrite(source, [MoveMonotoneBehindMaxPool()]).reason("MoveMonotoneBehindMaxPool")
    assert reason == "mul with 1e-50 leaves the range of torch.float32"
    x = torch.tensor([[[-INF, 1.0]]])  # why: -Inf * 0 is NaN, which would win
    assert torch.nn.functional.max_pool1d(x * 1e-50, 2).isnan().all()


def test_a_dilated_padded_window_of_padding_alone_stays() -> None:
    source = program("x: f64[1, 1, 2]", f"f = relu(x)\nr = {max_pool('f', 2, 1, 1, dilation=2)}\nr")
    result = rewrite(source, [MoveMonotoneBehindMaxPool()])
    assert (
        result.reason("MoveMonotoneBehindMaxPool")
        == "a dilated, padded window can hold padding alone, which the map would change"
    )


def test_integers_and_other_dtypes_stay() -> None:
    source = program("x: i32[2, 3, 8]", f"f = add(x, 0.5)\nr = {max_pool('f', 2, 2)}\nr")
    reason = rewrite(source, [MoveMonotoneBehindMaxPool()]).reason("MoveMonotoneBehindMaxPool")
    assert reason == "the map changes the dtype"


def test_a_map_that_is_also_an_output_stays() -> None:
    source = program("x: f64[2, 3, 8]", f"f = relu(x)\nr = {max_pool('f', 2, 2)}\nf, r")
    reason = rewrite(source, [MoveMonotoneBehindMaxPool()]).reason("MoveMonotoneBehindMaxPool")
    assert reason == "the value of relu is also used elsewhere"


def test_a_map_of_the_convolution_is_left_to_the_fold() -> None:
    source = program(
        "x: f64[2, 3, 9], w: f64[3, 2, 3], b: f64[2]", f"y = {conv()}\nz = mul(y, 2.0)\nr = {max_pool('z', 2, 2)}\nr"
    )
    reason = rewrite(source, [MoveMonotoneBehindMaxPool()]).reason("MoveMonotoneBehindMaxPool")
    assert reason == "the map folds into the convolution's weights instead"


def test_relu_behind_the_pool_routes_the_gradient_of_ties_elsewhere() -> None:
    source = program("x: f64[1, 1, 2]", f"f = clamp(x, 0.0, None)\nr = {max_pool('f', 2, 2)}\nr")
    result = rewrite(source, [MoveMonotoneBehindMaxPool()])
    x = torch.tensor([[[-1.0, 0.0]]], dtype=torch.float64)  # both map to 0; the first wins there, the second here
    (before,), (after,) = (gradients(p, [x], [True]) for p in (result.original, result.rewritten))
    assert not torch.equal(before, after) and MoveMonotoneBehindMaxPool.forward_only


def test_pools_rules_are_done_after_one_round() -> None:
    source = program(
        "x: f64[2, 3, 24]",
        f"f = relu(x)\nm = {max_pool('f', 2, 2)}\ng = add(m, 1.0)\n"
        f"r = {max_pool('g', 3, 3)}\na = {avg_pool('r', 2, 2)}\na",
    )
    rules = [ComposeMaxPools(), ComposeAvgPools(), MoveMonotoneBehindMaxPool()]
    first = rewrite(source, rules)
    assert [i.op for i in first.rewritten.body] == ["max_pool", "relu", "add", "avg_pool"]
    agree(first)
    second = rewrite(first.rewritten, rules)
    assert second.rules == [] and second.rewritten == first.rewritten
