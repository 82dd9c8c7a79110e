"""fxfuse and its peers on a CUDA GPU, all in one process on the same inputs.

    python benchmarks/gpu.py [--json FILE] [--cases NAME ...] [--chains] [--random N] [--seed N] [--compile]
                             [--dtype float32|float16|bfloat16] [--ieee]

What `python -m fxfuse bench` does, for sets of cases: the project's five models, with --chains those of
fxfuse/bench/chains.py, with --random as many random ones. Protocol: no_grad, CUDA events around queued calls,
inputs rotated past the L2 cache, median of seven, cudnn.benchmark on for every peer; what is not right is not
timed. The peers: eager, eager in channels_last_3d, and with --compile torch.compile of both. The floor is
what moving the input, the parameters and the output takes at the copy bandwidth, or what the products that
are left after the rewrites take at the rate of 16-bit matrix multiplications, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random

import torch

from fxfuse import bench, environment
from fxfuse.bench.chains import CHAINS, draw
from fxfuse.models import CASES, Case


def measured(case: Case, mode: str, dtype: torch.dtype, compiled: bool) -> bench.Row:
    """The row of one case; a line per result on the way."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # or it gives up compiling after a few cases of the same class
    device = torch.device("cuda")
    names = ["eager", "channels_last", *(("compile", "compile_channels_last") if compiled else ())]
    row = bench.measure(
        case.name,
        case.make().to(device, dtype).train(mode == "train"),
        [case.shape],
        dtype=dtype,
        device=device,
        peers=[bench.PEERS[name] for name in names],
        machine=bench.Machine.of(device),
    )
    print(row.model, row.mode, row.dtype, {k: f"{v:.3f}" for k, v in row.ms.items()}, flush=True)
    if row.ours is not None and row.best is not None:
        ours, best = row.ms[row.ours], row.ms[row.best]
        print(f"   {best / ours:.2f} x the best peer, {ours / row.floor:.1f} x the floor", end="; ")
    print("errors", {k: f"{v:.1e}" for k, v in row.error.items()}, flush=True)
    for name, plan in (row.plan | row.failed).items():
        print(f"   {name}: {plan}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    parser.add_argument("--chains", action="store_true", help="the chains of fxfuse/bench/chains.py")
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
    chosen = [c for c in cases if not given.cases or c.name in given.cases]
    rows = [measured(c, mode, getattr(torch, given.dtype), given.compile) for c in chosen for mode in bench.modes(c)]
    if given.json:
        machine = {
            **environment.described(torch.device("cuda")),
            "precision": "ieee" if given.ieee else "tf32 allowed",
            "protocol": bench.PROTOCOL["cuda"],
        }
        given.json.write_text(json.dumps({"machine": machine, "rows": [r.to_json() for r in rows]}, indent=1) + "\n")
    if any(row.wrong for row in rows):
        raise SystemExit("wrong results: " + ", ".join(f"{r.model}: {', '.join(r.wrong)}" for r in rows if r.wrong))


if __name__ == "__main__":
    main()
