"""fxfuse and its peers on a CUDA GPU, all in one process on the same inputs. benchmarks/README.md has the commands.

What `python -m fxfuse bench` does, for sets of cases: the project's five models, with --chains those of
fxfuse/bench/chains.py, with --idioms those of fxfuse/bench/idioms.py, with --random as many random ones. Protocol:
no_grad, CUDA events around queued calls, inputs rotated past the L2 cache, median of seven, cudnn.benchmark on for
every peer; what is not right is not timed. The peers: eager, eager in channels_last_3d, and with --compile
torch.compile of both. The floor is what moving the input, the parameters and the output takes at the copy bandwidth,
or what the products that are left after the rewrites take at the rate of 16-bit matrix multiplications, whichever is
longer.

The file is written after every row. With --resume, rows that this source of fxfuse measured on the same device
and versions, with the same peers, are kept and not measured again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from arguments import Budget, add_file, opened

from fxfuse import bench, environment
from fxfuse.bench.chains import CHAINS, draw
from fxfuse.bench.idioms import IDIOMS
from fxfuse.models import CASES, Case

DTYPES = ("float32", "float16", "bfloat16")


def add_cases(parser: argparse.ArgumentParser) -> None:
    """--chains, --random and --seed, and --dtype."""
    parser.add_argument("--chains", action="store_true", help="the chains of fxfuse/bench/chains.py")
    parser.add_argument("--idioms", action="store_true", help="those of fxfuse/bench/idioms.py")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many random chains")
    parser.add_argument("--seed", type=int, default=0, help="of the random chains (default: 0)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: float32")


def asked_for(given: argparse.Namespace) -> tuple[Case, ...]:
    """The set of cases that the arguments of `add_cases` name."""
    if given.random:
        pick = random.Random(given.seed)
        return tuple(draw(pick) for _ in range(given.random))
    return IDIOMS if given.idioms else CHAINS if given.chains else CASES


def jobs(given: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    """The cases that are asked for, in each of their modes."""
    cases = asked_for(given)
    unknown = sorted({*(given.cases or ())} - {c.name for c in cases})
    if unknown:
        raise SystemExit(f"there is no case {', '.join(unknown)}; there are {', '.join(c.name for c in cases)}")
    for case in cases:
        if not given.cases or case.name in given.cases:
            yield from ((case, mode) for mode in bench.modes(case))


def measured(case: Case, mode: str, dtype: torch.dtype, peers: Sequence[bench.Peer], budget: Budget) -> bench.Row:
    """The row of one case; lines about what happens on the way."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # or it gives up compiling after a few cases of the same class
    device = torch.device("cuda")
    row = bench.measure(
        case.name,
        case.make().to(device, dtype).train(mode == "train"),
        [case.shape],
        dtype=dtype,
        device=device,
        peers=peers,
        machine=bench.Machine.of(device),
        progress=budget.say,
    )
    print("  ", {k: f"{v:.3f}" for k, v in row.ms.items()}, flush=True)
    if row.ours is not None and row.best is not None:
        ours, best = row.ms[row.ours], row.ms[row.best]
        print(f"   {best / ours:.2f} x the best peer, {ours / row.floor:.1f} x the floor", flush=True)
    print("   errors", {k: f"{v:.1e}" for k, v in row.error.items()}, flush=True)
    for name, plan in (row.plan | row.failed).items():
        print(f"   {name}: {plan}", flush=True)
    return row


def complete(row: Mapping[str, Any], peers: Sequence[bench.Peer]) -> bool:
    """Whether a row of the file has all that is asked for, and fxfuse was right."""
    failed = row.get("failed", {})
    known = {*row["ms"], *failed}
    return all(p.label in known for p in peers) and not any(label.startswith("fxfuse") for label in failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_file(parser)
    add_cases(parser)
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="names of models (default: all)")
    parser.add_argument("--ieee", action="store_true", help="float32 convolutions without TF32")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to start)")
    given = parser.parse_args()
    todo = list(jobs(given))
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; benchmarks/cpu.py measures on a CPU")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = not given.ieee
    names = ["eager", "channels_last", *(("compile", "compile_channels_last") if given.compile else ())]
    peers = [bench.PEERS[name] for name in names]
    machine = {
        **environment.described(torch.device("cuda")),
        "precision": "ieee" if given.ieee else "tf32 allowed",
        "protocol": bench.PROTOCOL["cuda"],
    }
    results = opened(given, machine, key=("model", "mode", "dtype"))
    budget, wrong = Budget(given.minutes, len(todo)), []
    for case, mode in todo:
        kept = results.find({"model": case.name, "mode": mode, "dtype": given.dtype})
        if not budget.begins(f"{case.name} {mode} {given.dtype}", done=kept is not None and complete(kept, peers)):
            continue
        row = measured(case, mode, getattr(torch, given.dtype), peers, budget)
        results.add(row.to_json())
        if row.wrong:
            wrong.append(f"{case.name}: {', '.join(row.wrong)}")
    budget.ends()
    if wrong:
        raise SystemExit("wrong results: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
