"""Small layers, whose tiles have fewer rows and channels for all of a GPU to have some: the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs, what_torch_has
from stages import LAST, LIMIT, Stages, made, sample, trained
from torch import nn

import fxfuse
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.convolution import adapted
from fxfuse.kernels.convolution.specialisation import Specialisation

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Halved as long as tiles may be, be it worth it or not."""
    halved = mock.patch.object(adapted, "WORTH_HALVING", 0.0)
    with halved, kernels_always(twice="twice" in request.node.name, spread=True):
        yield


TWO = {"stride": 2, "padding": 1}
#: models of 32 input channels, and how many output channels a tile has
CASES: dict[str, tuple[Callable[[torch.dtype], nn.Module], int]] = {
    "alone": (lambda dtype: made(3, 32, 64, 3, dtype=dtype, **TWO), 16),
    "a chain": (lambda dtype: Stages(made(3, 32, 64, 4, dtype=dtype, **TWO), F.silu), 16),
    "channels that fill no tile": (lambda dtype: Stages(made(3, 32, 80, 3, dtype=dtype), F.gelu), 40),
    "a pool": (lambda dtype: Stages(made(3, 32, 64, 3, dtype=dtype, **TWO), F.relu, nn.MaxPool3d(2)), 16),
    "a mean": (lambda dtype: Stages(made(3, 32, 64, 3, dtype=dtype, **TWO), nn.AvgPool3d(2)), 16),
    "a reduction": (lambda dtype: Stages(made(3, 32, 64, 3, dtype=dtype, **TWO), nn.Softmax(1)), 64),
    "statistics": (lambda dtype: trained(made(3, 32, 64, 3, dtype=dtype, **TWO), "group", F.silu), 16),
    "of the batch, twice": (lambda dtype: trained(made(3, 32, 64, 3, dtype=dtype, **TWO), "batch", F.relu), 16),
    "groups": (lambda dtype: made(3, 32, 64, 3, dtype=dtype, groups=2, **TWO), 16),
}


def specialisation() -> Specialisation:
    (found,) = [p for p in execute._prepared.values() if p is not None]
    assert found.convolution is not None
    return found.convolution.made


def check(model: nn.Module, x: torch.Tensor) -> Specialisation:
    truth = model.double()(x.double())
    model.to(x.dtype)
    with torch.no_grad(), what_torch_has():
        fast = fxfuse.optimize(model)
        fast(x)
        got = fast(x)
    assert relative_error(got, truth) <= LIMIT[x.dtype]
    return specialisation()


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tiles_for_all_of_it(name: str, dtype: torch.dtype) -> None:
    make, columns = CASES[name]
    torch.manual_seed(0)
    found = check(make(dtype).to(DEVICE).eval(), sample(1, 32, 5, 6, 8, dtype=dtype))
    assert (found.m_tiles, found.columns) == (1, columns)


def test_both_formats_and_a_row_of_a_sector() -> None:
    for width in (4, 7):
        for last in (False, True):
            torch.manual_seed(0)
            model, x = made(3, 32, 64, 3, **TWO, output_padding=1), sample(2, 32, 3, 4, width)
            if last:
                model, x = model.to(memory_format=LAST[5]), x.contiguous(memory_format=LAST[5])
            assert check(model.eval(), x).m_tiles == 1
            execute.forget()


def test_float32s_own_accuracy() -> None:
    torch.manual_seed(0)
    model, x = made(3, 32, 64, 3, **TWO).eval(), sample(1, 32, 5, 6, 7)
    truth = model.double()(x.double())
    model.float()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fast = fxfuse.optimize(model)
        fast(x)
        got = fast(x)
    assert relative_error(got, truth) <= 5e-7
    assert specialisation().exact and specialisation().column_tiles > 1
