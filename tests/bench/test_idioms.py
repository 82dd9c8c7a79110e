"""Chains as models write them: each has a name of its own, takes its input, and is fused."""

from __future__ import annotations

import copy

import pytest
import torch

import fxfuse
from fxfuse.bench.idioms import IDIOMS
from fxfuse.models import Case


def test_names() -> None:
    assert len({case.name for case in IDIOMS}) == len(IDIOMS)
    assert all(case.name.endswith("x".join(map(str, case.shape))) for case in IDIOMS)


@pytest.mark.parametrize("case", IDIOMS, ids=lambda case: case.name.split(",")[0])
def test_they_run_and_are_fused(case: Case) -> None:
    """As they are written, on a GPU's sizes without memory; and fused, on small ones where no parameter has a size."""
    model = case.make().eval()
    assert copy.deepcopy(model).to("meta")(torch.empty(case.shape, device="meta")).numel() > 0
    if "Norm(w)" in case.name or "Norm(h, w)" in case.name:
        return
    torch.manual_seed(0)
    x = torch.randn(1, case.shape[1], 4, 8, 8)
    fast = fxfuse.optimize(model, (x,))
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(fast.fxfuse_report.regions) == 1
