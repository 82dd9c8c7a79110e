"""Run a region by its schedule on a Hopper GPU: decide, compile and load once per shapes, then launch.

Whatever cannot be prepared runs through torch's operators; a failure to prepare is logged once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.choice import slower
from fxfuse.kernels.convolution import Unsupported, tile
from fxfuse.kernels.emit import Epilogue
from fxfuse.kernels.engine import Convolution
from fxfuse.kernels.expression import HEADER, Expression
from fxfuse.kernels.schedule import Launch, Schedule, Unscheduled, examples, schedule
from fxfuse.program import Program
from fxfuse.region import Region

log = logging.getLogger(__name__)

#: prepared regions that are kept; beyond it all are dropped
MOST_PREPARED = 1024


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A schedule with its compiled kernel, for inputs of certain shapes and strides on one device."""

    names: tuple[str, ...]
    schedule: Schedule
    convolution: Convolution
    device: torch.device

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the region. ``inputs`` have the shapes, strides and devices that it was prepared for."""
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        made, kernel = self.schedule, self.schedule.kernel
        values = dict(zip(self.names, inputs, strict=True))
        if made.first.body:
            results = made.first.run(_gather(made.first, values), reuse=True)
            values.update(zip(made.first.outputs, results, strict=True))
        sizes = [s or 0 for s in kernel.kind.shape]
        out = torch.empty_strided(sizes, kernel.strides, dtype=kernel.kind.dtype, device=self.device)
        self.convolution.run(
            _three_dims(values[kernel.x]),
            _three_dims(values[kernel.weight]),
            None if kernel.bias is None else values[kernel.bias].contiguous(),
            kernel.extents,
            _three_dims(out),
            before=_pack(kernel.before, values),
            after=_pack(kernel.after, values),
            factor=kernel.factor,
        )
        values[kernel.stored] = out
        return made.rest.run(_gather(made.rest, values), reuse=True)


def _gather(program: Program, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values[name] for name, _ in program.inputs]


def _three_dims(x: Tensor) -> Tensor:
    """(A, B, *spatial) with one to three spatial dims as (A, B, d, h, w)."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x


def _pack(expression: Expression | None, values: Mapping[str, Tensor]) -> bytes:
    """The fields of an expression's struct, 8 bytes each."""
    if expression is None or not expression.fields:
        return b""
    fields = []
    for field in expression.fields:
        tensor = values[field.value]
        if field.axis is None:
            fields.append(tensor.data_ptr())
        else:
            fields.append(0 if tensor.shape[field.axis] == 1 else tensor.stride(field.axis))
    return struct.pack(f"<{len(fields)}q", *fields)


def convolution_of(kernel: Launch, *, exact: bool = False) -> Convolution:
    """The engine's kernel for a launch: its source, not yet compiled. Raises Unsupported.

    ``exact``: float32 convolutions have float32's accuracy, not TF32's.
    """
    names = {"before": kernel.before, "after": kernel.after}
    code = "\n".join([f'#include "{HEADER}"', *(e.code for e in names.values() if e is not None)])
    given = {k: e.name for k, e in names.items() if e is not None}
    epilogue = Epilogue(combine=kernel.combine, code=code if given else "", **given)
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
    """What a kernel takes of a region on a Hopper GPU, or why there is none: a line for a report."""
    try:
        inputs = examples(region.rewritten)
        made = schedule(region.rewritten, inputs)
        convolution = convolution_of(made.kernel, exact=region.precision == "ieee")
        reason = slower(made.kernel, convolution.made, *_input_sizes(region, made, inputs))
    except (Unscheduled, Unsupported) as refusal:
        return f"torch's operators: {refusal}"
    return str(made) if reason is None else f"torch's operators: {reason}"


def _input_sizes(region: Region, made: Schedule, inputs: Sequence[Tensor]) -> tuple[int, tuple[int, int, int]]:
    """Samples and sizes of the convolution's input, where the region is given it; else what its output tells."""
    kernel, layer = made.kernel, made.kernel.layer
    shapes = {name: t.shape for (name, _), t in zip(region.rewritten.inputs, inputs, strict=True)}
    shape = shapes.get(kernel.x)
    if shape is None:  # it is computed in front of the kernel, and is as large as its outputs ask for
        batch = kernel.kind.shape[0] or 0
        d, h, w = (max(1, e // s) for e, s in zip(kernel.extents, layer.stride, strict=True))
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
    key = (region, _tf32(region), *((t.shape, t.stride(), t.device) for t in inputs))
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
    made = schedule(region.rewritten, inputs)
    convolution = convolution_of(made.kernel, exact=not _tf32(region))
    reason = slower(made.kernel, convolution.made, *_input_sizes(region, made, inputs))
    if reason is not None:
        raise Unscheduled(reason)
    log.debug("%s", made)
    return Prepared(tuple(n for n, _ in region.rewritten.inputs), made, convolution, device)


@cache
def _warn(message: str) -> None:
    log.warning("a kernel could not be prepared; torch's operators run instead (please report): %s", message)


@cache
def _usable(device: int) -> bool:
    """Whether a device is of the Hopper generation, and what compiles and launches is installed."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        return all(importlib.util.find_spec(f"cuda.bindings.{name}") is not None for name in ("driver", "nvrtc"))
    except ImportError:
        return False


def _tf32(region: Region) -> bool:
    """Whether float32 convolutions may round their factors to TF32."""
    if region.precision is not None:
        return region.precision == "tf32"
    cudnn = torch.backends.cudnn
    # allow_tf32 raises once this newer setting was used; this one follows both
    return bool(cudnn.enabled) and cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
