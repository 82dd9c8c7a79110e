"""fxfuse and its peers on a CUDA GPU, all in one process on the same inputs.

    python benchmarks/gpu.py [--json FILE] [--cases NAME ...] [--chains] [--random N] [--seed N] [--compile]
                             [--dtype float32|float16|bfloat16] [--ieee]

Protocol: no_grad, CUDA events around queued calls, inputs rotated past the L2 cache, median of seven,
cudnn.benchmark on for every peer. The peers: eager, eager in channels_last_3d, and with --compile
torch.compile of both. The cases are the project's five models; with --chains those of
benchmarks/chains.py, with --random as many random ones. The floor is what reading the input and writing
the output takes at the copy bandwidth, or what the products take at the rate of 16-bit matrix
multiplications, whichever is longer: 2.98 TB/s and 751 TFLOP/s, measured on an H100.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import pathlib
import random
import statistics
from collections.abc import Callable, Sequence

import torch
from chains import CHAINS, TRAINED, draw
from torch import Tensor, nn

import fxfuse
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.models import CASES, Case

#: bytes per second that are copied, operations per second of 16-bit products, on an H100
COPY, PRODUCTS = 2.98e12, 751e12
#: bytes of inputs to rotate through: more than any L2
ROTATION = 200e6


def milliseconds(
    call: Callable[[Tensor], object], inputs: Sequence[Tensor], *, calls: int = 20, repeats: int = 7
) -> float:
    """Median milliseconds of one call, from ``repeats`` runs of ``calls`` queued calls."""
    turn = itertools.cycle(inputs)
    for _ in range(3):
        call(next(turn))
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call(next(turn))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def peers(model: nn.Module, compiled: bool) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """The ways to run ``model``, each with the memory format of its input."""
    plain, last = torch.contiguous_format, torch.channels_last_3d
    ways: dict[str, tuple[nn.Module, torch.memory_format]] = {
        "eager": (copy.deepcopy(model), plain),
        "channels_last_3d": (copy.deepcopy(model).to(memory_format=last), last),
        "fxfuse": (fxfuse.optimize(copy.deepcopy(model)), plain),
        "fxfuse channels_last_3d": (fxfuse.optimize(copy.deepcopy(model).to(memory_format=last)), last),
    }
    if compiled:
        ways["compile"] = (torch.compile(copy.deepcopy(model)), plain)
        ways["compile channels_last_3d"] = (torch.compile(copy.deepcopy(model).to(memory_format=last)), last)
    return ways


def floor_ms(model: nn.Module, x: Tensor) -> float:
    """The least time: of memory traffic, or of products of the first convolution."""
    conv = next(m for m in model.modules() if isinstance(m, nn.ConvTranspose3d))
    with torch.no_grad():
        out = copy.deepcopy(model)(x)
    products = 2 * math.prod(x.shape) // x.shape[1] * conv.weight.numel()
    return 1e3 * max((x.nbytes + out.nbytes) / COPY, products / PRODUCTS)


def measure(case: Case, mode: str, dtype: torch.dtype, compiled: bool) -> dict[str, object]:
    torch.manual_seed(0)
    model = case.make().cuda().to(dtype).train(mode == "train")
    size = torch.Size(case.shape).numel() * dtype.itemsize
    xs = [torch.randn(case.shape, device="cuda", dtype=dtype) for _ in range(min(8, int(ROTATION // size) + 2))]
    small = xs[0][:4]
    truth = copy.deepcopy(model).double()(small.double())
    torch._dynamo.reset()  # or it gives up compiling after a few cases of the same class
    row: dict[str, object] = {
        "model": case.name,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "floor": round(floor_ms(model, xs[0]), 4),
        "ms": {},
        "error": {},
    }
    for name, (way, layout) in peers(model, compiled).items():
        inputs = [x.contiguous(memory_format=layout) for x in xs]
        row["ms"][name] = round(milliseconds(way, inputs), 4)  # type: ignore[index]
        few = small.contiguous(memory_format=layout)
        way(few)  # new sizes: the first call of an optimised module may be the model's own
        row["error"][name] = relative_error(way(few), truth)  # type: ignore[index]
        del inputs
        if name.startswith("fxfuse"):
            plans = [p for p in execute._prepared.values() if p is not None]
            row.setdefault("plan", {})[name] = str(plans[0].schedule) if plans else "torch's operators"  # type: ignore[attr-defined]
            execute._prepared.clear()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    parser.add_argument("--chains", action="store_true", help="the chains of benchmarks/chains.py")
    parser.add_argument("--random", type=int, default=0, help="so many random chains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", help="names of models; all by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--ieee", action="store_true", help="float32 convolutions without TF32")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to start)")
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = not given.ieee
    pick = random.Random(given.seed)
    cases = CHAINS if given.chains else CASES
    if given.random:
        cases = tuple(draw(pick) for _ in range(given.random))
    rows = []
    with torch.no_grad():
        for case in cases:
            if given.cases and case.name not in given.cases:
                continue
            modes: tuple[str, ...] = ("train",) if case.name in TRAINED else ("eval",)
            if cases is CASES and any(isinstance(m, nn.BatchNorm3d) for m in case.make().modules()):
                modes = ("train", "eval")
            for mode in modes:
                row = measure(case, mode, getattr(torch, given.dtype), given.compile)
                rows.append(row)
                times: dict[str, float] = row["ms"]  # type: ignore[assignment]
                ours = min(v for k, v in times.items() if k.startswith("fxfuse"))
                best = min(v for k, v in times.items() if not k.startswith("fxfuse"))
                print(row["model"], mode, row["dtype"], {k: f"{v:.3f}" for k, v in times.items()}, flush=True)
                print(f"   {best / ours:.2f} x the best peer, {ours / row['floor']:.1f} x the floor", end="; ")  # type: ignore[operator]
                print("errors", {k: f"{v:.1e}" for k, v in row["error"].items()}, flush=True)  # type: ignore[attr-defined]
                for name, plan in row["plan"].items():  # type: ignore[attr-defined]
                    print(f"   {name}: {plan}", flush=True)
    if given.json:
        machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "fxfuse": fxfuse.__version__,
            "precision": "ieee" if given.ieee else "tf32 allowed",
            "protocol": "no_grad, CUDA events around 20 queued calls, rotated inputs, median of 7, cudnn.benchmark",
        }
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
