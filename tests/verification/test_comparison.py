"""One tensor beside eager mode's and the truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.tolerance import ROUNDING, TF32, allowed, rounding
from fxfuse.verification.comparison import Comparison, Kind, Specials, compare, worst_of

NAN, INF = math.nan, math.inf


def compared(got: Any, eager: Any, truth: Tensor | None = None, **more: Any) -> Comparison:
    return compare("output", Kind.OUTPUT, got, eager, truth, **more)


def values(*numbers: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def test_limits() -> None:
    assert allowed(0.0, torch.float32) == ROUNDING[torch.float32] == 1e-5
    assert allowed(1e-3, torch.float32) == 2e-3 and allowed(3e-3, torch.float32, tf32=True) == 6e-3
    assert rounding(torch.float32, tf32=True) == TF32 and rounding(torch.float16, tf32=True) == ROUNDING[torch.float16]
    assert rounding(torch.float8_e4m3fn) == 0.1


def test_errors_are_against_the_truth() -> None:
    truth = values(3.0, 4.0, dtype=torch.float64)
    found = compared(values(3.0, 4.5), values(3.0, 4.25), truth)
    assert (found.error, found.own, found.limit) == pytest.approx((0.1, 0.05, 0.1))
    assert found.ok and found.reason is None
    found = compared(values(3.0, 4.6), values(3.0, 4.25), truth)
    assert not found.ok
    assert found.reason == "output is 1.20e-01 from the truth, eager mode 5.00e-02; at most 1.00e-01 is expected"


def test_the_worst_elements() -> None:
    eager = torch.arange(24.0).reshape(2, 3, 4)
    got = eager.clone()
    got[1, 2, 0], got[0, 1, 3], got[1, 1, 1], got[0, 0, 0] = 99.0, 9.0, 18.0, 0.5
    found = compared(got, eager)
    assert [e.index for e in found.worst] == [(1, 2, 0), (0, 1, 3), (1, 1, 1)]
    assert str(found.worst[0]) == "[1, 2, 0] truth 20, eager 20, optimised 99"
    assert compared(eager, eager).worst == ()


@pytest.mark.parametrize(
    ("got", "eager", "truth", "mismatches"),
    [
        ((1.0, NAN), (1.0, NAN), (1.0, NAN), 0),
        ((1.0, NAN), (1.0, 2.0), (1.0, 2.0), 1),
        ((1.0, 2.0), (1.0, NAN), (1.0, NAN), 1),
        ((1.0, INF), (1.0, -INF), (1.0, -INF), 1),
        ((1.0, INF), (1.0, NAN), (1.0, NAN), 1),
        ((1.0, INF), (1.0, INF), (1.0, 1e5), 0),  # eager mode overflows
        ((1.0, 1e5), (1.0, INF), (1.0, 1e5), 0),  # and the optimised model does not
    ],
)
def test_inf_and_nan(got: Any, eager: Any, truth: Any, mismatches: int) -> None:
    found = compared(values(*got), values(*eager), values(*truth, dtype=torch.float64))
    assert found.mismatches == mismatches and found.ok == (mismatches == 0) and found.error == 0
    if mismatches:
        assert found.worst[0].index == (1,) and "1 element has Inf or NaN" in str(found.reason)


def test_how_much_inf_and_nan_count() -> None:
    got, eager = values(1.0, INF, 2.0), values(1.0, NAN, 2.0)
    assert not compared(got, eager).ok
    assert compared(got, eager, specials=Specials.EITHER).ok
    assert compared(values(1.0, 7.0, 2.0), eager, specials=Specials.EITHER).mismatches == 1
    assert compared(values(1.0, 7.0, 2.0), eager, specials=Specials.ANY).ok
    assert not compared(values(1.0, 7.0, 3.0), eager, specials=Specials.ANY).ok


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    eager = torch.tensor([0, 1, 1, 0], dtype=dtype)
    assert compared(eager.clone(), eager, eager.double()).ok
    found = compared(torch.tensor([0, 1, 0, 0], dtype=dtype), eager)
    assert not found.ok and found.mismatches == 1 and found.worst[0].index == (2,)
    assert found.reason == "output: 1 element has another value"


@pytest.mark.parametrize(
    ("got", "eager", "problem"),
    [
        (torch.ones(2), torch.ones(3), r"shape torch.Size\(\[2\]\) where the original gives"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "dtype torch.float32 where"),
        (1.0, torch.ones(2), "no tensor"),
        (1.0, 2.0, "1.0 where the model gives 2.0"),
    ],
)
def test_nothing_to_compare(got: Any, eager: Any, problem: str) -> None:
    found = compared(got, eager)
    assert not found.ok
    with pytest.raises(AssertionError, match=f"output: {problem}"):
        raise AssertionError(found.reason)
    assert compared(eager, eager).ok


def test_complex_numbers() -> None:
    eager = torch.tensor([1 + 1j, 2 - 3j])
    assert compared(eager.clone(), eager).ok
    assert compared(torch.tensor([1 + 1j, 2 + 3j]), eager).worst[0].index == (1, 1)


def test_noise_is_asked_for_only_in_doubt() -> None:
    asked: list[float] = []

    def noise(size: float) -> Any:
        return lambda: asked.append(size) or size

    one, other, truth = values(1e-8), values(-3e-8), values(1e-20, dtype=torch.float64)
    assert compared(other, one, truth, noise=noise(1e12)).ok and asked == [1e12]
    assert not compared(other, one, truth, noise=noise(1e11)).ok
    assert compared(one, one, truth, noise=noise(0.0)).ok and len(asked) == 2


def test_the_worst_of_several() -> None:
    right, near = (Comparison("a", Kind.OUTPUT, "", error=e, limit=1.0) for e in (0.1, 0.9))
    wrong = Comparison("a", Kind.OUTPUT, "", mismatches=1, limit=1.0)
    assert worst_of([right, near]) is near and worst_of([near, wrong, right]) is wrong
