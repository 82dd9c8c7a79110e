"""Transposed convolutions on a Hopper GPU, of decoders and random ones: the engine's kernel against cuDNN's best.

benchmarks/README.md has the commands; the file is written after every row, and --resume goes on with it.

Peers run in the same process on the same inputs: eager contiguous and eager channels_last_3d, with
cudnn.benchmark on. Times are medians of queued calls, in milliseconds; inputs are rotated past the L2.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arguments import Budget, add_file, opened
from torch import Tensor

from fxfuse import environment
from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.convolution.tiling import seconds
from fxfuse.kernels.planning.choice import slower
from fxfuse.kernels.runtime.convolution_engine import Calls
from fxfuse.kernels.stages.steps import Launch
from fxfuse.timing import queued

CLASSES = {"tf32": (torch.float32, False), "ieee": (torch.float32, True), "float16": (torch.float16, False)}
#: relative L2 errors against float64 that the classes allow
LIMIT = {"tf32": 1e-3, "ieee": 6e-7, "float16": 1e-3}
PROTOCOL = "CUDA events around 10 queued calls, rotated inputs, median of 5, cudnn.benchmark"
#: rows whose kernels are compiled together, on all cores, before they are measured
TOGETHER = 24
CHANNELS = (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)


class Wrong(Exception):  # noqa: N818 - it is the result that is wrong
    """A kernel errs by more than its class allows: the layer is not timed."""


@dataclasses.dataclass(frozen=True)
class Case:
    layer: Layer
    batch: int
    sizes: tuple[int, int, int]

    @property
    def extents(self) -> tuple[int, int, int]:
        layer = self.layer
        found = [
            (i - 1) * s - 2 * p + d * (k - 1) + 1
            for i, k, s, p, d in zip(self.sizes, layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
        ]
        return found[0], found[1], found[2]

    def __str__(self) -> str:
        g = self.layer
        return (
            f"CT({g.in_channels * g.groups},{g.out_channels * g.groups},k{g.kernel},s{g.stride},p{g.padding},"
            f"d{g.dilation},g{g.groups}) x {self.batch}x{self.sizes}"
        )


def _decoder(
    channels: tuple[int, int], kernel: int | tuple[int, int, int], stride: int, padding: int, batch: int, size: int
) -> Case:
    """A layer of one group; one whose kernel is (1, k, k) keeps planes, of which there are fewer than rows."""
    flat = isinstance(kernel, tuple)
    kernels = kernel if isinstance(kernel, tuple) else (kernel,) * 3
    layer = Layer(*channels, 1, kernels, (1 if flat else stride, stride, stride), (padding,) * 3, (1, 1, 1))
    return Case(layer, batch, (max(8, size // 4) if flat else size, size, size))


FLAT = (1, 2, 2)
#: of segmentation, generators and their outputs of few channels, and convolutions of stride 1
DECODERS = tuple(
    _decoder(*each)
    for each in (
        ((64, 32), 2, 2, 0, 2, 48), ((128, 64), 2, 2, 0, 2, 32), ((256, 128), 2, 2, 0, 2, 16),
        ((32, 16), 2, 2, 0, 2, 64), ((512, 256), 2, 2, 0, 4, 8), ((320, 256), 2, 2, 0, 2, 8),
        ((96, 48), 2, 2, 0, 2, 48), ((48, 24), 2, 2, 0, 2, 48), ((16, 16), 2, 2, 0, 4, 48),
        ((320, 320), FLAT, 2, 0, 2, 16), ((64, 32), FLAT, 2, 0, 2, 64), ((32, 1), 3, 1, 1, 4, 64),
        ((32, 3), 3, 1, 1, 4, 64), ((64, 3), 4, 2, 1, 8, 32), ((64, 1), 4, 2, 1, 8, 32),
        ((128, 3), 3, 2, 1, 4, 32), ((32, 2), 1, 1, 0, 4, 64), ((64, 4), 1, 1, 0, 4, 64),
        ((64, 3), 5, 2, 2, 2, 48), ((48, 3), 3, 2, 1, 8, 32), ((32, 4), 4, 2, 1, 4, 48),
        ((128, 1), 5, 1, 2, 2, 32), ((64, 2), 2, 2, 0, 2, 64), ((32, 3), 4, 4, 0, 4, 32),
        ((64, 8), 4, 4, 0, 2, 32), ((32, 32), 4, 4, 0, 2, 32), ((64, 64), 3, 1, 1, 2, 64),
        ((128, 128), 3, 1, 1, 2, 32), ((32, 32), 3, 1, 1, 2, 96), ((256, 256), 3, 1, 1, 2, 16),
        ((64, 64), 1, 1, 0, 4, 64), ((128, 32), 1, 1, 0, 4, 64), ((64, 32), 3, 1, 1, 2, 64),
        ((96, 96), 3, 1, 1, 2, 48),
    )
)  # fmt: skip


def draw(rng: random.Random) -> Case:
    """A layer whose activations have between 4 MB and 1.5 GB in float32."""
    while True:
        groups = rng.choice([1, 1, 1, 1, 2, 4, 8])
        cin, cout = rng.choice(CHANNELS), rng.choice(CHANNELS)
        if cin % groups or cout % groups:
            continue
        k = rng.choice([1, 2, 2, 3, 3, 3, 4, 5, 7])
        s = rng.choice([1, 1, 2, 2, 2, 3, 4])
        kernel = tuple(max(1, k + rng.choice([0, 0, 0, -1])) for _ in range(3))
        stride = tuple(rng.choice([s, s, s, 1]) for _ in range(3))
        dilation = tuple(rng.choice([1, 1, 1, 1, 2]) for _ in range(3))
        padding = tuple(rng.randint(0, (kk - 1) * d // 2) for kk, d in zip(kernel, dilation, strict=True))
        layer = Layer(cin // groups, cout // groups, groups, kernel, stride, padding, dilation)  # type: ignore[arg-type]
        sizes = tuple(rng.choice([4, 7, 8, 16, 24, 32, 48, 64]) for _ in range(3))
        case = Case(layer, rng.choice([1, 2, 4, 8, 16]), sizes)  # type: ignore[arg-type]
        if min(case.extents) < 1:
            continue
        elements = case.batch * max(cout * math.prod(case.extents), cin * math.prod(sizes))
        if 2**20 <= elements <= 400 * 2**20:
            return case


def median(call: Callable[[int], object], calls: int = 10, rounds: int = 5) -> float:
    """Milliseconds of one of ``calls`` queued calls; ``call`` is given a running number."""
    return 1e3 * queued(call, range(calls), calls=calls, repeats=rounds, hold=True)


def measure(case: Case, name: str) -> dict[str, Any]:
    dtype, exact = CLASSES[name]
    layer = case.layer
    torch.backends.cudnn.allow_tf32 = not exact
    volume = layer.in_channels * math.prod(layer.kernel)
    copies = max(1, min(4, 10**8 // (case.batch * layer.in_channels * layer.groups * math.prod(case.sizes) * 4)))
    shape = (case.batch, layer.in_channels * layer.groups, *case.sizes)
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(copies)]
    weight = torch.randn(
        layer.in_channels * layer.groups, layer.out_channels, *layer.kernel, device="cuda", dtype=dtype
    ) / math.sqrt(volume)
    bias = torch.randn(layer.out_channels * layer.groups, device="cuda", dtype=dtype)
    geometry = (layer.stride, layer.padding, 0, layer.groups, layer.dilation)
    result: dict[str, Any] = {"case": str(case), "class": name}
    expected = F.conv_transpose3d(inputs[0].double(), weight.double(), bias.double(), *geometry)
    for layout in ("contiguous", "channels_last"):
        form = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
        xs = [x.contiguous(memory_format=form) for x in inputs]
        w = weight.contiguous(memory_format=form)

        def peer(i: int, xs: list[Tensor] = xs, w: Tensor = w) -> Tensor:
            return F.conv_transpose3d(xs[i % copies], w, bias, *geometry)

        result[f"eager {layout}"] = median(peer)
        made = convolution(case, name, layout)
        out = torch.full_like(expected, math.nan, dtype=dtype).contiguous(memory_format=form)
        calls = Calls(made, case.extents)
        calls.run(xs[0], weight, bias, out)
        error = ((out.double() - expected).norm() / expected.norm()).item()
        result[f"error {layout}"] = error
        if not error < LIMIT[name]:
            raise Wrong(f"{case} {name} {layout}: a relative error of {error:.1e}")

        def ours(i: int, xs: list[Tensor] = xs, out: Tensor = out, calls: Calls = calls) -> None:
            calls.run(xs[i % copies], weight, bias, out)

        result[f"fxfuse {layout}"] = median(ours)
        result[f"refused {layout}"] = refusal(case, name, layout)
        row = 0 if layout == "channels_last" else case.extents[2]
        result[f"estimate {layout}"] = 1e3 * seconds(
            made.made, case.batch, case.sizes, case.extents, row, out.element_size(), in_place=row == 0 and not exact
        )
    torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file(parser)
    parser.add_argument("--count", type=int, default=120, metavar="N", help="so many random layers (default: 120)")
    parser.add_argument("--seed", type=int, default=0, help="of the random layers (default: 0)")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="summarise FILE, of the same --count and --seed; measure nothing"
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    cases = [*DECODERS, *(draw(rng) for _ in range(arguments.count))]
    if arguments.read:
        summarise(cases, json.loads(arguments.read.read_text())["rows"])
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("this needs a Hopper GPU; without one, --read FILE summarises what was measured")
    torch.backends.cudnn.benchmark = True
    jobs = [(case, name) for case in cases for name in CLASSES]
    machine = {**environment.described(torch.device("cuda")), "protocol": PROTOCOL}
    results = opened(arguments, machine, key=("case", "class"))
    budget, wrong, ahead = Budget(arguments.minutes, len(jobs)), [], 0
    for number, (case, name) in enumerate(jobs):
        done = results.find({"case": str(case), "class": name}) is not None
        if not budget.begins(f"{case} {name}", done=done):
            continue
        if number >= ahead:
            ahead = number + TOGETHER
            budget.say("compiling")
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                list(pool.map(compile_ahead, jobs[number:ahead]))
        try:
            found = measure(case, name)
        except Unsupported as reason:
            found = {"case": str(case), "class": name, "unsupported": str(reason)}
        except Wrong as error:
            print(f"WRONG: {error}", flush=True)
            wrong.append(str(error))
            continue
        results.add(found)
        print(json.dumps(found), flush=True)
    budget.ends()  # what `choice` makes of the rows takes minutes of a processor: --read tells, anywhere
    if wrong:
        raise SystemExit(f"wrong results: {'; '.join(wrong)}")


def convolution(case: Case, name: str, layout: str) -> Convolution:
    """The engine's kernels for a layer whose x and result are of one memory format."""
    dtype, exact = CLASSES[name]
    in_place = layout == "channels_last" and dtype is not torch.float32
    return Convolution.of(
        case.layer, dtype, dtype, dtype, Epilogue(), layout, exact, case.extents, case.batch, in_place=in_place
    )


def refusal(case: Case, name: str, layout: str) -> str | None:
    """Why the compiler leaves the layer, with nothing behind it, to torch; None where it runs as a kernel."""
    dtype, _ = CLASSES[name]
    layer = case.layer
    kind = TensorType(dtype, (case.batch, layer.out_channels * layer.groups, *case.extents))
    launch = Launch(
        layer,
        "x",
        "w",
        "b",
        dtype,
        dtype,
        case.extents,
        "y",
        kind,
        dense(kind.shape, layout),
        ("conv_transpose",),
        x_layout=layout,
    )
    return slower(launch, convolution(case, name, layout).made, case.batch, case.sizes)


def summarise(cases: list[Case], results: list[dict[str, Any]]) -> None:
    """cuDNN's time over the kernel's, same layout: of all results, and of those that the compiler chooses."""
    by_name = {str(case): case for case in cases}
    results = [r for r in results if r["case"] in by_name]
    for name in CLASSES:
        for only_chosen in (False, True):
            ratios = [
                r[f"eager {layout}"] / r[f"fxfuse {layout}"]
                for r in results
                if r["class"] == name and "unsupported" not in r
                for layout in ("contiguous", "channels_last")
                if not only_chosen or refusal(by_name[r["case"]], name, layout) is None
            ]
            which = "chosen" if only_chosen else "all"
            spread = f", mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}" if ratios else ""
            print(f"{name} {which}: {len(ratios)}{spread}")


def compile_ahead(job: tuple[Case, str]) -> None:
    case, name = job
    for layout in ("contiguous", "channels_last"):
        try:
            made = convolution(case, name, layout)
        except Unsupported:
            continue
        for store in made.stores:
            compile_cubin(made.source(store))


if __name__ == "__main__":
    main()
