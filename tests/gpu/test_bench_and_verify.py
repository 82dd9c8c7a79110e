"""On a GPU: verification of what kernels compute, and the benchmark's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import bench
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path
from fxfuse.kernels.runtime import recent
from fxfuse.models import CASES, Case
from fxfuse.tolerance import TF32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def decoder() -> nn.Module:
    """Large enough for a kernel to be worth it."""
    return nn.Sequential(nn.ConvTranspose3d(32, 64, 3, stride=2), nn.ReLU(), nn.MaxPool3d(2)).cuda().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_models_are_right(case: Case, dtype: torch.dtype) -> None:
    model = case.make().to("cuda", dtype).eval()
    report = fxfuse.verify(None, fxfuse.optimize(model), torch.randn(case.small, device="cuda", dtype=dtype))
    assert report.ok and report.truth == "float64", report


def test_a_kernel_is_what_is_checked() -> None:
    x = torch.randn(2, 32, 24, 24, 24, device="cuda")
    report = fxfuse.verify(None, fxfuse.optimize(decoder(), x), x)
    (region,) = report.regions
    assert report.ok and region.path is Path.KERNEL, report
    assert region.ran.limit >= TF32 or not torch.backends.cudnn.allow_tf32


def test_a_wrong_kernel_is_told_from_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    right = execute.run

    def wrong(region: fxfuse.Region, inputs: Sequence[Tensor], key: Any) -> Any:
        outputs = right(region, inputs, key)
        assert outputs is not None
        return [t + 0.1 for t in outputs]

    x = torch.randn(2, 32, 24, 24, 24, device="cuda")
    optimised = fxfuse.optimize(decoder(), x)
    monkeypatch.setattr(execute, "run", wrong)
    for way in (execute, recent):  # what a call like the last one goes by
        monkeypatch.setattr(way, "find", lambda *_: None)
    report = fxfuse.verify(None, optimised, x)
    assert "the rewrites are right and its kernels are not" in report.failures[0]


@pytest.mark.serial
def test_measure() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    row = bench.measure(
        "decoder", decoder(), [(2, 32, 24, 24, 24)], dtype=torch.float32, device=device,
        peers=[bench.PEERS["eager"], bench.PEERS["channels_last"]], machine=bench.Machine.of(device),
    )  # fmt: skip
    ways = {"eager", "channels_last_3d", "fxfuse", "fxfuse channels_last_3d"}
    assert not row.failed and {*row.ms} == {*row.peak} == {*row.first} == ways
    assert all(p > 0 for p in row.peak.values()) and row.peak["fxfuse"] <= row.peak["eager"]
    assert 0 < row.floor < min(row.ms.values()) and "one kernel" in row.plan["fxfuse"]
