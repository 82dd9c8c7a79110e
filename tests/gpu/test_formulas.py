"""Functions of pointwise.cuh that a GPU computes in another way than a host does, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from place import DEVICE, kernels_always, needs
from stages import what_torch_has
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((7, 0))

#: numerators are normal numbers: cuDNN, which makes them, may flush others
OF = [1.0, -3.0, 1e-37, -1e-30, 1e-10, 7e9, 1e25, -3.3e38, 0.0, math.inf, -math.inf, math.nan]
BY = [
    1.0,
    -7.0,
    1e-45,
    3e-40,
    -1e-38,
    2e-20,
    1e-12,
    3e10,
    -1e25,
    1e38,
    3.4e38,
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
]


class Of(nn.Module):
    """A function of what a convolution by one makes, and of a tensor of the same size or of one number per channel.

    What no rule sees through is in front of a division: factors of channels go into weights.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], other: Tensor) -> None:
        super().__init__()
        self.layer, self.function = nn.ConvTranspose3d(1, 1, 1, bias=False), function
        nn.init.ones_(self.layer.weight)
        self.other = nn.Parameter(other)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x), self.other)


def check(model: nn.Module, x: Tensor, expected: Tensor, units: float) -> None:
    convolves = mock.patch.object(execute, "slower", return_value="it is torch's turn")
    exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with kernels_always(), convolves, exactly, torch.no_grad(), what_torch_has():
        fast = fxfuse.optimize(model, (x,))
        with ops.watch() as runs:
            got = fast(x).cpu()
    assert [r.path for r in runs] == [Path.KERNEL]
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])
    rounded = expected.float()
    infinite = rounded.isinf()
    assert torch.equal(got[infinite], rounded[infinite])
    there = ~infinite & ~expected.isnan()
    unit = torch.maximum(expected[there].abs() * 2.0**-24, torch.tensor(2.0**-150, dtype=torch.float64))
    assert bool(((got.double() - expected)[there].abs() <= unit * units).all())


@pytest.mark.parametrize("size", [len(OF) * len(BY), 4096])
def test_division(size: int) -> None:
    """Of all pairs of such numbers, and of random ones of any size, in a plane."""
    torch.manual_seed(1)
    random = torch.randn(2, 4096) * 2.0 ** torch.randint(-60, 60, (2, 4096))
    a, b = random if size == 4096 else torch.cartesian_prod(torch.tensor(OF), torch.tensor(BY)).t()
    a, b = (t.reshape(1, 1, 1, -1, 16).float().to(DEVICE) for t in (a, b))
    check(Of(lambda y, r: torch.minimum(y, y) / r, b).to(DEVICE), a, a.cpu().double() / b.cpu().double(), 2.5)


@pytest.mark.parametrize("by", BY)
def test_division_by_one_number_of_a_channel(by: float) -> None:
    a = torch.tensor([*OF, 1.5, 2.5, 3.5, 4.5]).reshape(1, 1, 1, 1, 16).to(DEVICE)
    b = torch.tensor([by]).reshape(1, 1, 1, 1).to(DEVICE)
    check(Of(lambda y, r: torch.minimum(y, y) / r, b).to(DEVICE), a, a.cpu().double() / b.cpu().double(), 4.0)
