"""Scales of weights behind the convolution: the same values, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from harness import conv, program

from fxfuse.kernels.planning.unfold import unfold
from fxfuse.program import Program

INPUTS = "x: f64[2, 4, 5], w: f64[4, 3, 3], b: f64[6], s: f64[6], t: f64[6]"
MOVED = {
    "a_vector": f"v = scale_weight(w, s, groups=2)\ny = {conv('x, v, None', groups=2)}\ny",
    "with_bias": f"v = scale_weight(w, s, groups=2)\ny = {conv('x, v, b', groups=2)}\nz = relu(y)\nz",
    "a_number": f"v = scale_weight(w, 2.5, groups=2)\ny = {conv('x, v, b', groups=2)}\ny",
    "two": f"u = scale_weight(w, s, groups=2)\nv = scale_weight(u, t, groups=2)\ny = {conv('x, v, b', groups=2)}\ny",
    "the_outer_of_two": (
        f"u = scale_weight(w, s, groups=2)\nv = scale_weight(u, t, groups=2)\ny = {conv('x, v, b', groups=2)}\ny, u"
    ),
}
LEFT = {
    "no_scale": f"y = {conv('x, w, b', groups=2)}\ny",
    "weights_that_an_operator_reads": (
        f"v = scale_weight(w, s, groups=2)\nu = relu(v)\ny = {conv('x, v, None', groups=2)}\ny, u"
    ),
    "weights_of_two_convolutions": (
        f"v = scale_weight(w, s, groups=2)\ny = {conv('x, v, None', groups=2)}\nz = {conv('x, v, b', groups=2)}\ny, z"
    ),
    "weights_that_are_an_output": f"v = scale_weight(w, s, groups=2)\ny = {conv('x, v, None', groups=2)}\ny, v",
}


def values(made: Program) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn([s or 0 for s in k.shape], dtype=k.dtype) for _, k in made.inputs]


@pytest.mark.parametrize("name", MOVED)
def test_values_stay(name: str) -> None:
    original = program(INPUTS, MOVED[name])
    after = unfold(original)
    after.verify()
    assert [i.op for i in after.body].count("scale_weight") == (1 if name == "the_outer_of_two" else 0)
    for a, b in zip(after.run(values(original)), original.run(values(original)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert unfold(after) == after


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str) -> None:
    original = program(INPUTS, LEFT[name])
    assert unfold(original) == original


@pytest.mark.parametrize("name", MOVED)
def test_numbers_alone_are_left_to_the_kernel(name: str) -> None:
    original = program(INPUTS, MOVED[name])
    assert (unfold(original, numbers=False) == original) == (name == "a_number")


def test_a_number_beside_a_vector_moves_with_it() -> None:
    lines = f"u = scale_weight(w, 2.5, groups=2)\nv = scale_weight(u, t, groups=2)\ny = {conv('x, v, b', groups=2)}\ny"
    after = unfold(program(INPUTS, lines), numbers=False)
    assert "scale_weight" not in {i.op for i in after.body}


def test_names_that_are_taken() -> None:
    """Whatever the chain calls its values, new ones are called otherwise."""
    lines = ["v = scale_weight(w, s, groups=2)", f"y = {conv('x, v, b', groups=2)}"]
    names = [f"{op}_{n}" for op in ("conv_transpose", "mul", "add", "reshape") for n in range(44, 54)]
    lines += [f"{name} = relu(y)" for name in names]
    original = program(INPUTS, "\n".join([*lines, ", ".join(["y", *names])]))
    after = unfold(original)
    after.verify()
    outs = [o for i in after.body for o in i.outs]
    assert len(set(outs)) == len(outs) and "scale_weight" not in {i.op for i in after.body}
    for a, b in zip(after.run(values(original)), original.run(values(original)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
