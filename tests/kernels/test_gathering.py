"""Maxima and softmaxes over all of space: gathered by the convolution's kernel, or made of rows by another."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from harness import program
from reports import explained

from fxfuse.bench import idioms
from fxfuse.instr import TensorType
from fxfuse.kernels import execute
from fxfuse.kernels.account import account_of
from fxfuse.kernels.codegen.reductions import Rows
from fxfuse.kernels.execute import candidates
from fxfuse.kernels.planning import estimate
from fxfuse.kernels.planning.candidate import Candidate
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import gathering, schedule
from fxfuse.kernels.stages.steps import Map
from fxfuse.program import Program
from fxfuse.region import Region

INPUTS = "x: {}[32, 16, 16, 24, 24], w: {}[16, 48, 3, 3, 3], b: {}[48], g: {}[48]"
CONV = (
    "y = conv_transpose(x, w, b, stride=(2, 2, 2), padding=(1, 1, 1), output_padding=(1, 1, 1), dilation=(1, 1, 1), "
    "groups=1)"
)
KIND = "[32, 48, 32, 48, 48]"
FLAT = "t = reshape({}, shape=(32, 48, 73728))"
BACK = "z = reshape(u, shape=(32, 48, 32, 48, 48))"
SPACE = "dims=(2, 3, 4), keepdim=True)"


def chain(*lines: str, dtype: str = "f32", returns: str | None = None) -> Program:
    last = lines[-1].split(" = ")[0]
    return program(INPUTS.replace("{}", dtype), "\n".join([CONV, *lines, returns or last]))


def softmax_of(value: str, op: str = "softmax") -> list[str]:
    return [FLAT.format(value), f"u = {op}(t, dim=2)", BACK]


def gathered(*lines: str, returns: str | None = None) -> str | None:
    made = chain(*lines, returns=returns)
    found = gathering(made, examples(made))
    return None if found is None else str(found[0])


# --- what is gathered -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "plan"),
    [
        (
            ["a = relu(y)", *softmax_of("a")],
            f"one kernel: conv_transpose > relu -> f32{KIND} and exponentials; then exponentials of a, gathered on the "
            f"way; then one kernel: exp_below > mul -> f32{KIND}",
        ),
        (
            softmax_of("y", "log_softmax"),
            f"one kernel: conv_transpose -> f32{KIND} and exponentials; then exponentials of y, gathered on the way; "
            f"then one kernel: sub > sub -> f32{KIND}",
        ),
        (
            ["a = tanh(y)", f"m = amin(a, {SPACE}"],
            "one kernel: conv_transpose > tanh -> extremes; then extremes of a, gathered on the way; then one kernel "
            "on small tensors: reshape",
        ),
        (
            ["m = adaptive_max_pool(y, size=(1, 1, 1))", "v = exp(m)"],
            "one kernel: conv_transpose -> extremes; then extremes of y, gathered on the way; then one kernel on small "
            "tensors: reshape; then one kernel: exp -> f32[32, 48, 1, 1, 1]",
        ),
        (
            [f"m = logsumexp(y, {SPACE}", "v = sub(y, m)", f"q = mean(y, {SPACE}", "o = mul(v, q)"],
            f"one kernel: conv_transpose -> f32{KIND} and statistics and exponentials; then statistics and "
            f"exponentials of y, gathered on the way; then one kernel: sub > mul -> f32{KIND}",
        ),
    ],
    ids=["softmax", "log_softmax", "amin", "adaptive_max_pool", "logsumexp"],
)  # fmt: skip
def test_what_is_gathered(lines: list[str], plan: str) -> None:
    assert gathered(*lines) == plan


@pytest.mark.parametrize(
    "lines",
    [
        ["z = relu(y)"],
        ["z = instance_norm(y, g, None, eps=1e-5)"],  # as ever
        ["z = softmax(y, dim=1)", f"m = amax(z, {SPACE}"],  # the kernel reduces channels
        ["z = instance_norm(y, g, None, eps=1e-5)", f"m = amax(z, {SPACE}"],  # of what another kernel makes
        ["m = amax(y, dims=(1, 2, 3, 4), keepdim=True)"],
        ["m = amax(y, dims=(0, 2, 3, 4), keepdim=True)"],
        ["z = softmax(y, dim=4)"],
        ["m = adaptive_max_pool(y, size=(2, 1, 1))"],
    ],
    ids=["none", "a_norm", "behind_a_reduction", "another_value", "channels_too", "samples_too", "rows", "windows"],
)  # fmt: skip
def test_what_is_not(lines: list[str]) -> None:
    made = chain(*lines)
    assert gathered(*lines) is None
    assert "extremes" not in str(next(candidates(made, examples(made), exact=False, hopper=True)))


def test_what_other_kernels_make_has_rows() -> None:
    """Behind the value that is gathered, and behind torch's convolution."""
    found = gathered(f"m = amax(y, {SPACE}", "a = sub(y, m)", *softmax_of("a"))
    assert found is not None and found.endswith(
        f"gathered on the way; then one kernel: sub > softmax_over -> f32{KIND}"
    )
    made = chain(*softmax_of("y"))
    plan = str(schedule(made, examples(made), anchored=False))
    assert "exponentials" not in plan and "softmax_over" in plan


# --- what is chosen -------------------------------------------------------------------------------
@functools.cache
def region(name: str, dtype: torch.dtype) -> Region:
    case = next(c for c in idioms.IDIOMS if name in c.name)
    return explained(case.make().eval(), case.shape, dtype=dtype).regions[0].region


def ways(name: str, dtype: torch.dtype = torch.float32) -> list[Candidate]:
    made = region(name, dtype).rewritten
    return list(candidates(made, examples(made), exact=False, hopper=True))


OVER_SPACE, ATTENDED, LARGEST = "softmax over space", "* sigmoid(max + mean over space)", "AdaptiveMaxPool(1)"


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "f32"), (torch.float16, "f16")], ids=["f32", "f16"])
def test_a_softmax_over_space(dtype: torch.dtype, name: str) -> None:
    """Two runs: a kernel that goes through rows reads twice what is stored, or waits for exponentials."""
    plan = str(ways(OVER_SPACE, dtype)[0])
    assert plan.startswith(
        f"first one kernel: avg_pool 2x2x2 -> {name}[32, 32, 16, 32, 32]; one kernel: conv_transpose > clamp -> "
        "exponentials; then exponentials of v2, gathered on the way; then the convolution again: conv_transpose > clamp"
    )
    assert f" > mul -> {name}[32, 64, 32, 64, 64], from the first run's rows and packed weights (by estimate " in plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_maximum_and_a_mean(dtype: torch.dtype) -> None:
    """Both from one pass over the accumulators."""
    first = ways(ATTENDED, dtype)[0]
    assert first.name == "twice"
    assert str(first).startswith(
        "one kernel: conv_transpose -> statistics and extremes; then statistics and extremes of v0, gathered on the "
        "way; then the convolution again: conv_transpose > "
    )
    account = account_of(region(ATTENDED, dtype), first)
    assert [p.what for p in account.parts if p.by == "helper"] == ["statistics and extremes, added up"]


def test_a_maximum_alone() -> None:
    """Of what the kernel stores nothing is left; the same without a gather is a pool's maximum, and then rows."""
    first, *others = ways(LARGEST)
    assert str(first) == (
        "one kernel: conv_transpose > relu -> extremes; then extremes of v1, gathered on the way; "
        "then one kernel on small tensors: reshape"
    )
    assert [c.name for c in others] == ["cudnn", "torch"]


def test_rows_are_chosen_where_gathering_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "WORTH_GATHERING", 0.0)
    first = ways(LARGEST)[0]
    assert "max_pool 2x2x2" in str(first) and "one kernel: amax" in str(first)
    assert "exponentials" in str(ways(OVER_SPACE)[0])  # of ways that run the convolution twice there is no other
    monkeypatch.setattr(execute, "WORTH_GATHERING", math.inf)
    made = ways(OVER_SPACE, torch.float16)
    assert all("exponentials" in str(c.schedule) for c in made if c.convolution is not None)


def test_products_tell_nothing_of_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three channels moments come from products of x with itself; beside a maximum the convolution runs twice."""
    monkeypatch.setattr(execute, "HOPELESS", math.inf)
    small = "x: f32[64, 3, 32, 32, 32], w: f32[3, 16, 3, 3, 3], b: f32[16], g: f32[16]"
    norm = "z = batch_norm_batch(y, g, None, eps=1e-5)"
    for lines, there in (([norm], True), ([norm, f"m = amax(y, {SPACE}", "o = sub(z, m)"], False)):
        made = program(small, "\n".join([CONV, *lines, lines[-1].split(" = ")[0]]))
        found = [c.name for c in candidates(made, examples(made), exact=False, hopper=True)]
        assert ("products" in found) == there and "twice" in found


# --- what it is expected to take ------------------------------------------------------------------
def test_a_kind_has_its_cost() -> None:
    """An exponential per element costs more than two comparisons; a kind that is gathered beside another adds to it."""
    seconds = {}
    for name, lines in {
        "extremes": [f"m = amax(y, {SPACE}"],
        "exponentials": [f"m = logsumexp(y, {SPACE}"],
        "both": [f"q = logsumexp(y, {SPACE}", f"p = amax(y, {SPACE}", "m = sub(q, p)"],
    }.items():
        made = chain(*lines)
        found = gathering(made, examples(made))
        assert found is not None
        first = Candidate("engine", found[0], execute.convolution_of(found[0].kernel))  # type: ignore[arg-type]
        seconds[name] = execute._seconds(dict(made.inputs), first, False)
    assert seconds["extremes"] < seconds["exponentials"] < seconds["both"]


@pytest.mark.parametrize(("length", "reads"), [(16384, 1), (16385, 2)])
def test_a_row_that_is_not_held_is_read_twice(length: int, reads: int) -> None:
    kind = TensorType(torch.float32, (2, 128, 1, 1, length))
    strides = (128 * length, length, length, length, 1)
    step = Map("x", kind, "y", kind, strides, ("contiguous", "contiguous"), ("softmax",), rows=Rows("Softmax", length))
    work = estimate._by_kernel(step, {"x": kind})
    assert work.read == reads * estimate.size_of(kind) == reads * work.written
