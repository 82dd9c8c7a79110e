"""Chains to measure: decoder blocks with names, and random ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxfuse.models import Case

Stage = nn.Module | Callable[[Tensor], Tensor]


class Stages(nn.Module):
    """A convolution and what is behind it: modules, functions."""

    def __init__(self, *stages: Stage) -> None:
        super().__init__()
        self.parts = nn.ModuleList([s for s in stages if isinstance(s, nn.Module)])
        self.order = [None if isinstance(s, nn.Module) else s for s in stages]

    def forward(self, x: Tensor) -> Tensor:
        parts = iter(self.parts)
        for stage in self.order:
            x = next(parts)(x) if stage is None else stage(x)
        return x


class Scale(nn.Module):
    """``x * weight`` or ``x + weight``, one per channel."""

    def __init__(self, channels: int, *, add: bool = False) -> None:
        super().__init__()
        self.weight, self.add = nn.Parameter(torch.rand(channels) + 0.5), add

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1, 1, 1, 1)
        return x + weight if self.add else x * weight


def up(*args: int | tuple[int, ...], **more: int | bool | tuple[int, ...]) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(*args, **more)  # type: ignore[arg-type]


DOUBLE = {"stride": 2, "padding": 1}
#: trained with the statistics of the batch; the others are in eval mode
TRAINED = {"batch_norm_pools"}
CHAINS = (
    Case("wide_alone", lambda: up(48, 48, 3, bias=False), (8, 48, 64, 64, 64), (1, 48, 8, 8, 8)),
    Case(
        "leaky_scale_max",
        lambda: Stages(
            up(16, 32, 3, output_padding=1, **DOUBLE), nn.LeakyReLU(0.2), Scale(32), nn.LeakyReLU(0.2), nn.MaxPool3d(2)
        ),
        (16, 16, 16, 32, 32),
        (1, 16, 8, 8, 8),
    ),
    Case(
        "softmax_sigmoid",
        lambda: Stages(up(32, 64, 3, output_padding=1, **DOUBLE), nn.Softmax(1), nn.Sigmoid()),
        (16, 32, 16, 32, 32),
        (1, 32, 8, 8, 8),
    ),
    Case(
        "scale_mean_bias_scale",
        lambda: Stages(up(3, 16, 3, **DOUBLE), Scale(16), nn.AvgPool3d(2), Scale(16, add=True), Scale(16)),
        (128, 3, 16, 32, 32),
        (1, 3, 8, 8, 8),
    ),
    Case(
        "swish_group_norm_hardswish",
        lambda: Stages(up(3, 16, 3, **DOUBLE), lambda y: y * y.sigmoid(), nn.GroupNorm(4, 16), nn.Hardswish()),
        (128, 3, 16, 32, 32),
        (1, 3, 8, 8, 8),
    ),
    Case(
        "batch_norm_pools",
        lambda: Stages(up(3, 16, 3, **DOUBLE), nn.BatchNorm3d(16), nn.AvgPool3d(2), nn.AvgPool3d(2)),
        (64, 3, 32, 32, 32),
        (1, 3, 8, 8, 8),
    ),
    Case("groups", lambda: up(32, 32, 3, groups=4, bias=False, **DOUBLE), (4, 32, 32, 64, 128), (1, 32, 4, 8, 8)),
    Case(
        "instance_norm",
        lambda: Stages(up(64, 32, 2, stride=2), nn.InstanceNorm3d(32, affine=True), nn.LeakyReLU(0.01)),
        (2, 64, 64, 64, 64),
        (1, 64, 8, 8, 8),
    ),
    Case(
        "generator",
        lambda: Stages(up(512, 256, 4, bias=False, **DOUBLE), nn.BatchNorm3d(256), nn.ReLU()),
        (64, 512, 4, 4, 4),
        (2, 512, 2, 2, 2),
    ),
)


# --- random ones ----------------------------------------------------------------------------------
def stage(pick: random.Random, channels: int) -> tuple[str, Stage]:
    """A stage that keeps ``channels``, or drops dims: its name, and a module or function."""
    found: list[tuple[str, Stage]]
    kind = pick.choice(["point", "point", "norm", "norm", "pool", "reduce"])
    if kind == "point":
        found = [
            ("relu", nn.ReLU()), ("silu", nn.SiLU()), ("gelu", nn.GELU()), ("leaky_relu", nn.LeakyReLU(0.1)),
            ("scale", Scale(channels)), ("swish", lambda y: y * y.sigmoid()), ("clamp", lambda y: y.clamp(-1, 1)),
            ("tanh", nn.Tanh()), ("add", lambda y: y + 0.5),
        ]  # fmt: skip
        return pick.choice(found)
    if kind == "norm":
        groups = pick.choice([g for g in (1, 2, 4, 8) if channels % g == 0])
        found = [
            ("batch_norm", nn.BatchNorm3d(channels)), (f"group_norm{groups}", nn.GroupNorm(groups, channels)),
            ("instance_norm", nn.InstanceNorm3d(channels, affine=True)),
        ]  # fmt: skip
        return pick.choice(found)
    if kind == "pool":
        found = [
            ("max_pool2", nn.MaxPool3d(2)), ("avg_pool2", nn.AvgPool3d(2)), ("max_pool3s2", nn.MaxPool3d(3, 2, 1)),
            ("avg_pool3", nn.AvgPool3d(3)),
        ]  # fmt: skip
        return pick.choice(found)
    found = [
        ("softmax", nn.Softmax(1)), ("sum", lambda y: y.sum(1, keepdim=True)), ("mean", lambda y: y.mean((2, 3, 4))),
        ("amax", lambda y: y.amax((2, 3, 4), keepdim=True)), ("centre", lambda y: y - y.mean((2, 3, 4), keepdim=True)),
        ("logsumexp", lambda y: y.logsumexp(1, keepdim=True)),
    ]  # fmt: skip
    return pick.choice(found)


def _has_a_result(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        return model.to("meta").eval()(torch.empty(shape, device="meta")).numel() > 0  # type: ignore[no-any-return]
    except (RuntimeError, ValueError):  # a window is larger than what it is over
        return False


def draw(pick: random.Random) -> Case:
    """A layer of 2 to 60 GFLOP with two to six stages behind it; a stage that drops dims is the last."""
    while True:
        inside, outside = pick.choice([3, 8, 16, 24, 32, 48, 64, 128]), pick.choice([3, 8, 16, 24, 32, 64, 96, 128])
        kernel, stride = pick.choice([(2, 2), (3, 1), (3, 2), (4, 2), (5, 1), (5, 2), (1, 1)])
        padding = pick.choice([0, (kernel - 1) // 2])
        size = pick.choice([8, 12, 16, 24, 32, 48])
        batch = pick.choice([1, 2, 4, 8, 16, 32])
        flops = 2 * batch * size**3 * inside * outside * kernel**3
        made = batch * outside * (size * stride) ** 3
        if 2e9 < flops < 6e10 and 2**20 < made < 3 * 2**26:
            break
    names, stages = [f"CT({inside},{outside},k{kernel},s{stride},p{padding})"], []
    for _ in range(pick.randint(2, 6)):
        name, one = stage(pick, outside)
        names.append(name)
        stages.append((name, one))
        if name in ("mean", "sum", "logsumexp"):
            break
    shape = (batch, inside, size, size, size)
    make = lambda: Stages(up(inside, outside, kernel, stride=stride, padding=padding), *(s for _, s in stages))  # noqa: E731
    if not _has_a_result(copy.deepcopy(make()), shape):
        return draw(pick)
    return Case(" > ".join([*names, f"x {batch}x{inside}x{size}^3"]), make, shape, (1, inside, 8, 8, 8))
