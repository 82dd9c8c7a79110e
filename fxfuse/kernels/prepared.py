"""A schedule with its compiled kernels, ready to run for inputs of certain shapes and strides on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fxfuse.kernels.engine import Calls, Convolution
from fxfuse.kernels.launch import empty
from fxfuse.kernels.schedule import Schedule
from fxfuse.kernels.tail import Bundle, Map, Torch
from fxfuse.kernels.tail_engine import Run, moments_name, moments_of, pack, prepare
from fxfuse.program import Program

# past torch.cuda's checks that CUDA is up: inputs lie on a GPU
_current_device = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else torch.cuda.current_device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A schedule with its compiled kernels, for inputs of certain shapes and strides on one device."""

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    schedule: Schedule
    convolution: Convolution | None
    ahead: tuple[Run, ...]  # in front of the convolution
    steps: tuple[tuple[Run, tuple[str, ...]], ...]  # with the values that nothing needs afterwards
    device: torch.device
    asks_torch: bool  #: torch's operators are among what runs
    apart: bool  #: every output has memory of its own
    form: tuple[tuple[int, ...], tuple[int, ...]]  #: sizes and strides of what the convolution stores
    calls: Calls = dataclasses.field(default_factory=dict, repr=False)

    @staticmethod
    def of(program: Program, made: Schedule, convolution: Convolution | None, device: torch.device) -> Prepared:
        """Compile and load the kernels of the schedule ``made`` of ``program``, but for the convolution's."""
        last: dict[str, int] = {}
        for i, step in enumerate(made.steps):
            last.update(dict.fromkeys((*step.reads, *step.makes), i))
        with torch.cuda.device(device):
            ahead = tuple(prepare(step, device) for step in made.ahead)
            steps = tuple(
                (prepare(step, device), tuple(n for n, at in last.items() if at == i and n not in program.outputs))
                for i, step in enumerate(made.steps)
            )
        every = (*made.ahead, *made.steps)
        written = [n for s in every if isinstance(s, (Map, Bundle)) for n in s.makes]
        kernel = made.kernel
        if kernel is not None and kernel.keeps:
            written.append(kernel.stored)
        return Prepared(
            names=tuple(n for n, _ in program.inputs),
            outputs=program.outputs,
            schedule=made,
            convolution=convolution,
            ahead=ahead,
            steps=steps,
            device=device,
            form=((), ()) if kernel is None else (tuple(s or 0 for s in kernel.kind.shape), tuple(kernel.strides)),
            asks_torch=any(isinstance(s, Torch) for s in every),
            apart=len(set(program.outputs)) == len(program.outputs) and {*program.outputs} <= {*written},
        )

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the region. ``inputs`` have the shapes, strides and devices that it was prepared for."""
        if _current_device() != self.device.index:
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
        kernel = self.schedule.kernel
        assert kernel is not None
        for step in self.ahead:
            step(values)
        kind = kernel.kind
        if kernel.keeps:
            out = empty(*self.form, kind.dtype)
        else:
            out = torch.empty_strided(*self.form, dtype=kind.dtype, device="meta")
        moments = moments_of(kind) if kernel.gathers else None
        convolution.run(
            _three_dims(values[kernel.x]),
            _three_dims(values[kernel.weight]),
            None if kernel.bias is None else values[kernel.bias].contiguous(),
            kernel.extents,
            _three_dims(out.unsqueeze(1) if kernel.squeezed else out),
            before=pack(kernel.before, values),
            after=pack(kernel.after, values),
            behind=pack(kernel.behind, values),
            factor=kernel.factor,
            moments=moments,
            calls=self.calls,
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
