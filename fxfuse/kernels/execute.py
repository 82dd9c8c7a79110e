"""Run a region by its schedule on a CUDA GPU: decide, compile and load once per shapes, then launch.

Whatever cannot be prepared runs through torch's operators; a failure to prepare is logged once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import timing
from fxfuse.instr import TensorType
from fxfuse.kernels import dump, measure
from fxfuse.kernels.compilation import kept
from fxfuse.kernels.compilation.kept import Choice
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.plan import by_torch, chain_of
from fxfuse.kernels.planning.candidate import AHEAD, CUDNN, ENGINE, PRODUCTS, TORCH, TWICE, Candidate, convolution_of
from fxfuse.kernels.planning.choice import slower
from fxfuse.kernels.planning.estimate import Types, works
from fxfuse.kernels.planning.observe import Unscheduled, examples
from fxfuse.kernels.planning.prologue import absorb
from fxfuse.kernels.planning.schedule import gathering, schedule
from fxfuse.kernels.planning.twice import from_products, sharing, twice
from fxfuse.kernels.runtime import recent, replays
from fxfuse.kernels.runtime.prepared import Prepared
from fxfuse.kernels.runtime.tail_engine import architecture
from fxfuse.kernels.stages.steps import Launch, Schedule, Torch
from fxfuse.program import Program
from fxfuse.region import Region
from fxfuse.tolerance import tf32_allowed

log = logging.getLogger(__name__)

#: prepared regions that are kept; beyond it all are dropped
MOST_PREPARED = 1024
#: a way that has statistics ahead runs where it takes less than this part of the time of one run of the convolution, by
#: estimate; and is not considered any further from this part on
WORTH_TWICE, HOPELESS = 0.97, 1.45
#: a way whose kernel gathers maxima or sums of exponentials as well runs where it takes less than this part of the time
#: of the same way with a kernel that goes through rows
WORTH_GATHERING = 1.0

Strides = Sequence[Sequence[int]] | None


def describe(region: Region, strides: Strides = None, device: torch.device | None = None) -> str:
    """What kernels take of a region, or why there is none: a line for a report.

    ``strides`` of its inputs; None stands for contiguous ones. ``device``: a GPU that kernels are compiled for;
    any other stands for a Hopper GPU, of which nothing was measured.
    """
    return str(planned(region, strides, device))


def source(region: Region, strides: Strides = None, device: torch.device | None = None) -> str:
    """The CUDA C++ of the kernels that :func:`describe` names."""
    return "\n\n".join(text for _, text in planned(region, strides, device).sources())


def dump_planned(region: Region) -> None:
    """Write what :func:`describe` tells to the folder of FXFUSE_DUMP."""
    strides = [torch.empty([s or 1 for s in k.shape], device="meta").stride() for _, k in region.rewritten.inputs]
    dump.write(region, strides, "a Hopper GPU, where the inputs are contiguous (not run)", lambda: planned(region))


def planned(region: Region, strides: Strides = None, device: torch.device | None = None) -> Candidate:
    """What a first call would run. Arguments as of :func:`describe`."""
    if not region.kernels:
        return Candidate(TORCH, refusal="kernels are left out, as asked for")
    try:
        inputs = examples(region.rewritten)
    except Unscheduled as refused:
        return Candidate(TORCH, refusal=str(refused))
    if strides is not None:
        with FakeTensorMode():
            inputs = [torch.empty_strided(t.shape, s, dtype=t.dtype) for t, s in zip(inputs, strides, strict=True)]
    if device is None or not _usable(device):
        return next(candidates(region.rewritten, inputs, exact=region.precision == "ieee", hopper=True))
    exact = not tf32_allowed(region.precision)
    found = candidates(region.rewritten, inputs, exact=exact, hopper=_hopper(device))
    choice = kept.load(kept.identity(region, inputs, exact=exact, device=_device_name(device)))
    return next(found) if choice is None else _chosen_first(found, choice)[0]


def candidates(program: Program, inputs: Sequence[Tensor], *, exact: bool, hopper: bool) -> Iterator[Candidate]:
    """The ways to run a program that there are, the one that the estimate chooses first.

    ``hopper``: the device has the matrix instructions that the convolution's kernel needs.
    """
    refusal: str | None = "the convolution's kernel needs a Hopper GPU"
    ours: list[Candidate] = []
    if hopper:
        try:
            ours = _by_engine(program, inputs, exact)
            refusal = ours[0].refusal
        except (Unscheduled, Unsupported) as refused:
            refusal = str(refused)
    if refusal is None:
        yield from ours
    try:
        made = schedule(program, inputs, anchored=False)
        if not all(isinstance(s, Torch) for s in made.steps):
            yield Candidate(CUDNN, made, refusal=refusal)
    except Unscheduled as refused:
        refusal = str(refused)
    yield Candidate(TORCH, refusal=refusal)
    yield from (c for c in ours if c.refusal is not None)


def _by_engine(program: Program, inputs: Sequence[Tensor], exact: bool) -> list[Candidate]:
    """With the convolution's own kernel, statistics gathered on its way or made ahead; the fastest one first.

    Maxima and softmaxes over all of space are made by kernels that go through rows, or gathered as well.
    """
    given = {n: TensorType(t.dtype, tuple(t.shape)) for (n, _), t in zip(program.inputs, inputs, strict=True)}
    ways = _ways(program, inputs, schedule(program, inputs, exact=exact), given, exact)
    with contextlib.suppress(Unscheduled, Unsupported):
        found = gathering(program, inputs, exact=exact)
        if found is not None:
            made, value = found
            for name, way in _ways(program, inputs, made, given, exact, gathered=value).items():
                if name not in ways or way[1] < WORTH_GATHERING * ways[name][1]:
                    ways[name] = way
    once, least = ways.pop(ENGINE)
    told = [f"{least * 1e3:.2f} ms with one run of the convolution"]
    order = {once: least * WORTH_TWICE}
    for other, seconds in ways.values():
        if seconds <= HOPELESS * least:
            order[dataclasses.replace(other, refusal=once.refusal)] = seconds
            told.append(f"{seconds * 1e3:.2f} ms {AHEAD[other.name]}")
    if len(order) == 1:
        return [once]
    estimate = f"by estimate {', '.join(told)}"
    return [dataclasses.replace(c, estimate=estimate) for c in sorted(order, key=order.__getitem__)]


def _ways(
    program: Program,
    inputs: Sequence[Tensor],
    once: Schedule,
    given: Types,
    exact: bool,
    gathered: str | None = None,
) -> dict[str, tuple[Candidate, float]]:
    """By name ``once``, and the ways that have statistics before they run the convolution whose values they store, each
    with the seconds that it is expected to take. ``gathered``: the value whose maxima are statistics, too.
    """
    made, (convolution,) = _with_front(once, exact)
    assert made.kernel is not None
    refusal = slower(made.kernel, convolution.made, *_input_sizes(program, made.kernel, inputs))
    found = [Candidate(ENGINE, made, convolution, refusal)]
    with contextlib.suppress(Unscheduled, Unsupported):
        again = twice(program, inputs, made, exact=exact, gathered=lambda value: value == gathered)
        if again is not None:
            both, (first, second) = _with_front(again, exact)
            found.append(Candidate(TWICE, sharing(both, first.made, second.made), second, refusal, measuring=first))
            correlated, products = from_products(again, given)  # of an x with nothing in front
            found.append(Candidate(PRODUCTS, correlated, second, refusal, measuring=products))
    return {c.name: (c, _seconds(given, c, exact)) for c in found}


def _with_front(made: Schedule, exact: bool) -> tuple[Schedule, list[Convolution]]:
    """The schedule with the chain in front in the kernels that read x, if they can have it; those of its launches.

    Raises Unsupported.
    """
    kernels = [convolution_of(k, exact=exact) for k in made.launches]
    absorbed = absorb(made, kernels)
    if absorbed is None:
        return made, kernels
    return absorbed, [convolution_of(k, exact=exact) for k in absorbed.launches]


def _seconds(given: Types, plan: Candidate, exact: bool) -> float:
    assert plan.schedule is not None
    parts = works(given, plan.schedule, plan.convolution, plan.measuring, exact=exact)
    return sum(work.seconds for _, work in parts)


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
def key_of(text: str, inputs: Sequence[Tensor]) -> Any:
    """What a region is prepared anew for: its text, torch's setting of precision, and the forms of its inputs."""
    return text, tf32_allowed(), *[(t.shape, t.stride(), t.dtype, t.device) for t in inputs]


def find(key: Any, inputs: Sequence[Tensor]) -> Prepared | None:
    """What was prepared for inputs of these forms, which it may run. None: ask :func:`run`."""
    found = _prepared.get(key)
    if found is None or os.environ.get("FXFUSE_KERNELS") == "0":
        return None
    for t in inputs:
        if t.is_neg():  # a kernel reads memory as it is
            return None
    return found


def run(region: Region, inputs: Sequence[Tensor], key: Any = None) -> list[Tensor] | None:
    """The outputs of ``region`` by way of a kernel; None where torch's operators shall run it instead."""
    device = inputs[0].device
    if not (region.kernels and _usable(device)) or os.environ.get("FXFUSE_KERNELS") == "0":
        return None
    if any(t.is_neg() for t in inputs):
        return None
    key = key or key_of(region.text, inputs)
    if key in _prepared:
        found = _prepared[key]
        return None if found is None else found.run(inputs)
    if torch.cuda.is_current_stream_capturing():
        return None  # loading a kernel would break the capture
    if len(_prepared) >= MOST_PREPARED:
        forget()
    _prepared[key], outputs = _first_run(region, inputs)
    return outputs


def torch_for_good(region: Region, inputs: Sequence[Tensor], key: Any) -> bool:
    """Whether torch's operators run calls of this key until something is forgotten: no kernel is, or can be, found."""
    return not (region.kernels and _usable(inputs[0].device)) or _prepared.get(key, key) is None


_prepared: dict[Any, Prepared | None] = {}  # None for torch's operators


def forget() -> None:
    """Drop what is prepared: calls prepare it anew."""
    _prepared.clear()
    recent.forget()
    replays.forget()


def _first_run(region: Region, inputs: Sequence[Tensor]) -> tuple[Prepared | None, list[Tensor] | None]:
    """Prepare a region, which compiles and loads when it first runs; (None, None) where that does not succeed."""
    if any(t.device != inputs[0].device for t in inputs):
        log.debug("torch's operators run `%s`: the inputs are on several devices", region.anchor)
        return None, None
    try:
        for candidate in _in_order(region, inputs):  # the first that can be prepared
            try:
                made, outputs = _try(candidate, region, inputs)
            except Unsupported as refusal:
                log.debug("%s: %s", candidate, refusal)
                continue
            log.debug("`%s`: %s", region.anchor, candidate)
            if dump.wanted():
                _dump(candidate, region, inputs)
            return made, outputs
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the chain still has torch's operators
        _warn(f"{type(error).__name__}: {error}")
    return None, None


def _candidates(region: Region, inputs: Sequence[Tensor]) -> Iterator[Candidate]:
    device = inputs[0].device
    return candidates(region.rewritten, inputs, exact=not tf32_allowed(region.precision), hopper=_hopper(device))


def _in_order(region: Region, inputs: Sequence[Tensor]) -> Iterable[Candidate]:
    """The candidates, the one to run first: what was measured and kept, or else what the estimate chooses."""
    device = inputs[0].device
    of = kept.identity(region, inputs, exact=not tf32_allowed(region.precision), device=_device_name(device))
    session = measure.session.get()
    choice = None if session is not None else kept.load(of)
    if choice is None and (session is not None or region.tune):
        measured = _measure(region, inputs, timing.queued_in_turns if session is None else session.timer)
        if measured is not None:
            choice = measured.choice
            kept.save(of, choice)
            if session is not None:
                session.measured.append(measured)
    found = _candidates(region, inputs)
    return found if choice is None else _chosen_first(found, choice)


def _chosen_first(found: Iterable[Candidate], choice: Choice) -> list[Candidate]:
    marked = [dataclasses.replace(c, choice=choice) if c.name == choice.chosen else c for c in found]
    return sorted(marked, key=lambda c: c.choice is None)


def _measure(region: Region, inputs: Sequence[Tensor], timer: measure.Timer) -> measure.Measured | None:
    """Measure every candidate with these inputs; None where that fails."""
    device = inputs[0].device
    found = {c.name: c for c in _candidates(region, inputs)}

    def start(name: str) -> Callable[[], object]:
        made, _ = _try(found[name], region, inputs)
        if made is None:
            program = chain_of(region, by_torch(region, device.type))
            return lambda: program.run(inputs, reuse=True)
        return lambda: made.run(inputs)

    try:
        with torch.cuda.device(device):
            ways, chosen = measure.fastest({n: str(c) for n, c in found.items()}, start, timer)
    except Exception as error:  # noqa: BLE001 - the estimate still chooses
        log.warning("`%s` cannot be measured, and the estimate chooses: %s", region.anchor, error)
        return None
    first, (_, kind) = inputs[0], region.rewritten.inputs[0]
    told = str(kind) if first.is_contiguous() else f"{kind} with strides {tuple(first.stride())}"
    return measure.Measured(region, told, _device_name(device), ways, chosen, next(iter(found)))


def _try(candidate: Candidate, region: Region, inputs: Sequence[Tensor]) -> tuple[Prepared | None, list[Tensor] | None]:
    """Prepare a candidate and run it once, which compiles; (None, None) for torch's operators. Raises Unsupported."""
    if candidate.schedule is None:
        return None, None
    kernels, device = (candidate.convolution, candidate.measuring), inputs[0].device
    made = Prepared.of(region.rewritten, candidate.schedule, kernels[0], device, kernels[1], inputs)
    return made, made.run(inputs)


@contextlib.contextmanager
def measuring(timer: measure.Timer = timing.queued_in_turns) -> Iterator[measure.Session]:
    """What runs inside the block, in this thread and without gradients, is measured; calls afterwards run the fastest.

    ``timer``: median seconds of a call of every way that it is given.
    """
    forget()  # what is prepared anew is measured
    with measure.collecting(timer) as session:
        yield session


def _dump(candidate: Candidate, region: Region, inputs: Sequence[Tensor]) -> None:
    device = inputs[0].device
    where = f"{_device_name(device)}, {'tf32' if tf32_allowed(region.precision) else 'ieee'} convolutions of float32"
    dump.write(region, [t.stride() for t in inputs], where, lambda: candidate, architecture(device))


@cache
def _warn(message: str) -> None:
    log.warning("a kernel could not be prepared; torch's operators run instead (please report): %s", message)


@cache
def _usable(device: torch.device) -> bool:
    """Whether kernels are compiled for a device (Ampere and later), and what compiles and launches is installed."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return all(importlib.util.find_spec(f"cuda.bindings.{name}") is not None for name in ("driver", "nvrtc"))
    except ImportError:
        return False


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
