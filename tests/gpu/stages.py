"""Models for the tests beside this file: a convolution, and stages behind it; and what is asked of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from place import DEVICE, what_torch_has
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path

#: relative L2 error against float64 that the dtype's rounding (TF32 for float32) explains
LIMIT = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CONVOLUTIONS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
LAST = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


# --- models ---------------------------------------------------------------------------------------
def made(dims: int, *args: Any, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    module: nn.Module = CONVOLUTIONS[dims](*args, **more).to(DEVICE).to(dtype)
    return module


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda c, d: {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[d](c),
    "instance": lambda c, d: {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[d](c, affine=True),
    "group": lambda c, d: nn.GroupNorm(2, c),
    "one_group": lambda c, d: nn.GroupNorm(1, c, affine=False),
}


class Stages(nn.Module):
    def __init__(self, *stages: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([s for s in stages if isinstance(s, nn.Module)])
        self.order = [s if not isinstance(s, nn.Module) else None for s in stages]

    def forward(self, x: Tensor) -> Tensor:
        parts = iter(self.parts)
        for stage in self.order:
            x = next(parts)(x) if stage is None else stage(x)
        return x


def spread(model: nn.Module) -> nn.Module:
    """Random affine parameters: those of a fresh module hide what is left out."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "num_groups") or "Norm" in type(module).__name__:
                for p in module.parameters():
                    p.uniform_(0.5, 1.5)
    return model


def trained(convolution: nn.Module, *stages: str | nn.Module | Callable[[Tensor], Tensor]) -> Stages:
    """A convolution and what is behind it, in training mode; names stand for norms of its channels."""
    weight, channels = convolution.weight, convolution.out_channels
    behind = [NORMS[s](channels, weight.dim() - 2).to(weight) if isinstance(s, str) else s for s in stages]
    model = Stages(convolution, *behind)
    spread(model)
    return model.train()


# --- what is asked of them --------------------------------------------------------------------------
def steps_run() -> str:
    """The schedules of what ran inside ``kernels_always``, or since the last :func:`check` began."""
    return "; ".join(str(p.schedule) for p in execute._prepared.values() if p is not None)


def check(model: nn.Module, x: Tensor, *expected: str) -> None:
    """As near to float64 as the dtype's rounding explains; ``expected`` words are in the schedule."""
    execute.forget()
    eager, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    exact = truth(x.double())
    with torch.no_grad(), what_torch_has():
        fast = fxfuse.optimize(copy.deepcopy(model), (x,))
        with ops.watch() as runs:
            got, like = fast(x), eager(x)
    assert [r.path for r in runs] == [Path.KERNEL], fast.fxfuse_report
    for word in expected:
        assert word in steps_run(), steps_run()
    assert got.shape == like.shape and got.dtype is like.dtype and got.stride() == like.stride()
    assert relative_error(got, exact) <= max(2 * relative_error(like, exact), LIMIT[x.dtype]), steps_run()
    for (name, a), b, c in zip(fast.named_buffers(), eager.buffers(), truth.buffers(), strict=True):
        assert a.dtype is b.dtype
        assert relative_error(a, c) <= max(2 * relative_error(b, c), 1e-3), name


def near(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    """Sample by sample: a large one hides no other."""
    with torch.no_grad():
        got, truth = fast(x), copy.deepcopy(model).double()(x.double())
    for one, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)
