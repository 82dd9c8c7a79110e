"""What is in front of a convolution: steps that make its input, and the last of them inside the kernels that read it.

Most convolutions bring x into rows of 16-bit numbers first. A pointwise chain in front of one costs no pass of its own
then: elements go through it on their way into the rows. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fxfuse.forms import Form
from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.chains import needed_by
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.stages.steps import Launch, Map, Schedule, Step, Torch
from fxfuse.kernels.stages.tail import LEAST_BEHIND_OURS, plan
from fxfuse.program import program_of


def steps_in_front(made: Schedule, values: Mapping[str, Form]) -> Sequence[Step]:
    """What runs before the convolution: kernels for what leads to its input, as behind it; the rest as torch.

    ``values``: all of the schedule's, without their elements.
    """
    first, kernel = made.first, made.kernel
    leads = [] if kernel is None else needed_by(first.body, [kernel.x])
    if not leads:
        return [Torch(first)]
    types = {name: TensorType(t.dtype, tuple(t.shape)) for name, t in values.items()}
    rest = [i for i in first.body if i not in leads]
    wanted = {*first.outputs, *(n for i in rest for n in i.reads())}
    front = program_of(leads, [o for i in leads for o in i.outs if o in wanted], types)
    others = program_of(rest, [o for i in rest for o in i.outs if o in first.outputs], types)
    return [*plan(front, values, least=LEAST_BEHIND_OURS), Torch(others)]


def absorb(made: Schedule, convolutions: Sequence[Convolution]) -> Schedule | None:
    """The schedule with the pointwise chain right in front of its convolution in the kernels that read x; None where
    there is none, or where one of the ``convolutions``, all that it runs, reads x in planes.
    """
    step = next((s for s in made.ahead for k in made.launches[-1:] if s.makes == (k.x,)), None)
    if not isinstance(step, Map) or step.before is None or not step.pointwise or step.viewed:
        return None
    others = [*(s for s in made.ahead if s is not step), *made.between, *made.steps]
    if step.stored in made.rest.outputs or any(step.stored in s.reads for s in others):
        return None
    if any(k.x != step.stored or k.correlates or step.stored in k.operands for k in made.launches):
        return None
    wide = step.given.dtype is torch.float32 and step.kind.dtype is not torch.float32
    if step.given.dtype is not step.kind.dtype and not wide:
        return None
    if any(c.made.planar for c in convolutions):
        return None
    measuring, kernel = (None if k is None else _behind(k, step) for k in (made.measuring, made.kernel))
    return dataclasses.replace(
        made, kernel=kernel, measuring=measuring, ahead=tuple(s for s in made.ahead if s is not step)
    )


def _behind(kernel: Launch, step: Map) -> Launch:
    """The convolution's kernel with ``step`` in it."""
    assert step.before is not None
    return dataclasses.replace(
        kernel,
        x=step.value,
        given=step.given.dtype,
        front=step.before.renamed("Front"),
        planes=False,
        stages=(*step.stages, *kernel.stages),
    )
