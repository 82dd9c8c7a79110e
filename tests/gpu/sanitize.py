"""compute-sanitizer over a small set of kernels: every algorithm, and samples that the direct kernel makes.

    python tests/gpu/sanitize.py [--tools memcheck racecheck initcheck synccheck] [--kernels NAME ...]
                                   [--sanitizer PATH]

compute-sanitizer comes with the CUDA toolkit, and in the wheel nvidia-cuda-sanitizer-api (13 MiB;
``nvidia/cu13/bin/compute-sanitizer`` in site-packages). Only this project's kernels are instrumented, or those of them
that are named. The same chains run without a tool first, which fills the cache of kernels and compares results with
float64. Under initcheck nothing is compared, and all that kernels read is copied from the host: the tool knows what it
has seen written, by them and by copies.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
KERNELS = (
    "measure", "prepare", "again", "convolution", "direct", "merge", "finish", "running", "whole", "any", "pool",
    "fold", "tap_sums", "add_slots", "contract_taps",
)  # fmt: skip
PACKAGES = ("nvidia-cuda-sanitizer-api", "nvidia-cuda-sanitizer-api-cu12")
#: exit status of a run in which a tool found something
FOUND = 99


def sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or in its wheel."""
    on_path = shutil.which("compute-sanitizer")
    if on_path is not None:
        return on_path
    for name in PACKAGES:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "compute-sanitizer":
                place = Path(str(file.locate()))
                place.chmod(place.stat().st_mode | 0o111)  # wheels lose it
                return str(place)
    return None


def command(tool: str, binary: str, kernels: Sequence[str] = KERNELS) -> list[str]:
    """The command that runs the chains under ``tool``."""
    filters = [word for name in kernels for word in ("--kernel-name", f"kernel_name={name}")]
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", "--show-backtrace", "device"]
    options += ["--report-api-errors", "no"]  # torch asks the driver for functions that it may not have
    run = ["--run", *(["--unchecked"] if tool == "initcheck" else [])]
    return [binary, *options, *filters, "--target-processes", "application-only", sys.executable, __file__, *run]


def run(device: str, *, checked: bool = True) -> None:
    """Run the chains, twice each, and check the results of those whose values are ordinary.

    Not ``checked``: those of a convolution's kernels alone, on values from the host.
    """
    import torch
    from many_chains import kernels_always

    with kernels_always(), torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for name in _run_each(device) if checked else _run_copies(device):
            print(name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def _run_each(device: str) -> Iterator[str]:
    import test_collapsed
    import test_limits
    import torch

    for name in test_collapsed.CASES:
        for last in (False, True):
            test_collapsed.check_case(name, torch.float16 if last else torch.float32, last=last)
            yield f"{name}, {'channels last' if last else 'contiguous'}"
    for kind, way in test_limits.CASES:
        case = test_limits.Case.of(kind, way)
        x = case.input()
        case.fast(x)
        case.check(case.fast(x), x)
        yield f"{kind}, {way}"
        if case.numerics != "float16" and kind in ("stored", "maximum", "norm"):
            x[1, 3, 2, 5, 4], x[2, 0, 0, 0, 0] = 1e30, float("nan")
            case.fast(x)
            yield f"{kind}, {way}, values of every size"
    for store in test_limits.STORES:
        for numerics in ("tf32", "float16"):
            test_limits.check_store(*store, numerics)
            yield f"{store}, {numerics}"
    for name in ("a_crop", "channels_that_begin_anywhere", "one_column_for_all"):
        for numerics in ("tf32", "bfloat16"):
            for layout in ("contiguous", "last"):
                test_limits.check_view(name, numerics, layout)
                yield f"{name}, {numerics}, {layout}"
    if device == "cuda":
        torch.cuda.synchronize()


def _run_copies(device: str) -> Iterator[str]:
    import test_limits

    for kind, way in test_limits.CASES:
        with mock.patch.object(test_limits, "DEVICE", "cpu"):
            case = test_limits.Case.of(kind, way)
            x, fast = case.input().to(device), case.fast.to(device)
        fast(x), fast(x)
        yield f"{kind}, {way}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--sanitizer", help="the compute-sanitizer to run")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="that are instrumented")
    parser.add_argument("--run", action="store_true", help="run the chains in this process, without a tool")
    parser.add_argument("--unchecked", action="store_true", help="of these what initcheck can follow")
    given = parser.parse_args()
    if given.run:
        import torch

        run("cuda" if torch.cuda.is_available() else "cpu", checked=not given.unchecked)
        return
    binary = given.sanitizer or sanitizer()
    if binary is None:
        sys.exit(f"no compute-sanitizer on the PATH: pip install {PACKAGES[0]}, or give --sanitizer")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor is an allocation of its own
    failed = []
    for tool in (None, *given.tools):
        began = time.monotonic()
        words = [sys.executable, __file__, "--run"] if tool is None else command(tool, binary, given.kernels)
        print(f"== {tool or 'without a tool'}: {' '.join(words)}", flush=True)
        status = subprocess.run(words, env=environment, check=False).returncode
        print(f"== {tool or 'without a tool'}: {status}, {time.monotonic() - began:.0f} s", flush=True)
        if status:
            failed.append(tool or "the chains themselves")
        if status and tool is None:
            break
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
