"""Expanded operands of pointwise operators: which views are dropped, and what is left."""

from __future__ import annotations

import pytest
import torch
from harness import agree, data, program, rewrite, salted, same_gradients, same_special
from hypothesis import given
from hypothesis import strategies as st

import fxfuse
from fxfuse.patterns import DEFAULT_RULES, DropExpansions

RULE = DropExpansions()
INPUTS = "x: f64[2, 3, 4], g: f64[2, 3, 1], h: f64[4]"


def test_the_rule_is_one_that_optimize_applies() -> None:
    assert any(type(r) is DropExpansions for r in DEFAULT_RULES)
    assert not RULE.forward_only and RULE.legality.value == "bitwise"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("e = expand(g, shape=(2, 3, 4))\ny = mul(x, e)\ny", "v0 = mul(x0, x1)\nv0"),
        ("e = expand(g, shape=(2, 3, 4))\ny = sub(e, x)\ny", "v0 = sub(x1, x0)\nv0"),
        ("e = expand(h, shape=(2, 3, 4))\ny = lerp(x, e, 0.25)\ny", "v0 = lerp(x0, x2, 0.25)\nv0"),
        ("d = expand(g, shape=(2, 3, 4))\ne = expand(h, shape=(2, 3, 4))\nc = gt(x, d)\ny = where(c, d, e)\ny",
         "v0 = gt(x0, x1)\nv1 = where(v0, x1, x2)\nv1"),
        ("e = expand(g, shape=(2, 3, 4))\nf = expand(e, shape=(5, 2, 3, 4))\ny = mul(x, e)\nz = relu(f)\ny, z",
         "v0 = mul(x0, x1)\nv1 = expand(x1, shape=(2, 3, 4))\nv2 = expand(v1, shape=(5, 2, 3, 4))\nv3 = relu(v2)\n"
         "v0, v3"),
    ],
)  # fmt: skip
def test_a_view_that_broadcasting_makes(body: str, expected: str) -> None:
    result = rewrite(program(INPUTS, body), [RULE])
    assert set(result.rules) == {RULE.name}
    assert sorted(result.text.split("\n")) == sorted(expected.split("\n"))
    agree(result, bitwise=True)
    same_gradients(result)
    same_special(result, [salted(t, 2) for t in data(result.original)])
    assert rewrite(result.rewritten, [RULE]).rules == []


@pytest.mark.parametrize(
    "body",
    [
        "e = expand(g, shape=(2, 3, 4))\ny = relu(e)\ny",  # its result would be smaller
        "e = expand(g, shape=(2, 3, 4))\ny = mul(e, g)\ny",
        "e = expand(g, shape=(5, 2, 3, 4))\ny = mul(e, x)\ny",
        "e = expand(h, shape=(2, 3, 4))\ny = sum(e, dims=(2,), keepdim=False)\ny",
        "e = expand(h, shape=(2, 4, 4))\ny = prelu(e, h)\ny",
    ],
)
def test_a_view_that_makes_the_size(body: str) -> None:
    assert RULE.name not in rewrite(program(INPUTS, body), [RULE]).rules


def test_weights_of_a_prelu_do_not_broadcast() -> None:
    source = program("x: f64[2, 3, 4], s: f64[1]", "e = expand(s, shape=(3,))\ny = prelu(x, e)\ny")
    assert rewrite(source, [RULE]).rules == []


def test_a_tensor_without_dims_is_promoted_otherwise() -> None:
    source = program("x: f16[2, 3], s: f32[()]", "e = expand(s, shape=(2, 3))\ny = mul(x, e)\ny")
    result = rewrite(source, [RULE])
    assert result.rules == []
    agree(result, bitwise=True)


def test_no_operand_has_the_size_of_the_result() -> None:
    """Then torch lays the result out in another order, of an x whose channels are neighbours."""
    convolution = torch.nn.ConvTranspose2d(3, 1, 1)
    g = torch.nn.Parameter(torch.randn(2, 1))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.g = convolution, g

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x) - self.g.expand(1, 1, 2, 2)

    model = Model().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 1, 2).to(memory_format=torch.channels_last)
    fast = fxfuse.optimize(model, (x,))
    assert fast(x).stride() == model(x).stride()


@given(st.data())
def test_any_sizes(draw: st.DataObject) -> None:
    """It fires just where broadcasting without the view makes as many elements."""
    full = draw.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    small, other = ([draw.draw(st.sampled_from([1, s])) for s in full] for _ in range(2))
    own = draw.draw(st.integers(0, len(full) - 1))  # fewer dims
    own = own if all(s == 1 for s in small[:own]) else 0
    inputs = f"x: f64[{', '.join(map(str, other))}], g: f64[{', '.join(map(str, small[own:]))}]"
    result = rewrite(program(inputs, f"e = expand(g, shape={tuple(full)})\ny = add(x, e)\ny"), [RULE])
    made = [max(a, b) for a, b in zip(small, other, strict=True)]
    assert result.rules == ([RULE.name] if made == full else [])
    agree(result, bitwise=True)
