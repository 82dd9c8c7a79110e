"""Run a region by its schedule on a CUDA GPU: decide, compile and load once per shapes, then launch.

Whatever cannot be prepared runs through torch's operators; a failure to prepare is logged once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.choice import slower
from fxfuse.kernels.convolution import Unsupported, tile
from fxfuse.kernels.emit import Epilogue
from fxfuse.kernels.engine import Convolution
from fxfuse.kernels.expression import HEADER
from fxfuse.kernels.schedule import Launch, Schedule, Unscheduled, examples, schedule
from fxfuse.kernels.tail import Torch
from fxfuse.kernels.tail_engine import Run, moments_name, moments_of, pack, prepare, source_of
from fxfuse.program import Program
from fxfuse.region import Region
from fxfuse.tolerance import tf32_allowed

log = logging.getLogger(__name__)

#: prepared regions that are kept; beyond it all are dropped
MOST_PREPARED = 1024


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A schedule with its compiled kernels, for inputs of certain shapes and strides on one device."""

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    schedule: Schedule
    convolution: Convolution | None
    steps: tuple[tuple[Run, tuple[str, ...]], ...]  # with the values that nothing needs afterwards
    device: torch.device

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the region. ``inputs`` have the shapes, strides and devices that it was prepared for."""
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = dict(zip(self.names, inputs, strict=True))
        if self.convolution is not None:
            self._convolve(self.convolution, values)
        for step, dead in self.steps:
            step(values)
            for name in dead:
                values.pop(name, None)
        return [values[name] for name in self.outputs]

    def _convolve(self, convolution: Convolution, values: dict[str, Tensor]) -> None:
        first, kernel = self.schedule.first, self.schedule.kernel
        assert kernel is not None
        if first.body:
            results = first.run([values[name] for name, _ in first.inputs], reuse=True)
            values.update(zip(first.outputs, results, strict=True))
        sizes = [s or 0 for s in kernel.kind.shape]
        device = self.device if kernel.keeps else torch.device("meta")
        out = torch.empty_strided(sizes, kernel.strides, dtype=kernel.kind.dtype, device=device)
        moments = moments_of(kernel.kind, self.device) if kernel.gathers else None
        convolution.run(
            _three_dims(values[kernel.x]),
            _three_dims(values[kernel.weight]),
            None if kernel.bias is None else values[kernel.bias].contiguous(),
            kernel.extents,
            _three_dims(out),
            before=pack(kernel.before, values),
            after=pack(kernel.after, values),
            factor=kernel.factor,
            moments=moments,
        )
        if kernel.keeps:
            values[kernel.stored] = out
        if moments is not None:
            values[moments_name(kernel.stored)] = moments


def _three_dims(x: Tensor) -> Tensor:
    """(A, B, *spatial) with one to three spatial dims as (A, B, d, h, w)."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x


def convolution_of(kernel: Launch, *, exact: bool = False) -> Convolution:
    """The engine's kernel for a launch: its source, not yet compiled. Raises Unsupported.

    ``exact``: float32 convolutions have float32's accuracy, not TF32's.
    """
    names = {"before": kernel.before, "after": kernel.after}
    code = "\n".join([f'#include "{HEADER}"', *(e.code for e in names.values() if e is not None)])
    given = {k: e.name for k, e in names.items() if e is not None}
    epilogue = Epilogue(
        combine=kernel.combine, code=code if given else "", gathers=kernel.gathers, keeps=kernel.keeps, **given
    )
    dtypes = kernel.dtype, kernel.kind.dtype, kernel.bias_dtype
    made = Convolution.of(
        kernel.layer, *dtypes, epilogue, layout=kernel.layout, exact=exact and kernel.dtype is torch.float32
    )
    positions = [-(-e // s) for e, s in zip(kernel.extents, kernel.layer.stride, strict=True)]
    if kernel.combine:
        stored = kernel.kind.shape[2:]
        positions[3 - len(stored) :] = [s or 0 for s in stored]
    tile(made.made, (positions[0], positions[1], positions[2]))
    return made


def describe(region: Region) -> str:
    """What kernels take of a region on a Hopper GPU, or why there is none: a line for a report."""
    try:
        made, _, refusal = _decide_for_examples(region)
    except Unscheduled as refused:
        return f"torch's operators: {refused}"
    return str(made) if refusal is None else f"{made} ({refusal})"


def source(region: Region) -> str:
    """The CUDA C++ of the kernels that :func:`describe` names."""
    try:
        made, convolution, _ = _decide_for_examples(region)
    except Unscheduled:
        return ""
    kernels = [] if convolution is None else [convolution.source(staged=False)]
    return "\n\n".join([*kernels, *(s for step in made.steps if (s := source_of(step)))])


def _decide_for_examples(region: Region) -> tuple[Schedule, Convolution | None, str | None]:
    return decide(region.rewritten, examples(region.rewritten), exact=region.precision == "ieee", hopper=True)


def decide(
    program: Program, inputs: Sequence[Tensor], *, exact: bool, hopper: bool
) -> tuple[Schedule, Convolution | None, str | None]:
    """A schedule, the kernel of its convolution, and why there is none. Unscheduled where torch shall run it all.

    ``hopper``: the device has the matrix instructions that the convolution needs.
    """
    refusal = "the convolution's kernel needs a Hopper GPU"
    if hopper:
        try:
            made = schedule(program, inputs)
            assert made.kernel is not None
            convolution = convolution_of(made.kernel, exact=exact)
            reason = slower(made.kernel, convolution.made, *_input_sizes(program, made.kernel, inputs))
            if reason is None:
                return made, convolution, None
            refusal = reason
        except (Unscheduled, Unsupported) as refused:
            refusal = str(refused)
    made = schedule(program, inputs, anchored=False)
    if all(isinstance(s, Torch) for s in made.steps):
        raise Unscheduled(refusal)
    return made, None, refusal


def _input_sizes(program: Program, kernel: Launch, inputs: Sequence[Tensor]) -> tuple[int, tuple[int, int, int]]:
    """Samples and sizes of the convolution's input, where the program is given it; else what its output tells."""
    shapes = {name: t.shape for (name, _), t in zip(program.inputs, inputs, strict=True)}
    shape = shapes.get(kernel.x)
    if shape is None:  # it is computed in front of the kernel, and is as large as its outputs ask for
        batch = kernel.kind.shape[0] or 0
        d, h, w = (max(1, e // s) for e, s in zip(kernel.extents, kernel.layer.stride, strict=True))
        return batch, (d, h, w)
    d, h, w = (1, 1, 1, *shape[2:])[-3:]
    return shape[0], (d, h, w)


# --- deciding -------------------------------------------------------------------------------------
def run(region: Region, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """The outputs of ``region`` by way of a kernel; None where torch's operators shall run it instead."""
    device = inputs[0].device
    if device.type != "cuda" or not _usable(device.index) or os.environ.get("FXFUSE_KERNELS") == "0":
        return None
    if any(t.is_neg() for t in inputs):  # a kernel reads memory as it is
        return None
    key = (region, tf32_allowed(region.precision), *((t.shape, t.stride(), t.device) for t in inputs))
    found = _prepared.get(key, ...)
    if found is not ...:
        return None if found is None else found.run(inputs)
    if torch.cuda.is_current_stream_capturing():
        return None  # loading a kernel would break the capture
    if len(_prepared) >= MOST_PREPARED:
        _prepared.clear()
    _prepared[key], outputs = _first_run(region, inputs)
    return outputs


_prepared: dict[Any, Any] = {}  # Prepared, or None for torch's operators


def _first_run(region: Region, inputs: Sequence[Tensor]) -> tuple[Prepared | None, list[Tensor] | None]:
    """Prepare a region, which compiles and loads when it first runs; (None, None) where that does not succeed."""
    try:
        made = _prepare(region, inputs)
        return made, made.run(inputs)
    except (Unscheduled, Unsupported) as refusal:
        log.debug("torch's operators run `%s`: %s", region.anchor, refusal)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the chain still has torch's operators
        _warn(f"{type(error).__name__}: {error}")
    return None, None


def _prepare(region: Region, inputs: Sequence[Tensor]) -> Prepared:
    """Raises Unscheduled or Unsupported with the reason why torch's operators shall run."""
    device = inputs[0].device
    if any(t.device != device for t in inputs):
        raise Unscheduled("the inputs are on several devices")
    program = region.rewritten
    made, convolution, _ = decide(
        program, inputs, exact=not tf32_allowed(region.precision), hopper=_hopper(device.index)
    )
    log.debug("%s", made)
    last: dict[str, int] = {}
    for i, step in enumerate(made.steps):
        last.update(dict.fromkeys((*step.reads, *step.makes), i))
    with torch.cuda.device(device):
        steps = tuple(
            (prepare(step, device), tuple(n for n, at in last.items() if at == i and n not in program.outputs))
            for i, step in enumerate(made.steps)
        )
    return Prepared(tuple(n for n, _ in program.inputs), program.outputs, made, convolution, steps, device)


@cache
def _warn(message: str) -> None:
    log.warning("a kernel could not be prepared; torch's operators run instead (please report): %s", message)


@cache
def _usable(device: int) -> bool:
    """Whether kernels are compiled for a device (Ampere and later), and what compiles and launches is installed."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return all(importlib.util.find_spec(f"cuda.bindings.{name}") is not None for name in ("driver", "nvrtc"))
    except ImportError:
        return False


@cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
