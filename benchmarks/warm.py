"""Compiles what gpu.py --compile measures, several cases at once: torch and fxfuse keep it on disk.

Each case has a process of its own, which calls the model as fxfuse and as torch.compile of both memory layouts make it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import subprocess
import sys

import torch
from gpu import add_cases, asked_for

import fxfuse
from fxfuse import bench
from fxfuse.models import Case


def warm(case: Case, dtype: torch.dtype) -> None:
    """Call everything that is compiled for a case."""
    torch.backends.cudnn.allow_tf32 = True
    for mode in bench.modes(case):
        torch.manual_seed(0)
        model = case.make().to("cuda", dtype).train(mode == "train")
        x = torch.randn(case.shape, device="cuda", dtype=dtype)
        with torch.no_grad():
            fxfuse.optimize(model)(x)
            for layout in (torch.contiguous_format, torch.channels_last_3d):
                torch._dynamo.reset()
                torch.compile(model.to(memory_format=layout))(x.to(memory_format=layout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_cases(parser)
    parser.add_argument("--jobs", type=int, default=7, metavar="N", help="so many at once (default: 7)")
    parser.add_argument("--case", metavar="NAME", help="this one alone, in this process")
    given = parser.parse_args()
    cases = {c.name: c for c in asked_for(given)}
    if given.case:
        warm(cases[given.case], getattr(torch, given.dtype))
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        done = {n: pool.submit(subprocess.run, [*command, "--case", n], check=False) for n in cases}
    failed = [name for name, one in done.items() if one.result().returncode]
    if failed:
        raise SystemExit(f"not compiled: {', '.join(failed)}")


if __name__ == "__main__":
    main()
