"""Pointwise chains in front of convolutions, for tests on a GPU or an emulated one: of numbers, channels, places."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TWO = {"stride": 2, "padding": 1}
LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: a layer of so many input channels, sizes of x, dtype, channels as neighbours, float32's own accuracy
Form = tuple[Callable[[int], nn.Module], tuple[int, ...], torch.dtype, bool, bool]


class Behind(nn.Module):
    """A layer behind a function of x and of the parameters `g`."""

    def __init__(self, front: Callable[..., Tensor], layer: nn.Module, *g: Tensor) -> None:
        super().__init__()
        self.front, self.layer = front, layer
        self.g = nn.ParameterList([nn.Parameter(t) for t in g])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.front(x, *self.g))


def of_numbers(x: Tensor) -> Tensor:
    return F.silu(x) * 1.5 + 0.25


def of_channels(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.leaky_relu(x * scale + shift, 0.1)


def of_places(x: Tensor, other: Tensor) -> Tensor:
    return F.gelu(x) + other


FRONTS = (of_numbers, of_channels, of_places)


def _up(cout: int, kernel: int, dims: int = 3, groups: int = 1, **geometry: int) -> Callable[[int], nn.Module]:
    return lambda cin: LAYERS[dims - 1](cin, cout, kernel, groups=groups, **geometry)


FEW = "several positions in a row"
FORMS: dict[str, Form] = {
    "four at once": (_up(24, 3, **TWO), (3, 16, 3, 4, 8), F32, False, False),
    "padding of channels": (_up(8, 3, **TWO), (2, 37, 2, 4, 4), F32, False, False),
    "one by one": (_up(16, 3, **TWO), (3, 20, 3, 5, 7), F32, False, False),
    "channels last": (_up(16, 3, **TWO), (3, 32, 3, 4, 5), F32, True, False),
    "channels last, padding": (_up(16, 2), (3, 20, 3, 4, 5), F32, True, False),
    "exact": (_up(16, 3, **TWO), (3, 16, 3, 4, 5), F32, False, True),
    "groups": (_up(32, 3, groups=4, **TWO), (3, 32, 3, 4, 5), F32, False, False),
    FEW: (_up(16, 3, **TWO), (3, 3, 4, 5, 8), F32, False, False),
    "several positions in a row, odd": (_up(16, 3, **TWO), (3, 3, 4, 5, 7), F32, True, False),
    "eight at once": (_up(24, 3, **TWO), (3, 24, 2, 4, 8), F16, False, False),
    "eight at once, bfloat16": (_up(24, 3, groups=2, **TWO), (3, 32, 2, 4, 8), BF16, False, False),
    "16 bits, one by one": (_up(24, 3, **TWO), (3, 24, 3, 5, 7), F16, False, False),
    "two dims": (_up(16, 3, dims=2, **TWO), (3, 24, 9, 12), F32, False, False),
    "one dim": (_up(16, 4, dims=1, **TWO), (3, 24, 37), BF16, False, False),
}


def behind(name: str, front: Callable[..., Tensor]) -> nn.Module:
    """The layer of a form behind ``front``, whose parameters are random."""
    make, sizes, dtype, *_ = FORMS[name]
    ones = (1,) * (len(sizes) - 2)
    shapes = {of_channels: [(1, sizes[1], *ones)] * 2, of_places: [(1, *sizes[1:])]}.get(front, [])
    return Behind(front, make(sizes[1]), *(torch.randn(s) for s in shapes)).to(dtype)
