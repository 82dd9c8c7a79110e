"""Outputs that no window of a pool reads, computed after all: where torch convolves, it makes them anyway.

A crop saves a kernel of ours work. Torch crops some of it from the input, and the rest from what it has made, which
leaves a view with gaps that no kernel reads as its value. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref
from fxfuse.kernels.codegen.chains import layout_of
from fxfuse.kernels.planning.observe import observe
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: outputs that are computed, of those that are read: more than these are not worth a kernel behind them
MOST_MORE = 1.5


def uncropped(program: Program, values: dict[str, Form], inputs: Sequence[Tensor]) -> Program:
    """``program`` with whole convolutions, where only pools read these, whose windows end in front of what was cropped.

    ``values``: of every name of ``program``, for these ``inputs``. Pointwise instructions may lie between, whose other
    operands do not vary over space.
    """
    body, pools = list(program.body), set[str]()
    for place, anchor in enumerate(body):
        if anchor.op == "conv_transpose" and _has_gaps(values[anchor.outs[0]]):
            found = _pools_behind(program, anchor, values)
            if found is not None:
                pools |= found
                whole = {**dict(anchor.attributes), "extent": None}
                body[place] = dataclasses.replace(anchor, attributes=tuple(whole.items()))
    if not pools:
        return program
    made = Program(program.inputs, tuple(body), program.outputs)
    there = observe(made, inputs)
    more = any(form.numel() > MOST_MORE * values[name].numel() for name, form in there.items())
    return made if not more and all(there[name].shape == values[name].shape for name in pools) else program


def _has_gaps(form: Form) -> bool:
    return layout_of(form.shape, form.stride()) is None


def _pools_behind(program: Program, anchor: Instr, values: Mapping[str, Form]) -> set[str] | None:
    """The pools that alone read a convolution, none of them what may lie behind its crop; None where others do."""
    reached, pools = set(anchor.outs), set[str]()
    cropped = values[anchor.outs[0]].shape
    for instr in program.body:
        if reached.isdisjoint(instr.reads()):
            continue
        kind = vocabulary.lookup(instr.op).kind
        if kind is Kind.POINTWISE and values[instr.outs[0]].shape == cropped and _same_all_over(instr, reached, values):
            reached.update(instr.outs)
        elif kind is Kind.POOL and _ends_inside(instr, cropped, values[instr.outs[0]].shape):
            pools.update(instr.outs)
        else:
            return None
    return pools if reached.isdisjoint(program.outputs) else None


def _same_all_over(instr: Instr, reached: Collection[str], values: Mapping[str, Form]) -> bool:
    """Whether what else a pointwise instruction reads does not vary over space."""
    spatial = len(values[instr.outs[0]].shape) - 2
    others = [values[o.name].shape for o in instr.operands if isinstance(o, Ref) and o.name not in reached]
    return instr.op == "prelu" or all(size == 1 for shape in others for size in shape[-spatial:])


def _ends_inside(pool: Instr, lengths: tuple[int, ...], counts: tuple[int, ...]) -> bool:
    """Whether the last window of a pool reads nothing behind its value, no padding either."""
    given = dict(pool.attributes)
    if "kernel" not in given:
        return False  # an adaptive one divides what it is given
    rank = len(given["kernel"])
    dilation = given.get("dilation", (1,) * rank)
    along = zip(
        lengths[-rank:], counts[-rank:], given["kernel"], given["stride"], given["padding"], dilation, strict=True
    )
    return all((count - 1) * s - p + d * (k - 1) < length for length, count, k, s, p, d in along)
