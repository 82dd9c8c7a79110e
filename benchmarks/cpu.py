"""Eager mode against fxfuse on the CPU: the five starting models with their real layers and sizes, batch 1.

    python benchmarks/cpu.py [--json benchmarks/results/cpu.json]

Both run in turns in one process; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform

import torch

import fxfuse
from fxfuse import demo, environment
from fxfuse.models import CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    rows = []
    print(f"{'model':<18}{'mode':<7}{'eager ms':>10}{'fxfuse ms':>11}{'gain':>8}")
    for case in CASES:
        for mode in ("train", "eval"):
            shape = (1, *case.shape[1:])
            r = demo.run(case, mode, shape, torch.device("cpu"), rounds=given.rounds)
            print(
                f"{r.name:<18}{r.mode:<7}{r.eager * 1e3:>10.1f}{r.optimised * 1e3:>11.1f}{r.speedup:>7.2f}x", flush=True
            )
            rows.append(
                {
                    "model": r.name,
                    "mode": r.mode,
                    "shape": list(shape),
                    "eager_ms": round(r.eager * 1e3, 3),
                    "fxfuse_ms": round(r.optimised * 1e3, 3),
                    "gain": round(r.speedup, 3),
                    "eager_error": r.eager_error,
                    "fxfuse_error": r.optimised_error,
                    "rules": [a.rule for a in r.report.rules],
                }
            )
    if given.json:
        machine = {
            "processor": environment.processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fxfuse": fxfuse.__version__,
            "protocol": f"no_grad, float32, in turns, median of {given.rounds}",
        }
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
