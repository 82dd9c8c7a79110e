"""A schedule with its compiled kernels, ready to run for inputs of certain shapes and strides on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.codegen.operands import Operands, Place, views
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.lies import three_dims
from fxfuse.kernels.convolution.specialisation import Shared
from fxfuse.kernels.convolution.workspace import ALIGNMENT
from fxfuse.kernels.runtime import correlation_engine, memory
from fxfuse.kernels.runtime.convolution_engine import NO_OPERANDS, Calls
from fxfuse.kernels.runtime.replays import Output, Replays, wanted
from fxfuse.kernels.runtime.tail_engine import Run, Values, prepare
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.merge import pieces
from fxfuse.kernels.stages.merged import Merged, front_of, merged_name, statistics_places
from fxfuse.kernels.stages.steps import Bundle, Gather, Launch, Map, Schedule, Step, Torch
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
    replays: Replays | None  #: of calls whose tensors lie where those of one before lay

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
        fronts = {p.value: front_of(p, tensors) for p in kept if isinstance(p, Gather) and not p.layout}
        merged: dict[str, Merged] = {}
        with torch.cuda.device(device):
            for i, part in enumerate(kept):
                if isinstance(part, Launch):
                    ours = measuring if part is made.measuring else convolution
                    assert ours is not None
                    given = merged[part.stored] = _merged(part, ours, fronts.get(part.stored, 0))
                    if isinstance(ours, Correlation):
                        run = _correlation(part, ours, follows, given)
                    else:
                        first = part is made.measuring
                        run = _convolution(part, ours, places, follows, given, first=first, shares=shares)
                else:
                    of = merged.get(part.value) if isinstance(part, Gather) else None
                    run = prepare(part, device, places, tensors, follows=follows, merged=of)
                follows = not isinstance(part, Torch)
                dead = [n for n, at in last.items() if at == i and n not in {*names, *outputs}]
                steps.append((run, tuple(dead) if i + 1 < len(kept) else ()))  # in the end all of them go
        written = {o.name: o for p in kept for o in _written(p)}
        asks_torch = any(isinstance(p, Torch) for p in kept)
        apart = len(set(outputs)) == len(outputs) and {*outputs} <= {*written}
        graphs = None
        if inputs is not None and apart and not asks_torch and wanted(device):
            makes = [written[n] for n in outputs]
            if not any(0 in shape for shape in (*(o.shape for o in makes), *(t.shape for t in inputs))):
                graphs = Replays(device.index, len(names), makes)
        return Prepared(
            names=names,
            outputs=outputs,
            schedule=made,
            convolution=convolution,
            measuring=measuring,
            steps=tuple(steps),
            device=device,
            asks_torch=asks_torch,
            apart=apart,
            index=device.index,
            replays=graphs,
        )

    def run(self, inputs: Sequence[Tensor], given: Values | None = None) -> list[Tensor]:
        """The outputs of the region. ``inputs`` have the shapes, strides and devices that it was prepared for.

        ``given``: the outputs, to be filled by one kernel after the other; else a graph may do that.
        """
        if current_device() != self.index:
            with torch.cuda.device(self.device):
                return self.run(inputs, given)
        if given is None:
            replays = self.replays
            if replays is not None and replays.run is not None:
                return replays.run(self.run, inputs, replays)
            given = {}
        # loops: dict() and a comprehension take twice as long, and this is on the way of every call
        values = given
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


def _written(part: Part) -> list[Output]:
    """What our kernels write of a part, in memory that is for that alone."""
    if isinstance(part, Launch):
        forms = [(part.stored, part.kind, part.strides)] if part.keeps else []
    elif isinstance(part, Bundle):
        forms = [*zip(part.makes, part.kinds, part.strides, strict=True)]
    elif isinstance(part, Sums):
        forms = [(part.stored, part.kind, dense(part.kind.shape, part.made_layout))]
    elif isinstance(part, (Map, Contraction)):
        forms = [(part.stored, part.kind, part.strides)]
    else:
        forms = []
    return [Output(name, tuple(s or 0 for s in kind.shape), tuple(to), kind.dtype) for name, kind, to in forms]


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
    return kept[::-1], _in_rooms(kept, known, tensors), tensors


def _in_rooms(parts: Sequence[Part], places: Mapping[str, Place], tensors: Set[str]) -> dict[str, Place]:
    """The places, with what a bundle makes for kernels alone in one tensor, which costs a call less than several."""
    moved: dict[str, tuple[str, int]] = {}
    for part in parts:
        inner = [n for n in part.makes if n not in tensors] if isinstance(part, Bundle) else []
        at = 0
        for name in inner if len(inner) > 1 else ():
            moved[name] = f"room of {inner[0]}", at
            at += -(-places[name].end // ALIGNMENT) * ALIGNMENT
    found = dict(places)
    for name, place in places.items():
        room, at = moved.get(place.base, (place.base, 0))
        found[name] = dataclasses.replace(place, base=room, offset=place.offset + at)
    return found


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


def _merged(kernel: Launch, made: Convolution | Correlation, front: int) -> Merged:
    """Where the merged parts of the value lie that a launch makes, if it gathers."""
    n, c = ((s or 0) for s in kernel.kind.shape[:2])
    count = pieces(n, c, made.slots(kernel.sizes)) if kernel.gathers and isinstance(made, Convolution) else 1
    return Merged.of(kernel.kind, kernel.gathers, count, front)


def _convolution(
    kernel: Launch,
    convolution: Convolution,
    places: Mapping[str, Place],
    follows: bool,
    merged: Merged,
    *,
    first: bool,
    shares: Shared,
) -> Run:
    """The convolution with its epilogue, as a step among others.

    ``shares``: what the ``first`` run of two hands on to the second one, in a tensor of its own among the values.
    """
    calls = Calls(convolution, kernel.extents, kernel.factor, kernel.squeezed, shares, follows)
    kind = kernel.kind
    shape, strides = tuple(s or 0 for s in kind.shape), tuple(kernel.strides)
    before, after, behind, front = (Operands(e, places).pack for e in kernel.expressions)
    reads = any((before, after, behind, front))
    not_kept = None if kernel.keeps else torch.empty_strided(shape, strides, dtype=kind.dtype, device="meta")
    parts = merged_name(kernel.stored)
    gathers, room, begin = bool(kernel.gathers), merged.room, merged.front
    handed, takes = f"prepared {kernel.x}", shares is not Shared.NOTHING and not first
    name_x, name_w, name_b, stored, dtype = kernel.x, kernel.weight, kernel.bias, kernel.stored, kind.dtype
    queue = calls.run
    scattered_w, scattered_b = (n is not None and not _known_dense(n, places) for n in (name_w, name_b))

    def run(values: Values) -> None:
        weight, bias = values[name_w], None if name_b is None else values[name_b]
        if scattered_w:
            weight = weight.contiguous()
        if scattered_b and bias is not None:
            bias = bias.contiguous()
        operands = NO_OPERANDS
        if reads:
            operands = (
                b"" if before is None else before(values),
                b"" if after is None else after(values),
                b"" if behind is None else behind(values),
                b"" if front is None else front(values),
            )
        if not_kept is None:
            out = values.get(stored)
            if out is None:
                values[stored] = out = memory.empty(shape, strides, dtype)
        else:
            out = not_kept
        at = 0
        if gathers:
            values[parts] = made = memory.empty(room, (1,), torch.float64)
            at = made.data_ptr() + begin
        prepared = values.pop(handed, None) if takes else None
        prepared = queue(values[name_x], weight, bias, out, operands, at, prepared)
        if first and prepared is not None:
            values[handed] = prepared

    return run


def _known_dense(name: str, places: Mapping[str, Place]) -> bool:
    """Whether a value is contiguous, as is known before a call."""
    place = places.get(name)
    return place is not None and torch.empty_strided(place.shape, place.strides, device="meta").is_contiguous()


def _correlation(kernel: Launch, correlation: Correlation, follows: bool, merged: Merged) -> Run:
    """What makes statistics without the convolution, as a step among others."""
    calls: dict[object, correlation_engine.Run] = {}
    parts, room, front = merged_name(kernel.stored), merged.room, merged.front
    name_x, name_w, name_b = kernel.x, kernel.weight, kernel.bias

    def run(values: Values) -> None:
        x, weight = values[name_x], values[name_w]
        if x.dim() < 5:
            x, weight = three_dims(x), three_dims(weight)
        form = x.stride()
        queue = calls.get(form)
        if queue is None:
            queue = calls[form] = correlation_engine.prepare(correlation, x, kernel.extents, follows=follows)
        values[parts] = made = memory.empty(room, (1,), torch.float64)
        queue(x, weight, None if name_b is None else values[name_b], made.data_ptr() + front)

    return run
