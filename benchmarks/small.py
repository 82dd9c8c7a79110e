"""Small layers, whose calls are launches and little else: microseconds of a call in eager mode and of ours.

    python benchmarks/small.py [--json FILE] [--dtype float16]

Calls are queued one behind the other in both; "always" is with kernels wherever there are some, whatever the estimate
says of small layers. "by": what ran, kernels with the convolution among them, behind cuDNN's, or torch's operators.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn

import fxfuse
from fxfuse import environment, timing
from fxfuse.kernels import execute
from fxfuse.kernels.planning import choice

#: in and out channels, kernel, stride, padding, output padding
LAYERS = {
    "ConvT(32,64,k3,s2)": (32, 64, 3, 2, 1, 1),
    "ConvT(64,32,k2,s2)": (64, 32, 2, 2, 0, 0),
    "ConvT(3,16,k3,s2)": (3, 16, 3, 2, 1, 0),
    "ConvT(128,64,k4,s2)": (128, 64, 4, 2, 1, 0),
    "ConvT(256,128,k2,s2)": (256, 128, 2, 2, 0, 0),
}
#: samples, and positions per dim of each
SIZES = ((1, 4), (2, 8), (2, 16))
BEHIND: dict[str, Callable[[int], list[nn.Module]]] = {
    "alone": lambda c: [],
    "BatchNorm > relu": lambda c: [nn.BatchNorm3d(c), nn.ReLU()],
    "InstanceNorm > leaky_relu": lambda c: [nn.InstanceNorm3d(c, affine=True), nn.LeakyReLU()],
    "MaxPool(2)": lambda c: [nn.MaxPool3d(2)],
}
LIMITS = ("LEAST_SECONDS", "LEAST_SECONDS_CHAIN", "LEAST_SECONDS_GROUPED")
#: calls until addresses are known, and graphs there
SETTLED = 12


def measured(model: nn.Module, x: torch.Tensor) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    ways = {"fxfuse": contextlib.nullcontext(), "always": mock.patch.multiple(choice, **dict.fromkeys(LIMITS, 0.0))}
    for name, chosen in ways.items():
        with chosen:
            execute.forget()
            fast = fxfuse.optimize(model)
            for _ in range(SETTLED):
                fast(x)
            found[f"by, {name}"] = _by()
            taken = timing.queued_in_turns({"eager": lambda: model(x), name: functools.partial(fast, x)})
        found |= {way: round(seconds * 1e6, 1) for way, seconds in taken.items()}
    return found


def _by() -> str:
    prepared = [*execute._prepared.values()]
    if not prepared or prepared[0] is None:
        return "torch"
    return "cuDNN and kernels" if prepared[0].convolution is None else "kernels"


def rows(dtype: torch.dtype) -> Iterator[dict[str, float | str]]:
    for (layer, (*channels, k, s, p, more)), (n, size), (name, behind) in itertools.product(
        LAYERS.items(), SIZES, BEHIND.items()
    ):
        torch.manual_seed(0)
        inside, outside = channels
        model = nn.Sequential(nn.ConvTranspose3d(inside, outside, k, s, p, more), *behind(outside))
        x = torch.randn(n, inside, size, size, size, device="cuda", dtype=dtype)
        row = {"layer": layer, "behind": name, "x": f"{n}x{inside}x{size}^3", "dtype": str(dtype)[6:]}
        yield row | measured(model.cuda().to(dtype).eval(), x)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results there")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    found = []
    for row in rows(getattr(torch, given.dtype)):
        found.append(row)
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if given.json is not None:
        told = {"precision": "tf32 allowed", "protocol": "us; queued calls, in turns, median of 7"}
        machine = environment.described(torch.device("cuda")) | told
        given.json.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
