"""`python -m fxfuse demo`: the five starting models, optimised, explained, checked and timed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from fxfuse import environment
from fxfuse.api import optimize, verify
from fxfuse.models import CASES, Case
from fxfuse.report import Report
from fxfuse.report.words import count
from fxfuse.timing import in_turns
from fxfuse.verification import VerifyReport


@dataclasses.dataclass(frozen=True)
class Result:
    """One model in one mode: what was done, errors against float64, median seconds of a call."""

    name: str
    mode: str
    shape: tuple[int, ...]
    report: Report
    verified: VerifyReport
    eager: float
    optimised: float

    @property
    def eager_error(self) -> float:
        return self.verified.comparisons[0].own

    @property
    def optimised_error(self) -> float:
        return self.verified.comparisons[0].error

    @property
    def speedup(self) -> float:
        return self.eager / self.optimised


def results(device: torch.device, *, seconds: float = 1.0) -> Iterator[Result]:
    """Run every model; BatchNorm's, whose modes differ, in both. ``seconds`` bounds each measurement."""
    for case in CASES:
        modes = ("train", "eval") if any(isinstance(m, nn.BatchNorm3d) for m in case.make().modules()) else ("eval",)
        for mode in modes:
            yield run(case, mode, case.shape if device.type == "cuda" else case.small, device, seconds=seconds)


def run(
    case: Case,
    mode: str,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    rounds: int = 15,
    seconds: float | None = None,
) -> Result:
    """Optimise ``case`` in ``mode`` ("train", "eval"), compare with float64, and time it against eager mode."""
    torch.manual_seed(0)
    model = case.make().to(device).train(mode == "train")
    x = torch.randn(shape, device=device)
    original = copy.deepcopy(model)
    optimised = optimize(model, (x,))
    with torch.no_grad():
        found = verify(original, optimised, x)
        times = in_turns(
            {"eager": lambda: original(x), "optimised": lambda: optimised(x)}, rounds=rounds, seconds=seconds
        )
    report: Report = optimised.fxfuse_report  # type: ignore[assignment]
    return Result(case.name, mode, shape, report, found, times["eager"], times["optimised"])


def main() -> int:
    """Print the reports and a table; 0 where every result is as close to float64 as eager mode's, else 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {count(torch.get_num_threads(), 'thread')}"
    )
    print(f"fxfuse on {name}, torch {torch.__version__}\n")
    if device.type == "cuda":
        print("".join(f"{line}\n" for line in environment.missing()))
    done = []
    for result in results(device):
        print(f"--- {result.name}, {result.mode} mode, x {'x'.join(map(str, result.shape))}")
        print(result.report, "\n", flush=True)
        done.append(result)
    print(
        f"{'model':<18}{'mode':<7}{'eager ms':>10}{'fxfuse ms':>11}{'gain':>8}   error against float64: eager, fxfuse"
    )
    for r in done:
        errors = f"{r.eager_error:.1e}, {r.optimised_error:.1e}"
        print(f"{r.name:<18}{r.mode:<7}{r.eager * 1e3:>10.2f}{r.optimised * 1e3:>11.2f}{r.speedup:>7.2f}x   {errors}")
    wrong = [r for r in done if not r.verified.ok]
    for result in wrong:
        print(f"\n{result.name}, {result.mode}: {result.verified}")
    return 1 if wrong else 0
