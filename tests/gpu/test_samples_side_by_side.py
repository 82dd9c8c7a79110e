"""Samples side by side in the rows of matrix instructions, on a GPU or an emulated one, against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from orientation import sets_always
from place import DEVICE, kernels_always, needs
from torch import Tensor, nn

import fxfuse
from fxfuse.compare import relative_error
from fxfuse.kernels import execute

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

F32, F16 = torch.float32, torch.float16
LIMIT = {F32: 1e-3, F16: 2e-3}
TWO = {"stride": 2, "padding": 1}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always(planes=False):
        yield


def model_of(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "a generator": (nn.Sequential(nn.ConvTranspose3d(64, 40, 4, **TWO), nn.ReLU()), (64, 64, 4, 4, 4)),
        "absent samples": (nn.ConvTranspose3d(24, 24, 3, **TWO), (17, 24, 3, 5, 2)),
        "a plane": (nn.ConvTranspose2d(32, 24, 4, **TWO), (40, 32, 7, 7)),
        "a row": (nn.ConvTranspose1d(32, 24, 5), (70, 32, 3)),
        "groups": (nn.ConvTranspose3d(32, 48, 3, groups=2, padding=1), (9, 32, 4, 4, 4)),
    }
    return made[name]


def run(model: nn.Module, x: Tensor) -> Tensor:
    """What kernels with sets make of x, twice the same bits."""
    fast = fxfuse.optimize(model)
    with torch.no_grad(), sets_always():
        fast(x)  # which is captured, and compared with the model
        execute.forget()
        got = fast(x)
        assert torch.equal(got.nan_to_num(), fast(x).nan_to_num())
        (made,) = [p for p in execute._prepared.values() if p is not None]
        assert made.convolution is not None and made.convolution.made.samples > 1
        execute.forget()
    return got


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", ["a generator", "absent samples", "a plane", "a row", "groups"])
def test_sets(name: str, dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(0)
    model, shape = model_of(name)
    if last and len(shape) == 3:
        return
    memory = {True: {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)), False: None}[last]
    model, x = model.to(DEVICE, dtype).eval(), torch.randn(shape, device=DEVICE).to(dtype)
    if memory is not None:
        model, x = model.to(memory_format=memory), x.contiguous(memory_format=memory)
    expected = copy.deepcopy(model).double()(x.double())
    assert relative_error(run(model, x), expected) < LIMIT[dtype]


def test_samples_by_themselves() -> None:
    torch.manual_seed(0)
    model = nn.ConvTranspose3d(32, 24, 4, **TWO).to(DEVICE).eval()
    x = torch.randn(20, 32, 4, 4, 4, device=DEVICE)
    x *= torch.tensor([1e30 if n == 3 else 7.0**n for n in range(20)], device=DEVICE).view(-1, 1, 1, 1, 1)
    x[5, 1, 2, 1, 0] = math.inf
    expected, got = copy.deepcopy(model).double()(x.double()), run(model, x)
    for n in range(20):
        if n != 5:
            assert relative_error(got[n : n + 1], expected[n : n + 1]) < LIMIT[F32]
    assert not got[5].isfinite().all()
