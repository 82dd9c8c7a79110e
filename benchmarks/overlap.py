"""What it brings that the kernels of a call overlap: microseconds of a call, kernels together and one behind the other.

    python benchmarks/overlap.py [--dtype float16 ...] [--most 300]

Of replayed CUDA graphs, so that the host's part does not count, in turns; for regions that run as kernels and whose
call takes less than ``--most`` microseconds: of longer ones a launch is nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import fxfuse
from fxfuse import bench, ops, timing
from fxfuse.bench.chains import CHAINS
from fxfuse.kernels.plan import Path
from fxfuse.kernels.runtime import launch
from fxfuse.models import CASES, Case

#: calls of a graph
CALLS = 20


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """Some calls, as one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def measured(case: Case, mode: str, dtype: torch.dtype, most: float) -> dict[str, float] | None:
    """Microseconds of a call; None where no kernels run, or for long."""
    torch.manual_seed(0)
    model = case.make().to("cuda", dtype).train(mode == "train")
    x = torch.randn(case.shape, device="cuda", dtype=dtype)
    fast = fxfuse.optimize(model, x)
    with ops.watch() as runs:
        fast(x)
    if [r.path for r in runs] != [Path.KERNEL]:
        return None
    if timing.queued(lambda _: fast(x), [None], repeats=3) * 1e6 > most:
        return None
    ways = {"overlapping": replayed(lambda: fast(x))}
    launch.OVERLAP.value = 0
    try:
        ways["one by one"] = replayed(lambda: fast(x))
    finally:
        launch.OVERLAP.value = 1
    return {name: seconds / CALLS * 1e6 for name, seconds in timing.queued_in_turns(ways).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"])
    parser.add_argument("--most", type=float, default=300)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, on which kernels could overlap")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: us per call, replayed")
    for dtype in given.dtype:
        for case in (*CHAINS, *CASES):
            for mode in bench.modes(case):
                with torch.no_grad():
                    found = measured(case, mode, getattr(torch, dtype), given.most)
                if found is not None:
                    told = "".join(f"{name} {value:8.1f}   " for name, value in found.items())
                    print(f"{case.name:<28}{mode:<6}{dtype:<9}{told}", flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
