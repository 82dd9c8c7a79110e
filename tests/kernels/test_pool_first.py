"""Average pools in front of arithmetic: the same values, and what keeps a pool where it is."""

from __future__ import annotations

import pytest
import torch
from harness import program

from fxfuse.instr import TensorType
from fxfuse.kernels.planning.observe import observe
from fxfuse.kernels.stages.means import pool_first
from fxfuse.program import Program

INPUTS = "x: f32[2, 3, 4, 6, 5], c: f32[3, 1, 1, 1], n: f32[2, 3, 1, 1, 1], w: f32[5], r: f32[2, 3, 4, 6, 5], s: f32[1]"
POOL = (
    "p = avg_pool(z, kernel=(2, 2, 2), stride=(2, 2, 2), padding={p}, ceil_mode={c}, count_include_pad=True,"
    " divisor_override={d})"
)
PLAIN = POOL.format(p="(0, 0, 0)", c=False, d=None)


def made(*lines: str, inputs: str = INPUTS, returns: str = "p") -> Program:
    return program(inputs, "\n".join([*lines, returns]))


def moved(original: Program) -> Program:
    inputs = [torch.empty([s or 0 for s in k.shape], dtype=k.dtype) for _, k in original.inputs]
    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in observe(original, inputs).items()}
    found = pool_first(original, types)
    found.verify()
    return found


def check(original: Program, *operators: str) -> None:
    found = moved(original)
    assert [i.op for i in found.body] == list(operators)
    tensors = [torch.randn([s or 0 for s in k.shape]) + 2 for _, k in original.inputs]
    for a, b in zip(found.run(tensors), original.run(tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        f"z = {t}"
        for t in ("mul(x, c)", "sub(x, n)", "sub(n, x)", "add(x, s)", "div(x, c)", "mul(0.5, x)", "sub(1.0, x)")
    ],
)
@pytest.mark.parametrize("pool", [PLAIN, "p = adaptive_avg_pool(z, size=(2, 3, 2))"], ids=["plain", "adaptive"])
def test_one_map(line: str, pool: str) -> None:
    check(made(line, pool), pool.split("(")[0].removeprefix("p = "), line[4:7])


def test_a_normalisation() -> None:
    lines = ["a = sub(x, n)", "b = mul(a, n)", "d = mul(b, c)", "z = add(d, c)"]
    check(made(*lines, PLAIN), "avg_pool", "sub", "mul", "mul", "add")


def test_two_pools() -> None:
    other = PLAIN.replace("p = avg_pool(z", "q = avg_pool(u")
    check(made("z = mul(x, c)", PLAIN, "u = add(x, c)", other, returns="p, q"), "avg_pool", "mul", "avg_pool", "add")


def test_a_pool_passes_what_was_moved_before_it() -> None:
    again = "q = avg_pool(u, kernel=(1, 1, 2), stride=(1, 1, 2), padding=(0, 0, 0), ceil_mode=False,"
    again += " count_include_pad=True, divisor_override=None)"
    lines = ["z = mul(x, c)", PLAIN, "u = add(p, c)", again]
    check(made(*lines, returns="q"), "avg_pool", "avg_pool", "mul", "add")


def test_what_is_in_front_of_the_arithmetic_stays() -> None:
    check(made("a = relu(x)", "z = mul(a, c)", PLAIN), "relu", "avg_pool", "mul")


@pytest.mark.parametrize(
    ("lines", "returns"),
    [
        (["z = mul(x, w)", PLAIN], "p"),  # it varies along w
        (["z = mul(x, r)", PLAIN], "p"),
        (["z = mul(x, x)", PLAIN], "p"),
        (["z = div(c, x)", PLAIN], "p"),
        (["z = relu(x)", PLAIN], "p"),
        (["z = mul(x, c)", PLAIN], "p, z"),
        (["z = mul(x, c)", PLAIN, "q = exp(z)"], "p, q"),
        (["z = mul(x, c)", POOL.format(p="(1, 1, 1)", c=False, d=None)], "p"),
        (["z = mul(x, c)", POOL.format(p="(0, 0, 0)", c=True, d=None)], "p"),
        (["z = mul(x, c)", POOL.format(p="(0, 0, 0)", c=False, d=3)], "p"),
        (["z = mul(x, c)", PLAIN.split(" = avg")[0] + " = adaptive_max_pool(z, size=(2, 2, 2))"], "p"),
    ],
    ids=["w", "all", "squares", "reciprocals", "relu", "output", "used", "padding", "ceil", "divisor", "maxima"],
)
def test_what_stays(lines: list[str], returns: str) -> None:
    original = made(*lines, returns=returns)
    assert moved(original) == original


def test_half_precision_rounds_elsewhere() -> None:
    original = made("z = mul(x, c)", PLAIN, inputs=INPUTS.replace("f32", "f16"))
    assert moved(original) == original


def test_names_are_new() -> None:
    original = made("x_pooled = exp(x)", "z = mul(x, c)", PLAIN, returns="p, x_pooled")
    check(original, "exp", "avg_pool", "mul")
