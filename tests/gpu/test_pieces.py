"""Chains of which the partial statistics are merged in pieces, on a GPU or an emulated one, against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from place import kernels_always, needs
from stages import NORMS, check, made, near, sample, steps_run, trained

import fxfuse
from fxfuse.kernels import execute
from fxfuse.kernels.stages import merge

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two slots are worth a block; how many pieces there were."""
    monkeypatch.setattr(merge, "MERGE_SLOTS", 2)
    found: list[int] = []
    count = merge.pieces

    def spy(*sizes: int) -> int:
        found.append(count(*sizes))
        return found[-1]

    for where in ("convolution_engine", "prepared", "tail_engine"):
        monkeypatch.setattr(f"fxfuse.kernels.runtime.{where}.pieces", spy)
    with kernels_always():
        yield found


@pytest.mark.parametrize("norm", NORMS)
def test_on_the_way(norm: str, counts: list[int]) -> None:
    torch.manual_seed(0)
    model = trained(made(3, 4, 20, 3), F.silu, norm, F.hardswish)
    check(model, sample(2, 4, 6, 24, 25), "gathered on the way")
    assert min(counts) > 1


@pytest.mark.parametrize(("norm", "layout"), [("batch", "contiguous"), ("batch", "last"), ("one_group", "contiguous")])
def test_behind_torchs_convolution(norm: str, layout: str, counts: list[int]) -> None:
    torch.manual_seed(0)
    model = trained(made(3, 2, 2, 3), norm)
    x = sample(2, 2, *((32, 32, 32) if layout == "contiguous" else (10, 11, 12)))
    if layout == "last":
        model, x = (t.to(memory_format=torch.channels_last_3d) for t in (model, x))
    with mock.patch.object(execute, "slower", return_value="the test says so"):
        check(model, x, "one pass over")
    assert not counts or min(counts) > 1


def test_samples_that_half_precision_cannot_hold(counts: list[int]) -> None:
    """Of those, every piece has a part of the elements."""
    torch.manual_seed(0)
    model, x = trained(made(3, 4, 12, 3), "instance"), sample(3, 4, 6, 24, 25)
    x[1, 0, 2, 3, 4] = 1e12
    near(model, fxfuse.optimize(copy.deepcopy(model), (x,)), x)
    assert "gathered on the way" in steps_run() and min(counts) > 1
