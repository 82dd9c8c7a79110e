"""A schedule with its compiled kernels, ready to run for inputs of certain shapes and strides on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxfuse.kernels import correlation_engine
from fxfuse.kernels.collapsed import Sums
from fxfuse.kernels.contraction import Contraction
from fxfuse.kernels.convolution import Shared
from fxfuse.kernels.convolution_engine import Calls, three_dims
from fxfuse.kernels.convolution_kernels import Convolution
from fxfuse.kernels.correlation import Correlation
from fxfuse.kernels.launch import empty
from fxfuse.kernels.merge import pieces
from fxfuse.kernels.operands import Operands, Place, views
from fxfuse.kernels.steps import Bundle, Gather, Launch, Map, Schedule, Step, Torch
from fxfuse.kernels.tail_engine import Run, Values, form_of_moments, moments_name, prepare, statistics_places
from fxfuse.program import Program

# past torch.cuda's checks that CUDA is up: inputs lie on a GPU
current_device = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else torch.cuda.current_device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A schedule with its compiled kernels, for inputs of certain shapes and strides on one device."""

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    schedule: Schedule
    convolution: Convolution | None
    measuring: Convolution | Correlation | None  #: what the schedule runs first, for statistics
    steps: tuple[tuple[Run, tuple[str, ...]], ...]  # with the values that nothing needs afterwards
    device: torch.device
    asks_torch: bool  #: torch's operators are among what runs
    apart: bool  #: every output has memory of its own
    index: int | None  #: of the device

    @staticmethod
    def of(
        program: Program,
        made: Schedule,
        convolution: Convolution | None,
        device: torch.device,
        measuring: Convolution | Correlation | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> Prepared:
        """Compile and load the kernels of the schedule ``made`` of ``program``, but for the convolutions'.

        ``convolution``, ``measuring``: the kernels of the schedule's launches of those names. ``inputs``: what the
        region is prepared for; their shapes and strides are then not asked for in calls.
        """
        names, outputs = tuple(n for n, _ in program.inputs), program.outputs
        parts = _parts(made)
        places = {} if inputs is None else {n: Place.of(n, t) for n, t in zip(names, inputs, strict=True)}
        kept, places, tensors = _without_views(parts, places, outputs)
        last = _last_uses(kept, places)
        shares = Shared.NOTHING if made.kernel is None else made.kernel.shares
        steps = []
        follows = False  # whether a part comes behind one of our kernels
        with torch.cuda.device(device):
            for i, part in enumerate(kept):
                if isinstance(part, Launch):
                    ours = measuring if part is made.measuring else convolution
                    assert ours is not None
                    if isinstance(ours, Correlation):
                        run = _correlation(part, ours, follows)
                    else:
                        run = _convolution(part, ours, places, follows, first=part is made.measuring, shares=shares)
                else:
                    run = prepare(part, device, places, tensors, follows=follows)
                follows = not isinstance(part, Torch)
                dead = [n for n, at in last.items() if at == i and n not in {*names, *outputs}]
                steps.append((run, tuple(dead) if i + 1 < len(kept) else ()))  # in the end all of them go
        written = {p.stored for p in kept if isinstance(p, Launch) and p.keeps}
        written.update(n for p in kept if isinstance(p, (Map, Bundle, Sums, Contraction)) for n in p.makes)
        return Prepared(
            names=names,
            outputs=outputs,
            schedule=made,
            convolution=convolution,
            measuring=measuring,
            steps=tuple(steps),
            device=device,
            asks_torch=any(isinstance(p, Torch) for p in kept),
            apart=len(set(outputs)) == len(outputs) and {*outputs} <= written,
            index=device.index,
        )

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the region. ``inputs`` have the shapes, strides and devices that it was prepared for."""
        if current_device() != self.index:
            with torch.cuda.device(self.device):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        # loops: dict() and a comprehension take twice as long, and this is on the way of every call
        values: Values = {}
        for name, tensor in zip(self.names, inputs):  # noqa: B905 - of as many inputs as it was prepared for
            values[name] = tensor
        for step, dead in self.steps:
            step(values)
            for name in dead:
                values.pop(name, None)
        made = []
        for name in self.outputs:
            made.append(values[name])
        return made


# --- what runs, and what need not -----------------------------------------------------------------
Part = Step | Launch


def _parts(made: Schedule) -> list[Part]:
    """Everything of a schedule, in the order in which it runs."""
    measuring, kernel = ([one] if one is not None else [] for one in (made.measuring, made.kernel))
    return [*made.ahead, *measuring, *made.between, *kernel, *made.steps]


def _without_views(
    parts: Sequence[Part], places: Mapping[str, Place], outputs: Sequence[str]
) -> tuple[list[Part], dict[str, Place], set[str]]:
    """The parts but for views that kernels alone read, the places of values, and which are read as tensors."""
    known = dict(places)
    looks: dict[int, dict[str, Place]] = {}
    for i, part in enumerate(parts):
        if isinstance(part, Torch):
            looks[i] = views(part.program, known)
            known |= looks[i]
        elif isinstance(part, Gather):
            for instr in part.instrs:
                known |= statistics_places(instr, part.kind)
        elif isinstance(part, Bundle):
            forms = zip(part.makes, part.kinds, part.strides, strict=True)
            known |= {n: Place(n, 0, k.dtype, tuple(s or 0 for s in k.shape), tuple(at)) for n, k, at in forms}
    kept, tensors = [], {*outputs}
    for i, part in reversed([*enumerate(parts)]):
        if looks.get(i) and tensors.isdisjoint(looks[i]):
            continue
        kept.append(part)
        tensors |= _tensors(part)
        for name in looks.get(i, ()):
            del known[name]  # it is there as a tensor
    return kept[::-1], known, tensors


def _tensors(part: Part) -> set[str]:
    """What a part reads as tensors; the rest are operands of a kernel."""
    if isinstance(part, Launch):
        return {part.x, part.weight, *([part.bias] if part.bias is not None else [])}
    if isinstance(part, Contraction):
        return {part.value, part.weight}
    if isinstance(part, Bundle):
        return {*part.reads} if part.doubtful else set()
    return {*part.reads} if isinstance(part, Torch) else {part.value}


def _last_uses(parts: Sequence[Part], places: Mapping[str, Place]) -> dict[str, int]:
    """The last part that uses a tensor, be it as a view of it; the one that makes it, where none does."""
    last: dict[str, int] = {}
    for i, part in enumerate(parts):
        named = (*part.reads, *((part.stored,) if isinstance(part, Launch) else part.makes))
        last.update((places[n].base if n in places else n, i) for n in named)
    return last


def _convolution(
    kernel: Launch, convolution: Convolution, places: Mapping[str, Place], follows: bool, *, first: bool, shares: Shared
) -> Run:
    """The convolution with its epilogue, as a step among others.

    ``shares``: what the ``first`` run of two hands on to the second one, in a tensor of its own among the values.
    """
    calls = Calls(convolution, kernel.extents, kernel.factor, kernel.squeezed, shares, follows)
    kind = kernel.kind
    shape, strides = tuple(s or 0 for s in kind.shape), tuple(kernel.strides)
    before, after, behind = (Operands(e, places) for e in (kernel.before, kernel.after, kernel.behind))
    without = () if any((before.told, after.told, behind.told)) else (b"", b"", b"")
    not_kept = None if kernel.keeps else torch.empty_strided(shape, strides, dtype=kind.dtype, device="meta")
    moments_of_it = moments_name(kernel.stored)
    merged = pieces(shape[0], shape[1], convolution.slots(kernel.sizes)) if kernel.gathers else 0
    moments_form = form_of_moments(kind, merged) if kernel.gathers else None
    handed, takes = f"prepared {kernel.x}", shares is not Shared.NOTHING and not first
    name_x, name_w, name_b, stored, dtype = kernel.x, kernel.weight, kernel.bias, kernel.stored, kind.dtype
    queue = calls.run

    def run(values: Values) -> None:
        bias = None if name_b is None else values[name_b].contiguous()
        given = without or (before(values), after(values), behind(values))
        if not_kept is None:
            values[stored] = out = empty(shape, strides, dtype)
        else:
            out = not_kept
        moments = None
        if moments_form is not None:
            values[moments_of_it] = moments = empty(*moments_form)
        prepared = values.pop(handed, None) if takes else None
        prepared = queue(values[name_x], values[name_w], bias, out, given, moments, prepared)
        if first and prepared is not None:
            values[handed] = prepared

    return run


def _correlation(kernel: Launch, correlation: Correlation, follows: bool) -> Run:
    """What makes statistics without the convolution, as a step among others."""
    calls: dict[object, correlation_engine.Run] = {}
    moments_of_it, moments_form = moments_name(kernel.stored), form_of_moments(kernel.kind)

    def run(values: Values) -> None:
        x, weight = three_dims(values[kernel.x]), three_dims(values[kernel.weight])
        form = x.shape, x.stride()
        if form not in calls:
            calls[form] = correlation_engine.prepare(correlation, x, kernel.extents, follows=follows)
        values[moments_of_it] = moments = empty(*moments_form)
        calls[form](x, weight, None if kernel.bias is None else values[kernel.bias], moments)

    return run
