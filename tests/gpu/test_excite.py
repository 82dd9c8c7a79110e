"""Squeeze and excitation on a GPU, or an emulated one, against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs, what_torch_has
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

LAST = torch.channels_last_3d


class Excited(nn.Module):
    """A layer whose channels are weighted by what two products make of their means."""

    def __init__(self, hidden: int, *, linear: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(16, 40, 3, stride=2, padding=1, output_padding=1)
        self.linear = linear
        kind = nn.Linear if linear else lambda i, o: nn.Conv3d(i, o, 1)
        self.down, self.again = kind(40, hidden), kind(hidden, 40)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        means = y.mean((2, 3, 4)) if self.linear else F.adaptive_avg_pool3d(y, 1)
        weight = self.again(F.relu(self.down(means))).sigmoid()
        return y * weight.view(*y.shape[:2], 1, 1, 1)


@pytest.fixture(autouse=True, params=[False, True], ids=["once", "twice"])
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    with kernels_always(twice=request.param, gathered=True):
        yield request.param


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "linear"), [(5, True), (5, False), (64, True)], ids=str)
def test_excited(hidden: int, linear: bool, dtype: torch.dtype, last: bool, kernels: bool) -> None:
    """The products of 64 are a kernel each. Twice the same bits; another batch; and what is not finite stays apart."""
    torch.manual_seed(0)
    model, x = Excited(hidden, linear=linear).to(DEVICE, dtype), torch.randn(3, 16, 4, 5, 6, device=DEVICE).to(dtype)
    x[1, 2, 1, 2, 3] = torch.inf
    if last:
        model, x = model.to(memory_format=LAST), x.contiguous(memory_format=LAST)
    with torch.no_grad(), what_torch_has():
        fast = fxfuse.optimize(copy.deepcopy(model), x)
        fast(x), fast(x[:2])  # a graph for each: sizes are read, and a first call is compared with the model's
        with ops.watch() as runs:
            got, again, fewer = fast(x), fast(x), fast(x[:2])
        truth = copy.deepcopy(model).double()(x.double())
    assert [r.path for r in runs] == [Path.KERNEL] * 3
    plans = [str(p.schedule) for p in execute._prepared.values() if p is not None]
    small = ["linear > relu > linear"] if hidden == 5 else ["linear > relu;", "linear > sigmoid;"]
    assert all(s in plan for s in small for plan in plans), plans
    assert all(("the convolution again" in plan) == kernels for plan in plans), plans
    assert torch.equal(got.isnan(), truth.isnan()) and torch.equal(got.isnan(), again.isnan())
    assert torch.equal(got[::2], again[::2])
    limit = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert all(relative_error(got[i], truth[i]) < limit for i in (0, 2))
    assert relative_error(fewer[0], truth[0]) < limit
