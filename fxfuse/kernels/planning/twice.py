"""The convolution run twice: for the statistics of its value, and again to make of them what is stored.

A normalisation needs the value before its first element is ready. A schedule that runs the convolution once writes
the value and reads it again. This one never writes it: the first run stores statistics alone, the second one has
the normalisation in its pointwise chain, and a pool behind that where residue classes make it. What the first run has
made of x and the weights, the second one uses as well, as far as both multiply it in the same form. Of few input
channels the statistics may come without a first run. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fxfuse.forms import Form
from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.chains import dense, needed_by
from fxfuse.kernels.codegen.formulas import COMPARISONS
from fxfuse.kernels.codegen.ranges import ranges_of
from fxfuse.kernels.codegen.statistics import KINDS, kinds_of
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.specialisation import Shared, Specialisation, Unsupported
from fxfuse.kernels.planning.observe import observe
from fxfuse.kernels.planning.schedule import best, cut, least_elements, versions
from fxfuse.kernels.stages.means import pool_first
from fxfuse.kernels.stages.norms import nothing
from fxfuse.kernels.stages.steps import Schedule
from fxfuse.kernels.stages.tail import plan
from fxfuse.program import Program, program_of

#: the size of values up to which a softmax of them may be made of two runs: a clamp, a sigmoid or a tanh is in front
MOST_RAISED = 16.0


def twice(
    program: Program,
    inputs: Sequence[Tensor],
    once: Schedule,
    *,
    exact: bool = False,
    gathered: Callable[[str], bool] = nothing,
) -> Schedule | None:
    """The schedule for ``inputs`` that runs the convolution twice; None where there is none, or no use for it.

    ``once``: the schedule that runs it once. There is use for another where that one's kernel stores a value whose
    statistics it gathers, and nothing but what is made of both needs that value. ``exact``: as of ``schedule``;
    ``gathered``: as of ``versions``.
    """
    kernel = once.kernel
    if kernel is None or not (kernel.gathers and kernel.keeps):
        return None
    observed = observe(program, inputs)
    for version, values in versions(program, observed, inputs, least_elements(anchored=True), gathered=gathered):
        made = _cut(version, values, exact)
        if made is not None:
            return _packed_alike(best(program, observed, [made]))
    return None


def _packed_alike(made: Schedule) -> Schedule:
    """The schedule with a first run in the memory format of the second one.

    It stores nothing, but the format also decides how weights are packed, which both then share.
    """
    first, second = made.measuring, made.kernel
    assert first is not None and second is not None
    strides = dense(first.kind.shape, second.layout or "contiguous")
    return dataclasses.replace(made, measuring=dataclasses.replace(first, strides=strides))


def sharing(made: Schedule, first: Specialisation, second: Specialisation) -> Schedule:
    """The schedule, of these kernels, whose second run uses what the first one has made of x and the weights."""
    early, late = made.measuring, made.kernel
    assert early is not None and late is not None
    if (early.x, early.dtype) != (late.x, late.dtype):
        return made
    shares = second.shared(first)
    weights = [(k.weight, k.bias, k.bias_dtype) for k in (early, late)]
    if shares is Shared.ALL and weights[0] != weights[1]:
        shares = Shared.ROWS
    return dataclasses.replace(made, kernel=dataclasses.replace(late, shares=shares))


def from_products(made: Schedule, given: Mapping[str, TensorType]) -> tuple[Schedule, Correlation]:
    """The schedule with statistics from products of x with itself in the place of its first run, and what makes them.

    ``given``: the types of the inputs. Raises Unsupported.
    """
    run = made.measuring
    assert run is not None
    if run.before is not None or run.combine or run.scales != (1.0, 1.0):
        raise Unsupported(f"statistics are of more than the convolution: {' > '.join(run.stages)}")
    if run.gathers != ("statistics",):
        raise Unsupported(f"products tell nothing of {' and '.join(run.gathers)}")
    if run.x not in given:
        raise Unsupported(f"{run.x}, which is convolved, is not given")
    products = Correlation.of(run.layer, run.dtype, run.kind.dtype, run.bias_dtype)
    d, h, w = (1, 1, 1, *(s or 0 for s in given[run.x].shape[2:]))[-3:]
    products.parts((d, h, w), run.extents)
    return dataclasses.replace(made, measuring=dataclasses.replace(run, correlates=True)), products


def _cut(program: Program, given: Mapping[str, Form], exact: bool) -> tuple[Schedule, Mapping[str, Form]] | None:
    """A version of the program cut for two runs, and its values; None for one whose first run gathers nothing."""
    first = cut(program, given, exact=exact)
    assert first.kernel is not None
    value = first.kernel.stored
    measured = [i for i in first.rest.body if i.op in KINDS and value in i.reads()]
    if not measured or first.kernel.reduces or _asks_for_the_same_bits(program, given, value, measured):
        return None
    later, values = _later(program, given, measured)
    second = cut(later, values, exact=exact)
    assert second.kernel is not None
    if second.kernel.stored == value:
        return None  # something else needs it
    return _together(program, first, second, measured, values), values


def _asks_for_the_same_bits(program: Program, given: Mapping[str, Form], value: str, measured: Sequence[Instr]) -> bool:
    """Whether a last bit by which the second run's ``value`` may differ is more than that in what is made of both.

    exp(value - maximum) is Inf or 0 in place of 1 where a bit of a large value is more than 1. A comparison with an
    extreme asks whether they are equal.
    """
    kinds, types = {i.op for i in measured}, _types(given)
    powers = any(i.op == "exp_below" for i in program.body)
    if "exponentials" in kinds and powers and not ranges_of(program, types)[value].within(MOST_RAISED):
        return True
    return "extremes" in kinds and any(i.op in COMPARISONS for i in program.body)


def _later(
    program: Program, given: Mapping[str, Form], measured: Sequence[Instr]
) -> tuple[Program, Mapping[str, Form]]:
    """The program of which the statistics are inputs, and all values of both."""
    types = _types(given)
    inputs = (*program.inputs, *((out, types[out]) for i in measured for out in i.outs))
    body = tuple(needed_by([i for i in program.body if i not in measured], program.outputs))
    later = pool_first(Program(inputs, body, program.outputs), types)
    return later, {**given, **observe(later, [given[name] for name, _ in later.inputs])}


def _together(
    program: Program, first: Schedule, second: Schedule, measured: Sequence[Instr], values: Mapping[str, Form]
) -> Schedule:
    """The schedule of both runs, made of the schedules of each. The second one needs the first one's results."""
    assert first.kernel is not None and second.kernel is not None
    early, between = [*first.first.body], [*measured]
    known = {n for n, _ in program.inputs} | {out for i in early for out in i.outs}
    for instr in (i for i in second.first.body if i not in early):
        waits = not known.issuperset(instr.reads())
        (between if waits else early).append(instr)
        known.update(() if waits else instr.outs)
    types = _types(values)
    behind = {*second.kernel.reads, *(n for n, _ in second.rest.inputs)}
    middle = program_of(between, [out for i in between for out in i.outs if out in behind], types)
    wanted = {*first.kernel.reads, *(n for n, _ in middle.inputs), *behind}
    return dataclasses.replace(
        second,
        first=program_of(early, [out for i in early for out in i.outs if out in wanted], types),
        measuring=dataclasses.replace(first.kernel, gathers=kinds_of(measured), keeps=False),
        between=plan(middle, values, first.kernel.stored, least=least_elements(anchored=True)),
    )


def _types(values: Mapping[str, Form]) -> dict[str, TensorType]:
    return {name: TensorType(t.dtype, tuple(t.shape)) for name, t in values.items()}
