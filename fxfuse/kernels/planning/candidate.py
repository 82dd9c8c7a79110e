"""A way to run a region: its schedule, its kernels and their sources. Pure: nothing is compiled."""

from __future__ import annotations

import dataclasses

import torch

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.codegen.arithmetic import HEADER
from fxfuse.kernels.compilation.kept import Choice
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.entries import Prologue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.stages.sources import kind_of, source_of
from fxfuse.kernels.stages.steps import Launch, Schedule

ENGINE, TWICE, PRODUCTS, CUDNN, TORCH = "engine", "twice", "products", "cudnn", "torch"
#: what the estimate says of the ways that have statistics before the convolution's value
AHEAD = {TWICE: "with two", PRODUCTS: "with statistics from products of its input and one run"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a region: by its kernel of the convolution and kernels behind it ("engine"), by the same with a
    first run of the convolution for statistics ("twice") or with statistics from products of its input ("products"), by
    kernels behind torch's convolution ("cudnn"), or by torch's operators alone ("torch"), which has no schedule.

    ``measuring``: what makes statistics ahead. ``estimate``: what the estimate says of these ways, where there is a
    choice. ``refusal``: why the estimate prefers another way to the convolution's kernel. ``choice``: the
    measurement that chose it.
    """

    name: str
    schedule: Schedule | None = None
    convolution: Convolution | None = None
    refusal: str | None = None
    choice: Choice | None = None
    measuring: Convolution | Correlation | None = None
    estimate: str | None = None

    def __str__(self) -> str:
        plan = "torch's operators" if self.schedule is None else str(self.schedule)
        if self.choice is not None:
            return f"{plan} (measured: {self.choice})"
        if self.convolution is not None:
            return plan if self.estimate is None else f"{plan} ({self.estimate})"
        if self.refusal is None:
            return plan
        return f"{plan}: {self.refusal}" if self.schedule is None else f"{plan} ({self.refusal})"

    def sources(self) -> list[tuple[str, str]]:
        """A name and the CUDA C++ for each of its sources, in the order in which they run."""
        made = self.schedule
        if made is None:
            return []
        found = [(kind_of(step), text) for step in made.ahead if (text := source_of(step))]
        first = "measuring", made.measuring, self.measuring, made.between
        for name, kernel, convolution, steps in (first, ("convolution", made.kernel, self.convolution, made.steps)):
            if isinstance(convolution, Correlation):
                found.append(("correlation", convolution.source()))
            elif kernel is not None and convolution is not None:
                found.append((name, convolution.source(convolution.tiling(kernel.sizes)[1])))
            found += [(kind_of(step), text) for step in steps if (text := source_of(step))]
        return found


def convolution_of(kernel: Launch, *, exact: bool = False) -> Convolution:
    """The engine's kernel for a launch: its source, not yet compiled. Raises Unsupported.

    ``exact``: float32 convolutions have float32's accuracy, not TF32's.
    """
    names = {"before": kernel.before, "after": kernel.after, "behind": kernel.behind}
    body = next((r.body for r in (kernel.fold, kernel.along) if r is not None), None)
    parts = [e.code for e in (*names.values(), body) if e is not None]
    code = "\n".join([f'#include "{HEADER}"', *parts])
    given = {k: e.name for k, e in names.items() if e is not None}
    if kernel.squeezed and kernel.behind is not None:
        given["behind"] = f"fxfuse::WithoutChannels<{kernel.behind.name}, {len(kernel.kind.shape) - 1}>"
    epilogue = Epilogue(
        scales=kernel.scales,
        combine=kernel.combine,
        step=kernel.step,
        fold=kernel.fold,
        along=kernel.along,
        code=code if parts else "",
        gathers=kernel.gathers,
        keeps=kernel.keeps,
        monotone=kernel.monotone,
        steady=kernel.monotone and kernel.before is not None and not kernel.before.always,
        **given,
    )
    dtypes = kernel.dtype, kernel.kind.dtype, kernel.bias_dtype
    exact = exact and kernel.dtype is torch.float32
    made = Convolution.of(
        kernel.layer,
        *dtypes,
        epilogue,
        kernel.layout,
        exact,
        kernel.sizes,
        kernel.kind.shape[0] or 0,
        in_place=kernel.in_place,
        planes=kernel.planes,
        prologue=_prologue(kernel),
    )
    made.tiling(kernel.sizes)
    return made


def _prologue(kernel: Launch) -> Prologue | None:
    if kernel.front is None or kernel.given is None:
        return None
    code = "\n".join([f'#include "{HEADER}"', kernel.front.code])
    return Prologue(DTYPE_NAMES[kernel.given], kernel.front.name, code)
