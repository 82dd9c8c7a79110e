"""Host cost of a call, apart from the GPU's time: microseconds until a call returns, while the GPU is kept busy.

    python benchmarks/host.py

"region" is a call of the fused operator alone, "module" one of what fxfuse.optimize returns, guards included.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import fxfuse
from fxfuse import ops

#: calls per measurement: all of their launches fit into the driver's queue
CALLS, ROUNDS = 50, 15


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    x = torch.randn(8, 32, 16, 16, 16, device="cuda")
    up = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
    return {
        "ConvT": (nn.ConvTranspose3d(32, 64, **up), x),
        "ConvT, float16": (nn.ConvTranspose3d(32, 64, **up).half(), x.half()),
        "ConvT > leaky_relu > MaxPool(2)": (
            nn.Sequential(nn.ConvTranspose3d(32, 64, **up), nn.LeakyReLU(), nn.MaxPool3d(2)), x,
        ),
        "ConvT > softmax > sigmoid": (nn.Sequential(nn.ConvTranspose3d(32, 64, **up), nn.Softmax(1), nn.Sigmoid()), x),
        "ConvT > GroupNorm > silu": (
            nn.Sequential(nn.ConvTranspose3d(32, 64, **up), nn.GroupNorm(4, 64), nn.SiLU()), x,
        ),
        "ConvT > BatchNorm (eval) > relu": (
            nn.Sequential(nn.ConvTranspose3d(32, 64, **up), nn.BatchNorm3d(64), nn.ReLU()), x,
        ),
    }  # fmt: skip


def microseconds(call: Callable[[], object]) -> float:
    """Median over rounds of the host's time per call, the GPU waiting in front of them."""
    taken = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - started) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(taken)


def measure(model: nn.Module, x: torch.Tensor) -> tuple[list[float], str]:
    """Microseconds of the region, of the optimised module and of the model itself; and which way the region ran."""
    fast = fxfuse.optimize(model, x)
    with torch.no_grad():
        with mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as seen, ops.watch() as runs:
            fast(x)
        text, inputs = seen.call_args.args
        ways = [functools.partial(ops.run_region, inputs, text), *(functools.partial(m, x) for m in (fast, model))]
        return [microseconds(way) for way in ways], runs[0].path.value


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, us per call")
    print(f"{'':<34}{'region':>8}{'module':>8}{'eager':>8}  path")
    for name, (model, x) in models().items():
        times, path = measure(model.cuda().eval(), x)
        print(f"{name:<34}{''.join(f'{t:>8.1f}' for t in times)}  {path}")


if __name__ == "__main__":
    main()
