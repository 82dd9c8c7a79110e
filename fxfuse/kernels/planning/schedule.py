"""A rewritten chain cut in three: what runs first, one convolution kernel, the steps behind it.

What the kernel takes is the affair of :mod:`~fxfuse.kernels.planning.cutter`. Where statistics follow, it gathers
them of what it stores. Of several versions of a chain, and of the layouts of what is stored, the best is chosen. Pure:
sizes and strides in, a printable :class:`~fxfuse.kernels.stages.steps.Schedule` out, or
:class:`~fxfuse.kernels.planning.observe.Unscheduled` with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.chains import SMALL, STORED, dense, elements, layout_of, layouts_of, needed_by
from fxfuse.kernels.codegen.persistent import names_of, taken_together
from fxfuse.kernels.codegen.reductions import holds_rows
from fxfuse.kernels.planning.cutter import Cutter
from fxfuse.kernels.planning.observe import Unscheduled, observe
from fxfuse.kernels.planning.prologue import steps_in_front
from fxfuse.kernels.planning.uncrop import uncropped
from fxfuse.kernels.planning.unfold import unfold
from fxfuse.kernels.stages.bundle import Bundler, reads_of
from fxfuse.kernels.stages.moments import OVER_SPACE
from fxfuse.kernels.stages.norms import nothing, split_norms
from fxfuse.kernels.stages.steps import Gather, Launch, Schedule, Step, Torch
from fxfuse.kernels.stages.tail import LEAST_BEHIND_OURS, LEAST_ELEMENTS, plan
from fxfuse.program import Program
from fxfuse.vocabulary import Kind


def schedule(program: Program, inputs: Sequence[Tensor], *, anchored: bool = True, exact: bool = False) -> Schedule:
    """Cut ``program`` for inputs of these sizes, dtypes, strides and devices: no element of them is read.

    ``anchored``: a kernel makes the convolution; else torch does, and only the steps behind it are cut.
    ``exact``: float32 convolutions have float32's accuracy, not TF32's, which takes more registers.
    """
    observed = observe(program, inputs)
    least = least_elements(anchored)
    found = versions(program, observed, inputs, least, anchored=anchored)
    if not anchored:
        plans = [(p, v, plan(p, v, least=least)) for p, v in found if _same_forms(program, observed, v)]
        largest = max(v.numel() for v in observed.values())
        whole, values, steps = min(plans, key=lambda p: _by_torch(p[2], largest))
        return _bundled(Schedule(Program((), (), ()), None, whole, steps), values)
    return best(program, observed, [(cut(version, values, exact=exact), values) for version, values in found])


def gathering(program: Program, inputs: Sequence[Tensor], *, exact: bool = False) -> tuple[Schedule, str] | None:
    """The schedule whose kernel gathers maxima, minima or sums of exponentials of the value that it makes, and that.

    None where it has none to gather: there :func:`schedule` has all. Arguments as of that.
    """
    if OVER_SPACE.isdisjoint(i.op for i in program.body):
        return None
    observed, least = observe(program, inputs), least_elements(anchored=True)

    def cut_for(gathered: Callable[[str], bool]) -> tuple[Schedule, Mapping[str, Form]]:
        version, values = versions(program, observed, inputs, least, gathered=gathered)[0]
        return cut(version, values, exact=exact), values

    kernel = cut_for(lambda _: True)[0].kernel
    assert kernel is not None
    made = best(program, observed, [cut_for(lambda value: value == kernel.stored)])
    assert made.kernel is not None
    return (made, kernel.stored) if {*made.kernel.gathers} - {"statistics"} else None


def cut(program: Program, values: Mapping[str, Form], *, exact: bool) -> Schedule:
    """``program`` in three, its ``rest`` not yet cut into steps. ``values``: as of :func:`observe`."""
    return Cutter(program, values, exact=exact).schedule()


def best(
    program: Program, observed: Mapping[str, Form], cuts: Sequence[tuple[Schedule, Mapping[str, Form]]]
) -> Schedule:
    """Of the ``cuts`` of ``program``, each with all values that it names, the best one, with its steps.

    ``observed``: the values of ``program``, whose outputs tell which forms results have.
    """
    found = []
    for one, values in cuts:
        for made in _layouts(one, program.outputs, observed):
            assert made.kernel is not None
            there = {**values, made.kernel.stored: _stored(made.kernel, values[made.kernel.x].device)}
            there |= observe(made.rest, [there[name] for name, _ in made.rest.inputs])
            if _same_forms(program, observed, there):
                found.append(_bundled(_with_steps(made, there), there))
    if not found:
        raise Unscheduled("a result would come out in another layout than from torch's operators")
    return min(found, key=_passes_by_torch)  # the first of equals


def least_elements(anchored: bool) -> int:
    """Of a tensor that kernels read behind a convolution: of ours, if ``anchored``, or of torch."""
    return LEAST_BEHIND_OURS if anchored else LEAST_ELEMENTS


def versions(
    program: Program,
    observed: dict[str, Form],
    inputs: Sequence[Tensor],
    least: int,
    *,
    anchored: bool = True,
    gathered: Callable[[str], bool] = nothing,
) -> list[tuple[Program, dict[str, Form]]]:
    """What means the same as ``program``, the best for kernels first, each with its values.

    ``least``: elements of a value that kernels take. ``anchored``: so does the convolution. ``gathered``: as of
    :func:`~fxfuse.kernels.stages.norms.split_norms`.
    """
    plain = program if anchored else uncropped(program, observed, inputs)
    made = [observed[i.outs[0]] for i in program.body if i.op == "conv_transpose"]
    pools = any(vocabulary.lookup(i.op).kind is Kind.POOL for i in program.body)
    if not pools and any(y.numel() >= LEAST_ELEMENTS for y in made):
        plain = unfold(plain, numbers=not anchored)  # a pool of plain outputs is cheaper than one of scaled ones
    found = {plain: observe(plain, inputs)}
    split = _split(plain, found[plain], least, gathered)
    of_split = observe(split, inputs)
    together = _taken_together(split, of_split, least)
    best_first = {together: observe(together, inputs), split: of_split}
    return [*(best_first | found | {program: observed}).items()]


def _passes_by_torch(made: Schedule) -> int:
    """Instructions on large values that torch's operators run."""
    assert made.kernel is not None
    return _by_torch(made.steps, elements(made.kernel.kind))


def _by_torch(steps: Sequence[Step], whole: int) -> int:
    """The same of ``steps``, where a value of ``whole`` elements is a large one."""
    programs = [s.program for s in steps if isinstance(s, Torch)]
    large = [p for p in programs if any(elements(k) * SMALL > whole for _, k in p.inputs)]
    return sum(len(names_of([i])) for p in large for i in p.body if vocabulary.lookup(i.op).kind is not Kind.SHAPE)


def _layouts(made: Schedule, outputs: Sequence[str], observed: Mapping[str, Form]) -> Iterator[Schedule]:
    """The schedule with the stored value laid out as it is and in the other way; an output, as torch has it."""
    kernel = made.kernel
    assert kernel is not None
    ways = [
        kernel.strides,
        dense(kernel.kind.shape, "contiguous" if kernel.layout == "channels_last" else "channels_last"),
    ]
    if kernel.squeezed:
        ways = ways[:1]
    elif kernel.stored in outputs:
        ways = [s for s in [observed[kernel.stored].stride()] if layout_of(kernel.kind.shape, s) is not None]
    if kernel.along is not None:  # rows of w are stored as such
        ways = [s for s in ways if layout_of(kernel.kind.shape, s) == "contiguous"]
    for strides in ways:
        yield dataclasses.replace(made, kernel=dataclasses.replace(kernel, strides=strides))


def _with_steps(made: Schedule, values: Mapping[str, Form]) -> Schedule:
    """The schedule with what runs behind its kernel."""
    kernel = made.kernel
    assert kernel is not None
    steps = plan(made.rest, values, None if kernel.reduces else kernel.stored, least=least_elements(anchored=True))
    gathers = next((s.gathers for s in steps if isinstance(s, Gather) and not s.layout), ())
    keeps = kernel.stored in made.rest.outputs or any(
        kernel.stored in s.reads for s in steps if not isinstance(s, Gather) or s.layout
    )
    return dataclasses.replace(made, kernel=dataclasses.replace(kernel, gathers=gathers, keeps=keeps), steps=steps)


def _bundled(made: Schedule, values: Mapping[str, Form]) -> Schedule:
    """The schedule with what torch had to run on small tensors as kernels, too."""
    kernel, measuring, outputs = made.kernel, made.measuring, made.rest.outputs
    first = steps_in_front(made, values)
    kernels = not all(isinstance(s, Torch) for s in (*made.steps, kernel))
    stored = [k.stored for k in (kernel, measuring) if k is not None]
    bundler = Bundler(values, (*first, *made.between, *made.steps), kernels=kernels, stored=stored)
    kernel, measuring = (None if k is None else _direct(k, bundler) for k in (kernel, measuring))
    first, between, rest = ([bundler.see_through(s) for s in steps] for steps in (first, made.between, made.steps))
    behind = bundler.needed(rest, outputs)
    late = {*outputs, *_reads(kernel), *(n for item in behind for n in reads_of(item))}
    middle = bundler.needed(between, late)
    wanted = {*late, *_reads(measuring), *(n for item in middle for n in reads_of(item))}
    ahead = bundler.needed(first, wanted)
    all_small = bundler.leaves_nothing([*ahead, *middle, *behind])
    body = needed_by(made.first.body, wanted)
    return dataclasses.replace(
        made,
        first=bundler.program(body, tuple(o for i in body for o in i.outs if o in wanted)),
        kernel=kernel,
        measuring=measuring,
        ahead=bundler.arrange(ahead, wanted, all_small=all_small),
        between=bundler.arrange(middle, late, all_small=all_small),
        steps=bundler.arrange(behind, outputs, all_small=all_small),
    )


def _direct(kernel: Launch, bundler: Bundler) -> Launch:
    """The kernel, with the operands that are views read where their sources lie."""
    before, after, behind = (bundler.direct(e) for e in (kernel.before, kernel.after, kernel.behind))
    return dataclasses.replace(kernel, before=before, after=after, behind=behind)


def _reads(kernel: Launch | None) -> tuple[str, ...]:
    return () if kernel is None else kernel.reads


def _split(program: Program, values: Mapping[str, Form], least: int, gathered: Callable[[str], bool]) -> Program:
    """The program with the norms of large values taken apart, and those of given statistics behind collapsed means."""
    behind = {i.outs[0] for i in program.body if i.op == "contract_taps"}
    for instr in program.body:
        behind.update(() if behind.isdisjoint(instr.reads()) else instr.outs)
    collapsed = behind & {next(i.reads()) for i in program.body if i.op == "batch_norm"}

    def wanted(name: str) -> bool:
        value = values[name]
        return (value.numel() >= least or name in collapsed) and layout_of(value.shape, value.stride()) is not None

    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}
    return split_norms(program, types, wanted, gathered)


def _taken_together(program: Program, values: Mapping[str, Form], least: int) -> Program:
    """The program with values and their own reductions as one operator each, of large values."""
    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}

    def wanted(name: str, dims: tuple[int, ...]) -> bool:
        value = values[name]
        if not holds_rows(types[name], dims):
            return False
        laid_out = layouts_of(value.shape, value.stride())
        laid_out = laid_out if dims == (1,) else [layout for layout in laid_out if layout == "contiguous"]
        return value.numel() >= least and value.dtype in STORED and bool(laid_out)

    return taken_together(program, types, wanted)


def _same_forms(program: Program, values: Mapping[str, Form], others: Mapping[str, Form]) -> bool:
    """Whether the program's outputs have the same dtypes, sizes and strides, of dims that have any."""
    return all(values[name].lies_as(others[name]) for name in program.outputs)


def _stored(kernel: Launch, device: torch.device) -> Form:
    return Form(kernel.kind.dtype, tuple(s or 0 for s in kernel.kind.shape), kernel.strides, device)
