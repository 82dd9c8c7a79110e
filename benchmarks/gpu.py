"""fxfuse and its peers on a CUDA GPU, all in one process on the same inputs.

    python benchmarks/gpu.py [--json FILE] [--cases NAME ...] [--compile] [--dtype float32|float16|bfloat16] [--ieee]

Protocol: no_grad, CUDA events around queued calls, inputs rotated past the L2 cache, median of seven,
cudnn.benchmark on for every peer. The peers: eager, eager in channels_last_3d, and with --compile
torch.compile of both.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.compare import relative_error
from fxfuse.models import CASES, Case

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


def measure(case: Case, mode: str, dtype: torch.dtype, compiled: bool) -> dict[str, object]:
    torch.manual_seed(0)
    model = case.make().cuda().to(dtype).train(mode == "train")
    size = torch.Size(case.shape).numel() * dtype.itemsize
    xs = [torch.randn(case.shape, device="cuda", dtype=dtype) for _ in range(min(8, int(ROTATION // size) + 2))]
    small = xs[0][:4]
    truth = copy.deepcopy(model).double()(small.double())
    row: dict[str, object] = {
        "model": case.name,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
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
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    parser.add_argument("--cases", nargs="*", help="names of models; all by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--ieee", action="store_true", help="float32 convolutions without TF32")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to start)")
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = not given.ieee
    rows = []
    with torch.no_grad():
        for case in CASES:
            if given.cases and case.name not in given.cases:
                continue
            modes = (
                ("train", "eval") if any(isinstance(m, nn.BatchNorm3d) for m in case.make().modules()) else ("eval",)
            )
            for mode in modes:
                row = measure(case, mode, getattr(torch, given.dtype), given.compile)
                print(row["model"], mode, row["dtype"], {k: f"{v:.3f}" for k, v in row["ms"].items()}, flush=True)  # type: ignore[attr-defined]
                print("   errors", {k: f"{v:.1e}" for k, v in row["error"].items()}, flush=True)  # type: ignore[attr-defined]
                rows.append(row)
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
