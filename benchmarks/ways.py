"""Every way to run each case's region, measured by fxfuse.tune: what the estimate is held to.

    python benchmarks/ways.py [--dtype float16 ...] [--json FILE]

For the project's models and the chains of fxfuse/bench/chains.py. benchmarks/README.md has the command for the file.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from arguments import Budget, add_file, opened

import fxfuse
from fxfuse import bench, environment
from fxfuse.bench.chains import CHAINS
from fxfuse.models import CASES, Case

DTYPES = ("float32", "float16", "bfloat16")


def measured(case: Case, mode: str, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a call of every way of the first region, by name."""
    torch.manual_seed(0)
    model = case.make().to("cuda", dtype).train(mode == "train")
    x = torch.randn(case.shape, device="cuda", dtype=dtype)
    tuning = fxfuse.tune(fxfuse.optimize(model, x), x)
    print(tuning, flush=True)
    ways = tuning.regions[0].ways if tuning.regions else ()
    return {w.name: round(w.seconds * 1e3, 3) for w in ways if w.seconds is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_file(parser)
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="names of chains and models (default: all)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"], choices=DTYPES)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: a CPU has one way to run a region")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    machine = {
        **environment.described(torch.device("cuda")),
        "precision": "tf32 allowed",
        "protocol": "fxfuse.tune: no_grad, the ways queued in turns, medians",
    }
    results = opened(given, machine, key=("model", "mode", "dtype"))
    todo = [(c, m, d) for d in given.dtype for c in (*CHAINS, *CASES) for m in bench.modes(c)]
    todo = [row for row in todo if not given.cases or row[0].name in given.cases]
    budget = Budget(given.minutes, len(todo))
    for case, mode, dtype in todo:
        row: dict[str, Any] = {"model": case.name, "mode": mode, "dtype": dtype}
        if budget.begins(f"{case.name} {mode} {dtype}", done=results.find(row) is not None):
            results.add({**row, "ms": measured(case, mode, getattr(torch, dtype))})
    budget.ends()


if __name__ == "__main__":
    main()
