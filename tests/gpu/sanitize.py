"""compute-sanitizer over a small set of kernels: every algorithm, and samples that the direct kernel makes.

    python tests/gpu/sanitize.py [--tools memcheck racecheck initcheck synccheck] [--kernels NAME ...]
                                   [--sanitizer PATH] [--jobs N]

compute-sanitizer comes with the CUDA toolkit, and in the wheel nvidia-cuda-sanitizer-api (13 MiB;
``nvidia/cu13/bin/compute-sanitizer`` in site-packages). Only this project's kernels are instrumented, or those of them
that are named. The same chains run without a tool first, which fills the cache of kernels and compares results with
float64. Under initcheck nothing is compared, and all that kernels read is copied from the host: the tool knows what it
has seen written, by them and by copies.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from fxfuse.kernels.convolution.specialisation import Specialisation

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
KERNELS = (
    "measure", "prepare", "again", "convolution", "direct", "merge", "finish_statistics", "finish_exponentials",
    "finish_extremes", "running", "whole", "any", "pool", "fold", "tap_sums", "add_slots", "contract_taps", "unmark",
    "correlate", "moments", "bundle",
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


def run(device: str, *, checked: bool = True, part: int = 0, parts: int = 1) -> None:
    """Run the chains, twice each, and check the results of those whose values are ordinary.

    Not ``checked``: those of a convolution's kernels alone, on values from the host. A ``part`` of so many has some.
    """
    import torch
    from many_chains import kernels_always

    chains = _each(device) if checked else _copies(device)
    with kernels_always(), torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        for name, chain in itertools.islice(chains, part, None, parts):
            chain()
            print(name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def _each(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    import place
    import test_along
    import test_collapsed
    import test_correlation
    import test_in_front
    import test_limits
    import test_planes
    import test_rows
    import test_rows_beside
    import test_space
    import torch
    from along import rows_apart, rows_together
    from fronts import FRONTS
    from orientation import pingpong_always, sets_always

    from fxfuse.kernels import execute
    from fxfuse.kernels.convolution import planar
    from fxfuse.kernels.convolution.specialisation import Along

    def twice(kind: str, way: str, *shape: int) -> None:
        case = test_limits.Case.of(kind, way)
        x = case.input(0, *shape)
        case.fast(x)
        case.check(case.fast(x), x)
        if case.numerics != "float16" and kind in ("stored", "maximum", "norm"):  # values of every size
            x[1, 3, 2, 1, 2], x[2, 0, 0, 0, 0] = 1e30, float("nan")
            case.fast(x)

    def kernel() -> Specialisation:
        """The convolution's: nothing else was prepared."""
        (made,) = (p for p in execute._prepared.values() if p is not None)
        assert made.convolution is not None
        return made.convolution.made

    def teams(kind: str, way: str) -> None:
        with place.kernels_always(), pingpong_always():
            twice(kind, way)
            assert kernel().pingpong

    def side_by_side(way: str) -> None:
        with place.kernels_always(), sets_always():
            twice("stored", way, 16, 32, 3, 4, 5)
            assert kernel().samples > 1

    def as_it_lies(name: str) -> None:
        with place.kernels_always(), mock.patch.object(planar, "WORTH_IT", 0.0):
            test_planes.test_values(name, torch.Tensor.contiguous, torch.float32)

    def beside(name: str, last: bool) -> None:
        with place.kernels_always(planes=False):
            test_rows_beside.test_rows_of_several_positions(name, last)

    def in_front(name: str, front: Callable[..., object]) -> None:
        with place.kernels_always(planes=False):
            test_in_front.test_forms(name, front, None)

    def rows(name: str) -> None:
        with place.kernels_always(), rows_apart():
            test_rows.test_pools_of_rows(name, torch.float32)

    def along(last: str, size: str, way: Along) -> None:
        with place.kernels_always(), rows_together(way):
            test_along.test_rows(last, torch.float32, size, way)
            test_along.test_pools_of_rows(torch.nn.AvgPool3d(2), torch.float16, way)

    def over_space(name: str, stride: int) -> None:
        test_space.test_over_space(name, torch.float32, stride, False)

    def correlated(channels: int) -> None:
        with place.kernels_always(twice=True):
            test_correlation.test_output_channels(channels)

    for name in test_collapsed.CASES:
        for last in (False, True):
            dtype = torch.float16 if last else torch.float32
            chain = functools.partial(test_collapsed.check_case, name, dtype, last=last)
            yield f"{name}, {'channels last' if last else 'contiguous'}", chain
    for kind, way in test_limits.CASES:
        yield f"{kind}, {way}", functools.partial(twice, kind, way)
    for kind, way in itertools.product(("maximum", "mean", "softmax", "batch"), ("tf32", "float16 last")):
        yield f"{kind}, {way}, each warpgroup has tiles", functools.partial(teams, kind, way)
    for way in ("tf32", "float16 last"):
        yield f"stored, {way}, samples side by side", functools.partial(side_by_side, way)
    for name in ("alone", "a mean of many", "a maximum", "softmax", "statistics"):
        yield f"{name}, x as it lies", functools.partial(as_it_lies, name)
    for name, last in itertools.product(("a mean of sums", "holes", "statistics"), (False, True)):
        lies = "channels last" if last else "contiguous"
        yield f"{name}, rows of several positions, {lies}", functools.partial(beside, name, last)
    for name, front in itertools.product(("four at once", "channels last", "several positions in a row"), FRONTS):
        yield f"{name}, behind a chain {front.__name__}", functools.partial(in_front, name, front)
    for last, size, way in itertools.product(("layer_norm", "softmax"), test_along.SIZES, Along):
        yield f"{last} of {size} rows {way.value}", functools.partial(along, last, size, way)
    for name, stride in itertools.product(("softmax", "maximum and mean"), (1, 2)):
        yield f"{name} over space, stride {stride}", functools.partial(over_space, name, stride)
    for norm in test_rows.POOLED:
        yield f"rows and a pool: {norm}", functools.partial(rows, norm)
    for channels in (1, 17):
        yield f"moments of {channels} channels from products of x", functools.partial(correlated, channels)
    for store in test_limits.STORES:
        for numerics in ("tf32", "float16"):
            yield f"{store}, {numerics}", functools.partial(test_limits.check_store, *store, numerics)
    for name in ("a_crop", "channels_that_begin_anywhere", "one_column_for_all"):
        for numerics in ("tf32", "bfloat16"):
            for layout in ("contiguous", "last"):
                chain = functools.partial(test_limits.check_view, name, numerics, layout)
                yield f"{name}, {numerics}, {layout}", chain


def _copies(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    import test_limits

    def twice(kind: str, way: str) -> None:
        with mock.patch.object(test_limits, "DEVICE", "cpu"):
            case = test_limits.Case.of(kind, way)
            x, fast = case.input().to(device), case.fast.to(device)
        fast(x), fast(x)

    for kind, way in test_limits.CASES:
        yield f"{kind}, {way}", functools.partial(twice, kind, way)


def _statuses(words: Sequence[str], jobs: int) -> list[int]:
    """Exit statuses of a command for every part of the chains, ``jobs`` of them at the same time."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor is an allocation of its own
    parts = [[*words, "--part", str(i), "--jobs", str(jobs)] for i in range(jobs)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return [*pool.map(lambda part: subprocess.run(part, env=environment, check=False).returncode, parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--sanitizer", help="the compute-sanitizer to run")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="that are instrumented")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run as many parts of the chains at a time")
    parser.add_argument("--run", action="store_true", help="run the chains in this process, without a tool")
    parser.add_argument("--part", type=int, default=0, help="of the chains, those of one of so many jobs")
    parser.add_argument("--unchecked", action="store_true", help="of these what initcheck can follow")
    given = parser.parse_args()
    if given.run:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        run(device, checked=not given.unchecked, part=given.part, parts=given.jobs)
        return
    binary = given.sanitizer or sanitizer()
    if binary is None:
        sys.exit(f"no compute-sanitizer on the PATH: pip install {PACKAGES[0]}, or give --sanitizer")
    failed = []
    for tool in (None, *given.tools):
        began = time.monotonic()
        words = [sys.executable, __file__, "--run"] if tool is None else command(tool, binary, given.kernels)
        print(f"== {tool or 'without a tool'}: {' '.join(words)}", flush=True)
        statuses = _statuses(words, given.jobs)
        found = ", ".join(map(str, statuses))
        print(f"== {tool or 'without a tool'}: {found}, {time.monotonic() - began:.0f} s", flush=True)
        if any(statuses):
            failed.append(tool or "the chains themselves")
        if any(statuses) and tool is None:
            break
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
