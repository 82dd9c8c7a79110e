"""Reductions of reshaped values: which dims they are over before the reshape, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from harness import agree, conv, data, program, rewrite, salted, same_gradients, same_special
from hypothesis import assume, given
from hypothesis import strategies as st

from fxfuse.patterns import DEFAULT_RULES, CollapseMeanOfConvTranspose, ReduceBeforeReshape

RULE = ReduceBeforeReshape()
REDUCTIONS = (
    "sum({0}, dims={1}, keepdim={2})", "mean({0}, dims={1}, keepdim={2})", "amax({0}, dims={1}, keepdim={2})",
    "amin({0}, dims={1}, keepdim={2})", "logsumexp({0}, dims={1}, keepdim={2})",
    "var({0}, dims={1}, correction=1.0, keepdim={2})", "std({0}, dims={1}, correction=0.0, keepdim={2})",
    "vector_norm({0}, ord=2.0, dims={1}, keepdim={2})",
)  # fmt: skip


def test_the_rule_is_one_that_optimize_applies() -> None:
    assert any(type(r) is ReduceBeforeReshape for r in DEFAULT_RULES)
    assert not RULE.forward_only and RULE.legality.value == "reassociating"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_flattened_is_reduced_as_it_was(reduction: str) -> None:
    source = program(
        "x: f64[2, 3, 4, 1, 5]", f"r = reshape(x, shape=(2, 3, 20))\ny = {reduction.format('r', (2,), False)}\ny"
    )
    result = rewrite(source, [RULE])
    assert result.text == f"v0 = {reduction.format('x0', (2, 3, 4), False)}\nv0"
    agree(result)
    same_gradients(result)
    same_special(result, [salted(t, 3) for t in data(source)])


def test_dims_that_stay_have_size_one_as_before() -> None:
    source = program("x: f64[2, 3, 4, 5]", "r = reshape(x, shape=(6, 20))\ny = mean(r, dims=(0,), keepdim=True)\ny")
    result = rewrite(source, [RULE])
    assert result.text == "v0 = mean(x0, dims=(0, 1), keepdim=False)\nv1 = reshape(v0, shape=(1, 20))\nv1"
    agree(result)
    assert rewrite(result.rewritten, [RULE]).rules == []


def test_a_flattened_mean_of_a_convolution_collapses() -> None:
    """The idiom ``y.view(n, c, -1).mean(-1)``, of which nothing but a small product is left."""
    source = program(
        "x: f64[2, 4, 5], w: f64[4, 6, 3], b: f64[6]",
        f"y = {conv()}\nr = reshape(y, shape=(2, 2, 3, 7))\nz = mean(r, dims=(3,), keepdim=False)\nz",
    )
    result = rewrite(source, [RULE, CollapseMeanOfConvTranspose()])
    assert [*result.rules] == [RULE.name, "CollapseMeanOfConvTranspose"]
    agree(result)
    same_gradients(result)


@pytest.mark.parametrize(
    ("shape", "dims", "reason"),
    [
        ((2, 12, 5), (1,), None), ((2, 60), (1,), None), ((2, 3, 1, 4, 1, 5), (3,), None), ((6, 4, 5), (0,), None),
        ((2, 3, 2, 2, 5), (2, 3), None), ((120,), (0,), None), ((2, 3, 4, 5, 1), (3, 4), None),
        ((2, 3, 2, 2, 5), (2,), "the reshape mixes dims that are reduced with others"),
        ((2, 3, 2, 10), (3,), "the reshape mixes dims that are reduced with others"),
        ((2, 3, 1, 4, 5), (2,), "dims of size 1 alone are reduced"),
    ],
)  # fmt: skip
def test_which_dims(shape: tuple[int, ...], dims: tuple[int, ...], reason: str | None) -> None:
    source = program("x: f64[2, 3, 4, 5]", f"r = reshape(x, shape={shape})\ny = amax(r, dims={dims}, keepdim=False)\ny")
    result = rewrite(source, [RULE])
    assert (result.reason(RULE.name) if reason else None) == reason
    assert result.rules == ([] if reason else [RULE.name])
    agree(result, bitwise=True)


def test_nothing_to_reduce_is_left_alone() -> None:
    source = program("x: f64[2, 0, 4]", "r = reshape(x, shape=(2, 0))\ny = sum(r, dims=(1,), keepdim=False)\ny")
    assert rewrite(source, [RULE]).reason(RULE.name) == "there is nothing to reduce"


def test_a_reshaped_value_that_others_read_is_read_by_the_reduction_too() -> None:
    source = program("x: f64[2, 3, 4]", "r = reshape(x, shape=(2, 12))\ny = sum(r, dims=(1,), keepdim=False)\nr, y")
    result = rewrite(source, [RULE])
    assert result.rules == [] and "used elsewhere" in result.reason(RULE.name)


@given(st.data())
def test_any_reshape(draw: st.DataObject) -> None:
    """It fires where some dims are what is reduced, told by trying all of them, and nowhere else."""
    factors = draw.draw(st.lists(st.sampled_from([1, 2, 3, 2]), min_size=2, max_size=5))
    before, after = (_grouped(draw, factors) for _ in range(2))
    dims = tuple(sorted(draw.draw(st.sets(st.integers(0, len(after) - 1), min_size=1))))
    keepdim = draw.draw(st.booleans())
    assume(len(before) <= 5)
    reduction = draw.draw(st.sampled_from(REDUCTIONS)).format("r", dims, keepdim)
    source = program(f"x: f64[{', '.join(map(str, before))}]", f"r = reshape(x, shape={after})\ny = {reduction}\ny")
    result = rewrite(source, [RULE])
    torch.manual_seed(0)
    x = torch.rand(before, dtype=torch.float64)
    wanted = x.reshape(after).sum(dims)
    tried = [
        s
        for count in range(1, len(before) + 1)
        for s in itertools.combinations(range(len(before)), count)
        if math.prod(before[d] for d in s) == math.prod(after[d] for d in dims)
        and (found := x.sum(s)).numel() == wanted.numel()
        and torch.allclose(found.flatten(), wanted.flatten(), rtol=1e-12)
    ]
    if result.rules:
        assert tried
        agree(result)
        if math.prod(after[d] for d in dims) > 1:  # of one element there is no deviation
            same_gradients(result)
    else:
        assert not tried or math.prod(after[d] for d in dims) == 1


def _grouped(draw: st.DataObject, factors: list[int]) -> tuple[int, ...]:
    """Sizes that are products of neighbouring factors."""
    found = [factors[0]]
    for factor in factors[1:]:
        if draw.draw(st.booleans()):
            found.append(factor)
        else:
            found[-1] *= factor
    return tuple(found)
