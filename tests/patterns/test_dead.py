"""Copies, and convolution outputs that no window reads."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from harness import (
    agree,
    avg_pool,
    conv,
    data,
    draw_conv,
    max_pool,
    program,
    rewrite,
    salted,
    same_gradients,
    same_special,
)
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.patterns import DEFAULT_RULES, ComposeMaxPools, DropCopies, DropDeadOutputs

DEAD = DropDeadOutputs()


def test_the_rules_are_those_that_optimize_applies() -> None:
    classes = {type(r) for r in DEFAULT_RULES}
    assert {DropCopies, DropDeadOutputs} <= classes
    assert DropCopies.legality.value == "bitwise" and DEAD.legality.value == "reassociating"
    assert not DropCopies.forward_only and not DEAD.forward_only


# --- copies ---------------------------------------------------------------------------------------
def test_copies_are_dropped() -> None:
    source = program("x: f64[2, 3]", "a = clone(x)\nb = relu(a)\nc = cast(b, dtype=f64)\nd = clone(c)\nd, b")
    result = rewrite(source, [DropCopies()])
    assert result.text == "v0 = relu(x0)\nv0, v0"
    assert result.rules == ["DropCopies"] * 3
    agree(result, bitwise=True)
    same_gradients(result)


def test_a_copied_input_may_be_an_output() -> None:
    result = rewrite(program("x: f64[2, 3]", "a = clone(x)\na"), [DropCopies()])
    assert result.text == "x0"


def test_a_cast_to_another_dtype_is_no_copy() -> None:
    result = rewrite(program("x: f64[2, 3]", "a = cast(x, dtype=f32)\nb = cast(a, dtype=f64)\nb"), [DropCopies()])
    assert result.rules == [] and result.rejected == []


# --- dead outputs ---------------------------------------------------------------------------------
def test_what_a_dead_border_leaves() -> None:
    source = program(
        "x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[2], c: f64[2, 1]",
        f"y = {conv(stride=2)}\nz = mul(c, y)\nr = relu(z)\nq = {max_pool('r', 2, 4)}\nq",
    )
    result = rewrite(source, [DEAD])
    assert result.text == (
        "v0 = conv_transpose(x0, x1, x2, stride=(2,), padding=(0,), output_padding=(0,), dilation=(1,), groups=1, "
        "extent=(14,))\n"
        "v1 = mul(x3, v0)\nv2 = relu(v1)\n"
        "v3 = max_pool(v2, kernel=(2,), stride=(4,), padding=(0,), dilation=(1,), ceil_mode=False)\nv3"
    )
    agree(result)
    same_gradients(result)
    again = rewrite(result.rewritten, [DEAD])
    assert again.rules == [] and again.rejected == []


@pytest.mark.parametrize(
    ("pool", "extent"),
    [(max_pool("y", (1, 1, 4), 3, (0, 0, 1), dims=3), 3), (avg_pool("y", (1, 1, 4), 3, (0, 0, 1), dims=3), None)],
)
def test_outputs_that_the_only_window_does_not_reach(pool: str, extent: int | None) -> None:
    """The window of 4 starts in the padding: 3 of 4 outputs are read; but torch.avg_pool3d wants a whole window."""
    source = program("x: f64[2, 3, 1, 1, 4], w: f64[3, 2, 1, 1, 1], b: f64[2]", f"y = {conv(dims=3)}\nq = {pool}\nq")
    result = rewrite(source, [DEAD])
    extents = [dict(i.attributes)["extent"] for i in result.rewritten.body if i.op == "conv_transpose"]
    assert extents == [extent and (1, 1, extent)] and result.rejected == []
    agree(result)
    same_gradients(result)


def test_dead_outputs_of_any_convolution() -> None:
    fired: Counter[bool] = Counter()

    @given(st.data())
    def check(draw: st.DataObject) -> None:
        case = draw_conv(draw, sizes=(3, 6))
        kernel = [draw.draw(st.integers(1, max(1, min(3, s)))) for s in case.shape[2:]]
        stride = [draw.draw(st.integers(1, 5)) for _ in kernel]
        padding = [draw.draw(st.integers(0, k // 2)) for k in kernel]
        ceil = draw.draw(st.booleans())
        if draw.draw(st.booleans()):
            dilation = [
                draw.draw(st.integers(1, 2 if (s - 1) // 2 >= k - 1 else 1))
                for k, s in zip(kernel, case.shape[2:], strict=True)
            ]
            pool = max_pool("r", kernel, stride, padding, dilation=dilation, ceil_mode=ceil, dims=case.dims)
        else:
            pool = avg_pool("r", kernel, stride, padding, ceil_mode=ceil, dims=case.dims)
        maps = [
            "r = relu(y)",
            "r = add(y, y)",
            "r = mul(y, c)",
            "s = sigmoid(y)\nr = clamp(s, z, None)",
            "r = prelu(y, a)",
        ]
        inputs = f"{case.inputs}, c: {case.column}, z: f64[()], a: f64[{case.channels}]"
        source = program(inputs, f"y = {case.call}\n{draw.draw(st.sampled_from(maps))}\nq = {pool}\nq")
        result = rewrite(source, [DEAD])
        fired[bool(result.rules)] += 1
        assert result.rejected == []
        if result.rules:
            agree(result)
            same_gradients(result)
            tensors = data(source)
            tensors[0] = salted(tensors[0], draw.draw(st.integers(0, 99)))
            same_special(result, tensors)

    check()
    assert fired[True] >= 20, fired


def test_the_extent_of_every_geometry() -> None:
    """One dim, every position from the front: what is left of a convolution is the front of the whole one."""
    grid = itertools.product(range(1, 5), range(1, 4), range(1, 4), range(4), range(3), range(1, 4))
    for length, k, s, p, extra, d in random.Random(2).sample(list(grid), 400):
        out = (length - 1) * s - 2 * p + d * (k - 1) + 1 + extra
        if extra >= max(s, d) or out < 2:
            continue
        geometry = {"stride": s, "padding": p, "output_padding": extra, "dilation": d}
        source = program(f"x: f64[1, 1, {length}], w: f64[1, 1, {k}], b: f64[1]", f"y = {conv(**geometry)}\ny")
        tensors = data(source)
        (whole,) = source.run(tensors)
        for extent in range(1, out):
            part = program(
                f"x: f64[1, 1, {length}], w: f64[1, 1, {k}], b: f64[1]",
                f"y = {conv(**geometry, extent=(extent,))}\ny",
            )
            (front,) = part.run(tensors)
            assert front.shape[2] == extent
            assert float((front - whole[..., :extent]).abs().max()) < 1e-14, (geometry, length, k, extent)


def test_pools_that_read_the_border_leave_it() -> None:
    for pool in (max_pool("y", 3, 2), max_pool("y", 2, 2, ceil_mode=True), avg_pool("y", 3, 2), max_pool("y", 3, 2, 1)):
        source = program("x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[2]", f"y = {conv()}\nq = {pool}\nq")
        result = rewrite(source, [DEAD])
        assert result.rules == [] and result.rejected == []


def test_a_crop_becomes_the_convolutions_extent() -> None:
    source = program(
        "x: f64[1, 2, 12], w: f64[2, 2, 1], b: f64[2]",
        f"y = {conv()}\nf = relu(y)\nm = {max_pool('f', 3, 2)}\nr = {max_pool('m', 3, 1, 1)}\nr",
    )
    for rules in ([ComposeMaxPools(), DEAD], [DEAD, ComposeMaxPools()]):
        result = rewrite(source, rules)
        assert result.text == (
            "v0 = conv_transpose(x0, x1, x2, stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,), groups=1, "
            "extent=(11,))\n"
            "v1 = relu(v0)\n"
            "v2 = max_pool(v1, kernel=(7,), stride=(2,), padding=(2,), dilation=(1,), ceil_mode=False)\nv2"
        )
        agree(result)


@given(st.data())
def test_the_tail_of_a_convolution_is_no_padding(draw: st.DataObject) -> None:
    """A pool may be given a convolution that is longer than its extent, but not where a window leaves that."""
    extent, kernel = draw.draw(st.integers(4, 11)), draw.draw(st.integers(1, 4))
    geometry = (kernel, draw.draw(st.integers(1, 4)), draw.draw(st.integers(0, kernel // 2)))
    ceil = draw.draw(st.booleans())
    pool = draw.draw(st.sampled_from([max_pool, avg_pool]))("r", *geometry, ceil_mode=ceil)
    inputs = "x: f64[2, 3, 9], w: f64[3, 2, 4]"
    short = program(inputs, f"y = {conv('x, w, None', extent=(extent,))}\nr = add(y, 5.0)\nq = {pool}\nq")
    whole = program(
        inputs, f"y = {conv('x, w, None')}\nz = crop(y, extent=({extent},))\nr = add(z, 5.0)\nq = {pool}\nq"
    )
    tensors = data(short)
    assert torch.equal(short.run(tensors)[0], whole.run(tensors)[0])


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        (
            "x: f64[3, 7], w: f64[3, 2, 3], b: f64[2]",
            f"y = {conv()}\nq = {max_pool('y', 2, 4)}\nq",
            "an input without a batch dim has its space elsewhere",
        ),
        (
            "x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[2]",
            f"y = {conv()}\nq = {max_pool('y', 2, 4, dims=2)}\nq",
            "the pool's dims are not the convolution's spatial dims",
        ),
        (
            "x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[2]",
            f"y = {conv()}\nq = {max_pool('y', 2, 4)}\nq, y",
            "the value of conv_transpose is also used elsewhere",
        ),
        (
            "x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[2]",
            f"y = {conv()}\nr = relu(y)\nq = {max_pool('r', 2, 4)}\nq, r",
            "the value of relu is also used elsewhere",
        ),
    ],
)
def test_dead_outputs_that_stay(inputs: str, body: str, reason: str) -> None:
    assert rewrite(program(inputs, body), [DEAD]).reason("DropDeadOutputs") == reason


@pytest.mark.parametrize("between", ["add(y, t)", "mul(t, y)", "softmax(y, dim=2)", "where(p, y, t)"])
def test_what_varies_over_space_stays_whole(between: str) -> None:
    source = program(
        "x: f64[2, 3, 7], w: f64[3, 2, 3], b: f64[2], t: f64[9], p: b1[2, 2, 9]",
        f"y = {conv()}\nr = {between}\nq = {max_pool('r', 2, 4)}\nq",
    )
    result = rewrite(source, [DEAD])
    assert result.rules == [] and result.rejected == []
