"""Host cost of a call, apart from the GPU's time: microseconds until a call returns, while the GPU is kept busy.

    python benchmarks/host.py [--json FILE]

"module" is a call of what fxfuse.optimize returns, guards of the model included; "region" one of the fused operator
alone; "kernels" what of that is left when it is known which kernels run: memory and addresses, and a CUDA graph, or
arguments and launches where there is none. "no graph" is the module where kernels are launched one by one. "eager" is
the model itself. And milliseconds until a first call returns: "again" of the region, prepared anew with its kernels
compiled and loaded; "new size" of the module, the compiler's passes included, with one position more along the depth.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import nn

import fxfuse
from fxfuse import environment, ops
from fxfuse.kernels import execute

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


def without_graphs(call: Callable[[], object]) -> float:
    """Microseconds of a call that launches kernels one by one."""
    with mock.patch.dict(os.environ, {"FXFUSE_GRAPHS": "0"}):
        execute.forget()
        for _ in range(3):  # prepared anew, and known
            call()
        found = microseconds(call)
    execute.forget()
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """Until one call returns."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def region_of(fast: nn.Module, x: torch.Tensor) -> tuple[str, Sequence[torch.Tensor], str]:
    """The text of the region that a call runs, what it takes, and which way it ran."""
    with mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as seen, ops.watch() as runs:
        fast(x)
    text, inputs = seen.call_args.args
    return text, inputs, runs[0].path.value


def measure(model: nn.Module, x: torch.Tensor) -> dict[str, float | str]:
    """The figures of one model, by name; "kernels" are missing where torch's operators run."""
    fast = fxfuse.optimize(model, x)
    with torch.no_grad():
        text, inputs, path = region_of(fast, x)
        execute.forget()
        again = milliseconds(lambda: ops.run_region(inputs, text))
        ways = {"module": lambda: fast(x), "region": lambda: ops.run_region(inputs, text)}
        prepared = execute.find(execute.key_of(text, inputs), inputs)
        if prepared is not None:
            ways["kernels"] = functools.partial(prepared.run, inputs)
        ways["eager"] = lambda: model(x)
        found: dict[str, float | str] = {name: round(microseconds(way), 2) for name, way in ways.items()}
        if prepared is not None:
            found["no graph"] = round(without_graphs(lambda: fast(x)), 2)
        larger = torch.cat([x, x[:, :, :1]], 2)
        size = milliseconds(lambda: fast(larger))
    return {**found, "again": round(again, 1), "new size": round(size, 1), "path": path}


COLUMNS = ("module", "region", "kernels", "no graph", "eager", "again", "new size", "path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: us per call; first calls in ms")
    print(f"{'':<34}{''.join(f'{c:>10}' for c in COLUMNS)}")
    rows = []
    for name, (model, x) in models().items():
        figures = measure(model.cuda().eval(), x)
        told = (str(figures.get(c, "")) for c in COLUMNS)
        print(f"{name:<34}{''.join(f'{t:>10}' for t in told)}", flush=True)
        rows.append({"model": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), **figures})
    if given.json:
        protocol = f"no_grad, {CALLS} calls while the GPU is busy, median of {ROUNDS}; us, and ms of first calls"
        machine = {**environment.described(torch.device("cuda")), "protocol": protocol}
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
