"""Sums over channels and average pools that become other weights; shifts that a softmax cancels."""

from __future__ import annotations

from collections import Counter

import pytest
from harness import (
    EVERYTHING,
    agree,
    avg_pool,
    conv,
    data,
    draw_conv,
    program,
    rewrite,
    salted,
    same_gradients,
    same_special,
)
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.patterns import (
    DEFAULT_RULES,
    DropShiftBeforeSoftmax,
    FoldAvgPoolIntoConvTranspose,
    FoldChannelSumIntoConvTranspose,
    FoldShiftIntoConvTranspose,
)

CHANNELS, POOL, SOFTMAX = FoldChannelSumIntoConvTranspose(), FoldAvgPoolIntoConvTranspose(), DropShiftBeforeSoftmax()
XWB = "x: f64[2, 4, 5], w: f64[4, 3, 3], b: f64[6]"


def test_the_rules_are_those_that_optimize_applies() -> None:
    assert {type(r) for r in (CHANNELS, POOL, SOFTMAX)} <= {type(r) for r in DEFAULT_RULES}
    assert not any(r.forward_only for r in (CHANNELS, POOL, SOFTMAX))


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        (CHANNELS, f"y = {conv(groups=2)}\nr = sum(y, dims=(1,), keepdim=True)\nr"),
        (POOL, f"y = {conv(groups=2, stride=2)}\nr = {avg_pool('y', 2, 2)}\nr"),
    ],
)
def test_rules_for_finite_values_ask_for_permission(rule, body) -> None:  # type: ignore[no-untyped-def]
    """Inf * 1 + Inf * -1 is NaN; Inf * (1 - 1) is another."""
    result = rewrite(program(XWB, body), [rule])
    assert result.reason(rule.name) == "it is finite-only: pass allow={..., 'finite-only'} to permit it"
    assert rewrite(program(XWB, body), [rule], allow=EVERYTHING).rules == [rule.name]


# --- sums over channels ---------------------------------------------------------------------------
def test_what_a_folded_channel_mean_leaves() -> None:
    source = program(XWB, f"y = {conv(groups=2)}\nr = mean(y, dims=(1,), keepdim=False)\nr")
    result = rewrite(source, [CHANNELS], allow=EVERYTHING)
    assert result.text == (
        "v0 = sum(x1, dims=(1,), keepdim=True)\nv1 = mul(v0, 0.16666666666666666)\n"
        "v2 = sum(x2, dims=(0,), keepdim=True)\nv3 = mul(v2, 0.16666666666666666)\n"
        "v4 = conv_transpose(x0, v1, v3, stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,), groups=1)\n"
        "v5 = reshape(v4, shape=(2, 7))\nv5"
    )
    agree(result)
    same_gradients(result)


@given(st.data())
def test_channel_sums_of_any_convolution(draw: st.DataObject) -> None:
    case = draw_conv(draw, bias=None)
    kind, keepdim = draw.draw(st.sampled_from(["sum", "mean"])), draw.draw(st.booleans())
    source = program(case.inputs, f"y = {case.call}\nr = {kind}(y, dims=(1,), keepdim={keepdim})\nr")
    result = rewrite(source, [CHANNELS], allow=EVERYTHING)
    assert result.rules == [CHANNELS.name]
    agree(result)
    same_gradients(result)


def test_channel_sums_that_stay() -> None:
    alone = program("x: f64[4, 5], w: f64[4, 3, 3], b: f64[3]", f"y = {conv()}\nr = sum(y, dims=(1,), keepdim=True)\nr")
    reason = "an input without a batch dim has its channels elsewhere"
    assert rewrite(alone, [CHANNELS], allow=EVERYTHING).reason(CHANNELS.name) == reason
    half = program(XWB.replace("f64", "f16"), f"y = {conv(groups=2)}\nr = sum(y, dims=(1,), keepdim=True)\nr")
    reason = "folding would round the torch.float16 weights a second time"
    assert rewrite(half, [CHANNELS], allow=EVERYTHING).reason(CHANNELS.name) == reason
    used = program(XWB, f"y = {conv(groups=2)}\nr = sum(y, dims=(1,), keepdim=True)\nr, y")
    reason = "the value of conv_transpose is also used elsewhere"
    assert rewrite(used, [CHANNELS], allow=EVERYTHING).reason(CHANNELS.name) == reason
    space = program(XWB, f"y = {conv(groups=2)}\nr = sum(y, dims=(1, 2), keepdim=True)\nr")
    assert rewrite(space, [CHANNELS], allow=EVERYTHING).rejected == []


# --- average pools --------------------------------------------------------------------------------
def test_what_a_folded_average_pool_leaves() -> None:
    source = program(XWB, f"y = {conv(stride=2, padding=1, groups=2)}\nr = {avg_pool('y', 2, 2)}\nr")
    result = rewrite(source, [POOL], allow=EVERYTHING)
    assert result.text == (
        "v0 = window_sums(x1, windows=(((0, 1), (1, 3)),))\nv1 = mul(v0, 0.5)\n"
        "v2 = conv_transpose(x0, v1, x2, stride=(1,), padding=(1,), output_padding=(0,), dilation=(1,), groups=2)\nv2"
    )
    agree(result)
    same_gradients(result)


def test_average_pools_of_any_convolution() -> None:
    fired: Counter[str] = Counter()

    @given(st.data())
    def check(draw: st.DataObject) -> None:
        case = draw_conv(draw, bias=None, sizes=(3, 6))
        kernel = [draw.draw(st.integers(1, min(3, s))) for s in case.shape[2:]]
        stride = [draw.draw(st.integers(1, 3)) for _ in kernel]
        pool = avg_pool("y", kernel, stride, dims=case.dims)
        source = program(case.inputs, f"y = {case.call}\nr = {pool}\nr")
        result = rewrite(source, [POOL], allow=EVERYTHING)
        fired["fired" if result.rules else result.reason(POOL.name).split()[1]] += 1
        agree(result)
        same_gradients(result)

    check()
    assert fired["fired"] >= 8 and fired["convolution's"] and fired["merged"], fired


@pytest.mark.parametrize(
    ("inputs", "body", "reason"),
    [
        (
            "x: f64[4, 5], w: f64[4, 3, 3], b: f64[3]",
            f"y = {conv(stride=2)}\nr = {avg_pool('y', 2, 2)}\nr",
            "an input without a batch dim has its channels elsewhere",
        ),
        (
            XWB,
            f"y = {conv(stride=2, groups=2)}\nr = {avg_pool('y', 2, 2, dims=2)}\nr",
            "the pool's dims are not the convolution's spatial dims",
        ),
        (
            XWB,
            f"y = {conv(stride=2, groups=2)}\nr = {avg_pool('y', 2, 2, 1)}\nr",
            "padding, ceil_mode or divisor_override weigh border values differently",
        ),
        (
            XWB,
            f"y = {conv(stride=2, groups=2)}\nr = {avg_pool('y', 2, 2, ceil_mode=True)}\nr",
            "padding, ceil_mode or divisor_override weigh border values differently",
        ),
        (
            XWB,
            f"y = {conv(stride=3, groups=2)}\nr = {avg_pool('y', 2, 2)}\nr",
            "the convolution's stride 3 is not a multiple of the pool's 2",
        ),
        (
            XWB,
            f"y = {conv(stride=1, groups=2)}\nr = {avg_pool('y', 3, 1)}\nr",
            "the merged kernel would have 5 taps instead of 3",
        ),
        (
            XWB,
            f"y = {conv(stride=2, groups=2)}\nr = {avg_pool('y', 2, 2)}\nr, y",
            "the value of conv_transpose is also used elsewhere",
        ),
    ],
)
def test_average_pools_that_stay(inputs: str, body: str, reason: str) -> None:
    assert rewrite(program(inputs, body), [POOL], allow=EVERYTHING).reason(POOL.name) == reason


# --- softmax --------------------------------------------------------------------------------------
@pytest.mark.parametrize("softmax", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shift", ["add(y, 2.5)", "add(-1, y)", "sub(y, 3)"])
def test_a_softmax_cancels_a_number(softmax: str, shift: str) -> None:
    source = program("y: f64[2, 3, 4]", f"s = {shift}\nr = {softmax}(s, dim=1)\nr")
    result = rewrite(source, [SOFTMAX])
    assert result.text == f"v0 = {softmax}(x0, dim=1)\nv0"
    agree(result)
    same_gradients(result)
    for seed in range(5):
        same_special(result, [salted(data(source)[0], seed)])


@pytest.mark.parametrize(
    ("shift", "reason"),
    [
        ("sub(2.0, y)", "the value is subtracted from a number, which turns its sign"),
        ("add(y, t)", "the shift is a tensor, which may vary along the softmax"),
        ("add(y, inf)", "add with inf leaves the range of torch.float64"),
        ("sub(y, nan)", "sub with nan leaves the range of torch.float64"),
        ("add(y, 1e16)", "a shift of 1e+16 may be there to round to whole numbers"),
    ],
)
def test_shifts_that_stay_before_the_softmax(shift: str, reason: str) -> None:
    source = program("y: f64[2, 3, 4], t: f64[3, 1]", f"s = {shift}\nr = softmax(s, dim=1)\nr")
    assert rewrite(source, [SOFTMAX]).reason(SOFTMAX.name) == reason


def test_other_shifts_before_a_softmax_stay() -> None:
    used = program("y: f64[2, 3]", "s = add(y, 1.0)\nr = softmax(s, dim=1)\nr, s")
    assert rewrite(used, [SOFTMAX]).reason(SOFTMAX.name) == "the value of add is also used elsewhere"
    whole = program("y: i64[2, 3]", "s = add(y, 1.5)\nr = softmax(s, dim=1)\nr")
    assert rewrite(whole, [SOFTMAX]).reason(SOFTMAX.name) == "the shift changes the dtype"


def test_a_shift_of_the_convolution_vanishes_rather_than_fold() -> None:
    body = f"y = {conv(groups=2)}\na = add(y, 1.0)\nc = clone(a)\ns = sub(c, 0.25)\nr = softmax(s, dim=1)\nr"
    reason = rewrite(program(XWB, body), [FoldShiftIntoConvTranspose()]).reason("FoldShiftIntoConvTranspose")
    assert reason == "the shift vanishes in the softmax instead"
    result = rewrite(program(XWB, body), DEFAULT_RULES)
    assert [i.op for i in result.rewritten.body] == ["conv_transpose", "softmax"]
    agree(result)
