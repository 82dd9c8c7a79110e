"""Small models written out, and what becomes of them: which operators their regions have, and the same results."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from agreement import assert_agree
from strategies import Chain
from torch import Tensor, nn

from fxfuse.kernels.plan import Path
from fxfuse.report import Report

CONV = "nn.ConvTranspose2d(2, 3, 3, padding=1)"
SAME = "nn.ConvTranspose2d(2, 2, 1)"
#: lines of a forward behind v0 = self.m0(x)
Lines = tuple[str, ...]


def chain(*lines: str, modules: tuple[str, ...] = (CONV,), train: bool = False, export: bool = False) -> Chain:
    """A model; its last line names the outputs."""
    *body, last = lines
    named = tuple((f"m{i}", text) for i, text in enumerate(modules))
    outputs = tuple(last.removeprefix("return ").split(", "))
    return Chain((2, 2, 4, 5), named, (), ("v0 = self.m0(x)", *body), outputs, train, export)


def agree(model: nn.Module, shape: tuple[int, ...] = (2, 2, 4, 5), **options: Any) -> Report:
    """The optimised model does what the model does, with and without gradients, on every path; its report."""

    def make(gradients: bool) -> tuple[Tensor]:
        return (torch.randn(shape, dtype=torch.float64, requires_grad=gradients),)

    with torch.no_grad():
        optimized, _ = assert_agree(model, lambda: make(False), **options)
    if _differentiable(model, *make(True)):
        with mock.patch("fxfuse.ops.choose", return_value=Path.RECOMPUTE):
            assert_agree(model, lambda: make(True), **options)
        optimized, _ = assert_agree(model, lambda: make(True), **options)
    return optimized.fxfuse_report  # type: ignore[return-value]


def _differentiable(model: nn.Module, x: Tensor) -> bool:
    """Whether eager mode can: not every value that a backward needs may be written to in place."""
    try:
        result = copy.deepcopy(model)(x)
        sum(t.sum() for t in (result if isinstance(result, tuple) else (result,)) if t.requires_grad).backward()
    except (RuntimeError, AttributeError):
        return False
    return True


def chains_of(report: Report) -> list[str]:
    return [" > ".join(i.op for i in r.region.original.body) for r in report.regions]


def ended(report: Report) -> dict[str, str]:
    return {node: reason for region in report.regions for node, reason in region.ended}
