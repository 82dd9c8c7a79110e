"""Rows of several positions, which layers of few channels read, on a GPU or an emulated one, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.convolution import kernels as convolution_kernels
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

TWO = {"stride": 2, "padding": 1}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always(planes=False):
        yield


class Then(nn.Module):
    """A layer and a function behind it, of the layer's result and of one number per channel."""

    def __init__(self, layer: nn.Module, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind
        self.g = nn.Parameter(torch.randn(16, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(x), self.g)


def layer(cin: int, cout: int, kernel: object, *, dims: int = 3, **geometry: object) -> nn.Module:
    return (nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(cin, cout, kernel, **geometry)  # type: ignore[arg-type]


#: model, sizes of x, float32's own accuracy, channels and positions of a row
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, tuple[int, int]]] = {
    "a mean of sums": (
        lambda: Then(layer(3, 16, 3, **TWO), lambda y, g: F.avg_pool3d(y * 2, 2) + g),
        (2, 3, 5, 9, 20), False, (3, 4),
    ),
    "all dims": (lambda: nn.Sequential(layer(1, 20, 3, **TWO), nn.GELU()), (2, 1, 5, 7, 12), False, (1, 8)),
    "more rows than positions": (lambda: layer(3, 24, 3), (3, 3, 4, 6, 8), False, (3, 3)),
    "rows that are no quads": (lambda: layer(2, 16, 3, padding=1), (2, 2, 3, 5, 11), False, (2, 3)),
    "fewer rows than positions": (lambda: layer(1, 16, 3, padding=3), (3, 1, 6, 9, 13), False, (1, 9)),
    "a maximum of classes": (
        lambda: Then(layer(3, 16, 3, **TWO), lambda y, g: F.max_pool3d(y * g, 2)), (3, 3, 4, 5, 8), False, (3, 4),
    ),
    "holes": (lambda: layer(4, 16, 3, dilation=(1, 2, 3), padding=2), (2, 4, 5, 9, 16), False, (4, 3)),
    "a stride of three": (lambda: layer(3, 16, 5, stride=(1, 2, 3), padding=2), (2, 3, 3, 4, 8), False, (3, 2)),
    "a stride of four": (lambda: layer(2, 12, 7, stride=4, padding=2), (2, 2, 2, 3, 5), False, (2, 3)),
    "16 numbers": (lambda: layer(8, 40, 3, **TWO), (2, 8, 3, 6, 8), False, (8, 2)),
    "channels are rows of instructions": (lambda: layer(3, 64, 3, padding=1), (2, 3, 3, 6, 16), False, (3, 3)),
    "float32's own accuracy": (lambda: layer(3, 16, 3, **TWO), (3, 3, 4, 5, 8), True, (3, 4)),
    "its own accuracy, a mean of sums": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.AvgPool3d(2)), (3, 3, 4, 5, 9), True, (3, 4),
    ),
    "groups": (lambda: layer(6, 40, 3, padding=1, groups=2), (3, 6, 3, 4, 9), False, (3, 3)),
    "two dims": (lambda: layer(3, 16, 5, dims=2, **TWO), (3, 3, 13, 20), False, (3, 3)),
    "one line of two": (lambda: layer(2, 16, (1, 7), dims=2, padding=(0, 3)), (3, 2, 2, 150), False, (2, 7)),
    "a sum of channels": (lambda: Then(layer(3, 16, 3, **TWO), lambda y, g: (y * g).softmax(1)), (2, 3, 3, 4, 9), False,
                          (3, 4)),
    "statistics": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.GroupNorm(4, 16), nn.Hardswish()), (2, 3, 3, 6, 9), False,
        (3, 4),
    ),
    "statistics, and a mean of sums": (
        lambda: nn.Sequential(layer(3, 16, 3, **TWO), nn.InstanceNorm3d(16), nn.AvgPool3d(2)), (2, 3, 3, 6, 9), False,
        (3, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("name", CASES)
def test_rows_of_several_positions(name: str, last: bool) -> None:
    """One sample is such that 16-bit numbers do not hold it."""
    make, sizes, exact, row = CASES[name]
    torch.manual_seed(3)
    model, x = make().eval().to(DEVICE), torch.randn(sizes, device=DEVICE)
    x[0, 0, 0].view(-1)[0] = 3e20
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
        got = fused(model, x, row, last=last)
    with torch.no_grad():
        truth = model.double()(x.double())
    assert all(relative_error(a, b) < (5e-7 if exact else 1e-3) for a, b in zip(got, truth, strict=True))


#: not where weights are added, which their numbers have no room for
OF_16_BITS = [name for name, (*_, exact, _) in CASES.items() if not exact and "a mean of sums" not in name]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_16_BITS)
def test_of_16_bit_numbers(name: str, dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample is not finite, which a product with a weight of zero would spread."""
    make, sizes, _, row = CASES[name]
    monkeypatch.setattr(convolution_kernels, "WATCHING", -1.0)  # a look costs nothing
    monkeypatch.setattr(convolution_kernels, "LEAD", 1.0)
    torch.manual_seed(3)
    model, x = make().eval().to(DEVICE, dtype), torch.randn(sizes, device=DEVICE, dtype=dtype)
    x[0, 0, 0].view(-1)[0] = torch.inf
    got = fused(model, x, row, last=last)
    with torch.no_grad():
        truth = model.double()(x.double())
    assert all(relative_error(a, b) < 4 * torch.finfo(dtype).eps for a, b in zip(got[1:], truth[1:], strict=True))
    assert torch.equal(got[0].isnan(), truth[0].isnan()) and torch.equal(got[0].isinf(), truth[0].isinf())


def fused(model: nn.Module, x: Tensor, row: tuple[int, int], *, last: bool = False) -> Tensor:
    """What kernels make of x. ``row``: channels and positions of a row, where x is contiguous."""
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
    x = x.contiguous(memory_format=memory if last else torch.contiguous_format)
    with torch.no_grad():
        fast = fxfuse.optimize(copy.deepcopy(model), (x,))
        with ops.watch() as runs:
            got = fast(x)
    assert [r.path for r in runs] == [Path.KERNEL]
    (made,) = (p for p in execute._prepared.values() if p is not None)
    layer = made.convolution.made.layer
    assert layer.beside and (last or (layer.channels, len(layer.offsets)) == row)
    return got
