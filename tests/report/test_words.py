"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from fxfuse.report import words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.1, "0.1 s"), (0.0342, "34 ms"), (4.96e-4, "0.5 ms"), (1e-4, "0.1 ms"), (9.94e-5, "99 us")],
)
def test_durations_have_two_digits(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(504, "504 B"), (1024, "1.02 kB"), (32768, "32.8 kB"), (6.5e8, "650 MB"), (1.94e9, "1.94 GB")]
)
def test_sizes_have_three_digits(number: float, text: str) -> None:
    assert words.size(number) == text


def test_operations() -> None:
    assert [words.operations(n) for n in (12, 3e6, 1.34e10, 2e12)] == [
        "12 FLOP",
        "3.00 MFLOP",
        "13.4 GFLOP",
        "2.00 TFLOP",
    ]


def test_plurals() -> None:
    assert [words.count(n, "launch") for n in (1, 2)] == ["1 launch", "2 launches"]
    assert words.count(3, "kernel") == "3 kernels"
