"""A schedule with its compiled kernels, ready to run for inputs of certain shapes and strides on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fxfuse.kernels.engine import Calls, Convolution
from fxfuse.kernels.launch import empty
from fxfuse.kernels.schedule import Launch, Schedule
from fxfuse.kernels.tail import Bundle, Map, Torch
from fxfuse.kernels.tail_engine import Run, moments_name, moments_of, pack, prepare
from fxfuse.program import Program

#: sizes and strides
Form = tuple[tuple[int, ...], tuple[int, ...]]

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
    measuring: Convolution | None  #: the one that the schedule runs first, for statistics
    between: tuple[Run, ...]  #: the steps between the two
    steps: tuple[tuple[Run, tuple[str, ...]], ...]  # with the values that nothing needs afterwards
    device: torch.device
    asks_torch: bool  #: torch's operators are among what runs
    apart: bool  #: every output has memory of its own
    form: Form  #: of what the convolution stores
    calls: Calls = dataclasses.field(default_factory=dict, repr=False)
    measuring_calls: Calls = dataclasses.field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        program: Program,
        made: Schedule,
        convolution: Convolution | None,
        device: torch.device,
        measuring: Convolution | None = None,
    ) -> Prepared:
        """Compile and load the kernels of the schedule ``made`` of ``program``, but for the convolutions'.

        ``convolution``, ``measuring``: the kernels of the schedule's launches of those names.
        """
        last: dict[str, int] = {}
        for i, step in enumerate(made.steps):
            last.update(dict.fromkeys((*step.reads, *step.makes), i))
        with torch.cuda.device(device):
            ahead, between = (tuple(prepare(step, device) for step in cut) for cut in (made.ahead, made.between))
            steps = tuple(
                (prepare(step, device), tuple(n for n, at in last.items() if at == i and n not in program.outputs))
                for i, step in enumerate(made.steps)
            )
        every = (*made.ahead, *made.between, *made.steps)
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
            measuring=measuring,
            between=between,
            steps=steps,
            device=device,
            form=_form(kernel),
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
            kernel, measuring = self.schedule.kernel, self.schedule.measuring
            assert kernel is not None
            for ahead in self.ahead:
                ahead(values)
            if self.measuring is not None and measuring is not None:
                _convolve(self.measuring, measuring, _form(measuring), self.measuring_calls, values)
                for between in self.between:
                    between(values)
            _convolve(self.convolution, kernel, self.form, self.calls, values)
        for step, dead in self.steps:
            step(values)
            for name in dead:
                values.pop(name, None)
        return [values[name] for name in self.outputs]


def _convolve(convolution: Convolution, kernel: Launch, form: Form, calls: Calls, values: dict[str, Tensor]) -> None:
    kind = kernel.kind
    if kernel.keeps:
        out = empty(*form, kind.dtype)
    else:
        out = torch.empty_strided(*form, dtype=kind.dtype, device="meta")
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
        calls=calls,
    )
    if kernel.keeps:
        values[kernel.stored] = out
    if moments is not None:
        values[moments_name(kernel.stored)] = moments


def _form(kernel: Launch | None) -> Form:
    """Sizes and strides of what a convolution stores."""
    return ((), ()) if kernel is None else (tuple(s or 0 for s in kernel.kind.shape), tuple(kernel.strides))


def _three_dims(x: Tensor) -> Tensor:
    """(A, B, *spatial) with one to three spatial dims as (A, B, d, h, w)."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x
