"""The five models that the project starts from, with their real layers; the demo and the tests use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaxMaxSum(nn.Module):
    """Two stacked max pools, then a sum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(32, 64, 5, stride=2, padding=2)
        self.pool1 = nn.MaxPool3d(2)
        self.pool2 = nn.MaxPool3d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(self.pool2(self.pool1(self.up(x))), dim=1, keepdim=True)


class Alone(nn.Module):
    """A transposed convolution with nothing behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(32, 64, (3, 5, 5), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)  # type: ignore[no-any-return]


class ReluGroupNorm(nn.Module):
    """A decoder block: activation, then normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(64, 128, 3, bias=False)
        self.norm = nn.GroupNorm(8, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.up(x)))  # type: ignore[no-any-return]


class ScaleNormPool(nn.Module):
    """Scale, BatchNorm, global average: in eval mode the mean of a convolution, which needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(64, 128, 5)
        self.norm = nn.BatchNorm3d(128)
        self.pool = nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.up(x) * 2.0))  # type: ignore[no-any-return]


class ClampDivide(nn.Module):
    """Two pointwise operators."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(64, 128, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(self.up(x), min=-1.0) / 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the shape (N, C, D, H, W) of its input; ``small`` is a shape for two CPU cores."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    small: tuple[int, ...]


CASES = (
    Case("max_max_sum", MaxMaxSum, (16, 32, 32, 32, 32), (1, 32, 16, 16, 16)),
    Case("alone", Alone, (16, 32, 64, 64, 64), (1, 32, 16, 16, 16)),
    Case("relu_group_norm", ReluGroupNorm, (16, 64, 32, 32, 32), (1, 64, 16, 16, 16)),
    Case("scale_norm_pool", ScaleNormPool, (16, 64, 16, 32, 32), (2, 64, 8, 16, 16)),
    Case("clamp_divide", ClampDivide, (16, 64, 24, 48, 48), (1, 64, 8, 12, 12)),
)
