"""Chains to measure as models write them: norms of last dims, attention, residuals, views between, norms in front."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.bench.chains import DOUBLE, Stage, Stages, up
from fxfuse.models import Case

ONE_MORE = {**DOUBLE, "output_padding": 1}


class Then(nn.Module):
    """A layer, and a function of its result and of parameters."""

    def __init__(self, layer: nn.Module, behind: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.layer, self.behind, self.names = layer, behind, [f"given{i}" for i in range(len(parameters))]
        for name, parameter in zip(self.names, parameters, strict=True):
            self.register_parameter(name, nn.Parameter(parameter))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(x), *(getattr(self, name) for name in self.names))


class NormOfChannels(nn.Module):
    """A LayerNorm of channels, which are the last dim for it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3))


class Excite(nn.Module):
    """Squeeze and excitation: channels weighted by what two linear layers make of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        weight = self.excite(F.relu(self.squeeze(x.flatten(2).mean(-1)))).sigmoid()
        weighted: Tensor = x * weight.view(n, c, 1, 1, 1)
        return weighted


def softmax_of_space(y: Tensor, scale: Tensor) -> Tensor:
    y = y.clamp(0.0, 1.0)
    n, c, d, h, w = y.shape
    return torch.softmax(y.view(n, c, -1), dim=2).view(n, c, d, h, w) * scale


def residuals(y: Tensor, bias: Tensor) -> Tensor:
    original = y.clone().detach()
    return ((y + bias) + original) * original + original


def standardised(y: Tensor) -> Tensor:
    mean, var = y.mean((2, 3, 4), keepdim=True), y.var((2, 3, 4), keepdim=True, unbiased=False)
    return F.relu((y - mean) / torch.sqrt(var + 1e-5))


def pixel_norm(y: Tensor) -> Tensor:
    return y * torch.rsqrt(torch.mean(y**2, dim=1, keepdim=True) + 1e-8)


def entropy(y: Tensor) -> Tensor:
    return -(F.softmax(y, 1) * F.log_softmax(y, 1)).sum(1)


def attended(y: Tensor) -> Tensor:
    return y * torch.sigmoid(y.amax((2, 3, 4), keepdim=True) + y.mean((2, 3, 4), keepdim=True))


def swish_of_logsumexp(y: Tensor, bias: Tensor) -> Tensor:
    y = torch.logsumexp(y, dim=1, keepdim=True)
    return torch.clamp(y * torch.sigmoid(y + 3) / 6 - bias, -1, 1)


def largest_swish(y: Tensor, shift: Tensor) -> Tensor:
    y = torch.softmax(F.max_pool3d(y, 2), 1) - shift.view(1, -1, 1, 1, 1)
    return torch.max(torch.sigmoid(y) * y, dim=1)[0]


def _case(name: str, make: Callable[[], nn.Module], *shape: int) -> Case:
    """The name, and the input's shape."""
    return Case(f"{name}, x {'x'.join(map(str, shape))}", make, shape, (1, *shape[1:]))


def _behind(name: str, *stages: Callable[[], Stage]) -> Case:
    """Behind a layer of a decoder."""
    make = lambda: Stages(up(32, 48, 3, **ONE_MORE), *(s() for s in stages))  # noqa: E731
    return _case(f"CT(32,48,k3,s2) > {name}", make, 8, 32, 16, 48, 48)


IDIOMS = (
    _case(
        "CT(32,64,k3,s2) > + number > LayerNorm(w) > AvgPool(2) > gelu",
        lambda: Stages(
            up(32, 64, 3, **ONE_MORE), lambda y: y + 1.0, nn.LayerNorm(64), nn.AvgPool3d(2), nn.GELU()
        ),
        32, 32, 16, 32, 32,
    ),
    _case(
        "CT(32,64,k4,s2) > LayerNorm(w) > gelu", lambda: Stages(up(32, 64, 4, **DOUBLE), nn.LayerNorm(64), nn.GELU()),
        32, 32, 16, 32, 32,
    ),
    _case(
        "CT(16,64,k3) > mean over d > + bias > softmax over c > tanh > * 2",
        lambda: Then(
            up(16, 64, 3, padding=1), lambda y, b: torch.tanh(torch.softmax(y.mean(2, keepdim=True) + b, 1)) * 2.0,
            torch.randn(1, 64, 1, 1, 1),
        ),
        16, 16, 32, 128, 128,
    ),
    _case(
        "CT(32,64,k3,s2) > residual sums and product",
        lambda: Then(up(32, 64, 3, **ONE_MORE), residuals, torch.randn(64, 1, 1, 1)), 16, 32, 16, 32, 32,
    ),
    _case(
        "AvgPool(2) > CT(32,64,k3,s2) > clamp > softmax over space > * weight",
        lambda: Then(
            nn.Sequential(nn.AvgPool3d(2), up(32, 64, 3, **ONE_MORE)), softmax_of_space, torch.ones(1, 64, 1, 1, 1)
        ),
        32, 32, 32, 64, 64,
    ),
    _case(
        "CT(3,16,k3,s2) > logsumexp over c > swish > - bias > clamp",
        lambda: Then(up(3, 16, 3, **DOUBLE), swish_of_logsumexp, torch.randn(1, 1, 1, 1)), 128, 3, 16, 32, 32,
    ),
    _case(
        "CT(3,16,k3,s2) > MaxPool(2) > softmax over c > - shift > swish > max over c",
        lambda: Then(up(3, 16, 3, **ONE_MORE), largest_swish, torch.randn(16)), 128, 3, 16, 32, 32,
    ),
    _case(
        "CT(3,16,k3,s2) > * number > MaxPool(2) > mean over space > clamp",
        lambda: Stages(
            up(3, 16, 3, **DOUBLE), lambda y: y * 0.5, nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(1),
            lambda y: y.clamp(0, 1),
        ),
        128, 3, 16, 32, 32,
    ),
    _case("CT(32,16,k3x5x7)", lambda: up(32, 16, (3, 5, 7), bias=False), 16, 32, 16, 32, 64),
    _case("CT(48,24,k3)", lambda: up(48, 24, 3, bias=False), 8, 48, 96, 96, 96),
    _case(
        "CT(32,32,k3x5x7,s2,groups=4)",
        lambda: up(32, 32, (3, 5, 7), stride=2, padding=(1, 2, 3), output_padding=1, groups=4, bias=False),
        8, 32, 12, 24, 48,
    ),
    _case("CT(32,64,k3,s2,dilation=2)", lambda: up(32, 64, 3, dilation=2, **DOUBLE), 16, 32, 16, 32, 32),
    _case(
        "InstanceNorm > leaky_relu > CT(64,32,k2,s2)",
        lambda: Stages(nn.InstanceNorm3d(64, affine=True), nn.LeakyReLU(0.01), up(64, 32, 2, stride=2)),
        2, 64, 64, 64, 64,
    ),
    _case(
        "BatchNorm > relu > CT(128,64,k2,s2)",
        lambda: Stages(nn.BatchNorm3d(128), nn.ReLU(), up(128, 64, 2, stride=2)), 4, 128, 32, 32, 32,
    ),
    _case(
        "GroupNorm(8) > silu > CT(64,64,k3,s2)",
        lambda: Stages(nn.GroupNorm(8, 64), nn.SiLU(), up(64, 64, 3, **ONE_MORE)), 4, 64, 32, 48, 48,
    ),
    _case("relu > CT(64,32,k4,s2)", lambda: Stages(nn.ReLU(), up(64, 32, 4, **DOUBLE)), 8, 64, 32, 32, 32),
    _case("leaky_relu > CT(64,64,k3)", lambda: Stages(nn.LeakyReLU(0.2), up(64, 64, 3, padding=1)), 8, 64, 48, 48, 48),
    _case(
        "MaxPool(2) > relu > CT(32,32,k2,s2) > relu",
        lambda: Stages(nn.MaxPool3d(2), nn.ReLU(), up(32, 32, 2, stride=2), nn.ReLU()), 4, 32, 64, 96, 96,
    ),
    _behind("LayerNorm(c) > gelu", lambda: NormOfChannels(48)),
    _behind("squeeze and excitation", lambda: Excite(48)),
    _behind("* sigmoid(max + mean over space)", lambda: attended),
    _behind("* sigmoid(mean + max over c)", lambda: lambda y: y * torch.sigmoid(y.mean(1, True) + y.amax(1, True))),
    _behind("PixelNorm > leaky_relu", lambda: pixel_norm, lambda: nn.LeakyReLU(0.2)),
    _behind("relu > normalize(c)", nn.ReLU, lambda: lambda y: F.normalize(y, dim=1)),
    _behind("entropy over c", lambda: entropy),
    _behind("(y - mean) / sqrt(var + eps) > relu", lambda: standardised),
    _behind("RMSNorm(w) > silu", lambda: nn.RMSNorm(96, 1e-5), nn.SiLU),
    _behind("LayerNorm(h, w) > silu", lambda: nn.LayerNorm((96, 96)), nn.SiLU),
    _behind("softmax over d", lambda: nn.Softmax(2)),
    _behind("softmax over w > * 3", lambda: nn.Softmax(-1), lambda: lambda y: y * 3.0),
    _behind("max over d > relu", lambda: lambda y: y.amax(2).relu()),
    _behind("relu > AdaptiveMaxPool(1)", nn.ReLU, lambda: nn.AdaptiveMaxPool3d(1)),
    _behind("relu > / (std of a sample + 1)", nn.ReLU, lambda: lambda y: y / (y.std((1, 2, 3, 4), keepdim=True) + 1)),
)  # fmt: skip
