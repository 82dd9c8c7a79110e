"""Large float32 samples, of which only some values are looked at before they are scaled to half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from place import DEVICE, kernels_always, needs
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels.convolution import kernels as convolution_kernels
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

#: a channel for each number of a row of x, and several positions in a row
CHANNELS = pytest.mark.parametrize("channels", [16, 3])
SIZES = (8, 16, 16)
#: of TF32's ten bits of mantissa; what float32 arithmetic leaves is far below
ROUNDED, FLOAT = 1e-3, 2e-6


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(convolution_kernels, "SAMPLED", 2**9)
    monkeypatch.setattr(convolution_kernels, "SAMPLED_EACH", 2**9)  # one run of values in 64
    with kernels_always(planes=False):
        yield


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "contiguous": lambda x: x,
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        "dense": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    }


def convolved(x: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """What kernels make of x, and the truth."""
    torch.manual_seed(1)
    layer = nn.ConvTranspose3d(x.shape[1], 24, 3, stride=2, padding=1, bias=False).to(DEVICE)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
        fast = fxfuse.optimize(copy.deepcopy(layer), (x,))
        with ops.watch() as runs:
            got = fast(x)
        assert [r.path for r in runs] == [Path.KERNEL]
        return got, layer.double()(x.double())


def errors(got: Tensor, truth: Tensor) -> list[float]:
    return [relative_error(a, b) for a, b in zip(got, truth, strict=True)]


@CHANNELS
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_ordinary_samples(layout: str, factor: float, channels: int) -> None:
    torch.manual_seed(0)
    x = layouts()[layout](torch.randn(3, channels, *SIZES, device=DEVICE) * factor)
    assert all(FLOAT < e < ROUNDED for e in errors(*convolved(x)))


@CHANNELS
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (-1, 7, 15, 15), (1, 5, 6, 7)])
def test_what_was_not_seen_is_scaled_again(layout: str, place: tuple[int, int, int, int], channels: int) -> None:
    """One value larger than the guess allows: 100 times the others, or the only ones that are not zero."""
    torch.manual_seed(0)
    x = torch.randn(3, channels, *SIZES, device=DEVICE)
    x[1][place] = 1e3
    x[2] = 0
    x[2][place] = 1e-9
    got, truth = convolved(layouts()[layout](x))
    assert all(FLOAT < e < ROUNDED for e in errors(got, truth))  # of the matrix units: no sample was marked


@CHANNELS
@pytest.mark.parametrize("layout", layouts())
def test_marks(layout: str, channels: int) -> None:
    """Not finite; and larger than the others by more than half precision can hold."""
    torch.manual_seed(0)
    x = torch.randn(3, channels, *SIZES, device=DEVICE)
    x[0, 2, 3, 3, 3] = float("inf")
    x[1, 2, 3, 3, 3] = 1e30
    got, truth = convolved(layouts()[layout](x))
    assert torch.equal(got[0].isnan(), truth[0].float().isnan()) and torch.equal(
        got[0].isinf(), truth[0].float().isinf()
    )
    assert errors(got, truth)[1] < FLOAT < errors(got, truth)[2] < ROUNDED
    far = truth[1].abs() < 1e3  # out of the huge value's reach
    assert relative_error(got[1][far], truth[1][far]) < FLOAT


@CHANNELS
@pytest.mark.parametrize("layout", layouts())
def test_float32s_own_accuracy(layout: str, channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, channels, *SIZES, device=DEVICE)
    x[1, 1, 5, 6, 7] = 1e3
    assert all(e < 5e-7 for e in errors(*convolved(layouts()[layout](x), exact=True)))


@CHANNELS
@pytest.mark.parametrize("layout", layouts())
def test_tiny_values_are_counted_once(layout: str, channels: int) -> None:
    """64 of them, wherever they are, are few: the matrix units multiply that sample."""
    torch.manual_seed(0)
    x = torch.randn(3, channels, *SIZES, device=DEVICE)
    for sample, count in ((0, 64), (1, 65)):
        places = torch.randperm(x[sample].numel())[:count].to(DEVICE)
        x[sample].view(-1)[places] = 1e-12
    first, second, _ = errors(*convolved(layouts()[layout](x)))
    assert second < FLOAT < first < ROUNDED


@CHANNELS
def test_zeros(channels: int) -> None:
    got, truth = convolved(torch.zeros(3, channels, *SIZES, device=DEVICE))
    assert torch.equal(got.double(), truth.float().double())
