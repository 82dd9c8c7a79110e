"""The second kernel of a collapsed mean: sums of the input times the weights, and the chain behind that. Pure.

:mod:`fxfuse.kernels.stages.collapsed` plans the first one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence

import torch

from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.chains import STORED, Chain, Values, dense, elements, layout_of
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.convolution.arguments import MOST_PARAMETERS
from fxfuse.kernels.cost import MACHINES
from fxfuse.kernels.stages.collapsed import MOST_ELEMENTS

#: taps of a contraction, of which a launch's parameters hold a table; numbers of 16 bits there
MOST_TAPS, MOST_PLACE = 832, 2**16
#: bytes of a launch's parameters that are neither the table nor of operands
OTHERS = 80
#: bytes per second that contractions read from the L2 cache; products per second of float32, of ours and of torch's
CACHED, PRODUCTS, MATRIX_PRODUCTS = 4e12, 1.5e13, 3e13
#: launches of torch's operators for a contraction
BY_TORCH = 4
#: seconds of one more kernel in a queue
LAUNCH = 2e-6


@dataclasses.dataclass(frozen=True)
class Contraction:
    """``contract_taps`` over all of space, times ``factor``, and the chain behind it: one kernel.

    ``weight``: laid out as ``layout`` says. ``table``: of each tap that takes part its number among the weight's, and
    that of its sum among ``width`` of a sample and channel. A block makes ``rows`` samples and ``across`` channels.
    """

    value: str
    weight: str
    weights: TensorType
    layout: str
    groups: int
    samples: int
    width: int
    table: tuple[tuple[int, int], ...]
    factor: float
    after: Expression | None
    stored: str
    kind: TensorType
    strides: tuple[int, ...]
    rows: int
    across: int
    body: tuple[Instr, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        operands = [] if self.after is None else [f.value for f in self.after.fields]
        return tuple(dict.fromkeys([self.value, self.weight, *operands]))

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.stored,)

    @property
    def chain(self) -> tuple[Instr, ...]:
        """The body without what only makes operands."""
        reached, found = {self.value}, []
        for instr in self.body:
            if not reached.isdisjoint(instr.reads()):
                reached.update(instr.outs)
                found.append(instr)
        return tuple(found)

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return (self.weights.shape[0] or 0) // self.groups

    @property
    def columns(self) -> int:
        """Output channels of a group."""
        return self.weights.shape[1] or 0

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.across) * self.groups * -(-self.samples // self.rows)

    def __str__(self) -> str:
        return f"one kernel: {' > '.join(i.op for i in self.chain)} -> {self.kind}"


def contraction_of(
    instr: Instr, values: Values, missing: Collection[str], there: Collection[str]
) -> Contraction | None:
    """The step for ``contract_taps`` and the chain behind it; None for torch.

    ``missing``: values that are not there when it runs; ``there``: those that are.
    """
    sums, weight = (values.types[_name(instr, i)] for i in (0, 1))
    attributes = dict(instr.attributes)
    rank = len(weight.shape)
    layout = layout_of(weight.shape, values.strides[_name(instr, 1)])
    if attributes["stride"] or layout is None or sums.dtype is not torch.float32 or weight.dtype not in STORED:
        return None
    if attributes["dims"] != tuple(range(2, rank)) or 0 in (*sums.shape, *weight.shape):
        return None
    table = _table(attributes["taps"], weight, sums)
    if len(table) > MOST_TAPS or max(max(pair) for pair in table) >= MOST_PLACE:
        return None
    samples, groups = sums.shape[0] or 0, attributes["groups"]
    if (weight.shape[0] or 0) // groups * len(table) > MOST_ELEMENTS:
        return None
    rows = min(8, 1 << (samples - 1).bit_length())
    across = 8 if layout == "channels_last" else 1 if rows <= 2 else 2
    rows = min(rows, 4) if across == 8 else rows
    scale, factor = _factor(instr, values)
    body = [instr, *scale]
    chain = values.longest(body[-1].outs[0], "After", missing, there=there, small=1)
    fields = 0 if chain.expression is None else len(chain.expression.fields)
    if OTHERS + 4 * len(table) + 8 * fields > MOST_PARAMETERS:
        return None
    made, reshaped = _reshaped(chain, values)
    stored = made if values.storable(chain.result) else None
    if stored is None:
        return None
    found = Contraction(
        value=_name(instr),
        weight=_name(instr, 1),
        weights=weight,
        layout=layout,
        groups=groups,
        samples=samples,
        width=math.prod(s or 0 for s in sums.shape[2:]),
        table=table,
        factor=factor,
        after=chain.expression,
        stored=stored,
        kind=values.types[stored],
        strides=tuple(values.strides[stored]),
        rows=rows,
        across=across,
        body=(*body, *chain.body, *reshaped),
    )
    return found if found.blocks <= MOST_ELEMENTS and _worth(found) else None


def _table(taps: Sequence[Sequence[int]], weight: TensorType, sums: TensorType) -> tuple[tuple[int, int], ...]:
    """Of each tap its number among the weights of a pair of channels, and that of its sum."""
    kernel, sizes = ([s or 0 for s in k.shape[2:]] for k in (weight, sums))
    found = []
    for place in itertools.product(*(range(len(t)) for t in taps)):
        tap = number = 0
        for d, i in enumerate(place):
            tap = tap * kernel[d] + taps[d][i]
            number = number * sizes[d] + (i if sizes[d] > 1 else 0)
        found.append((tap, number))
    return tuple(found)


def _factor(instr: Instr, values: Values) -> tuple[list[Instr], float]:
    """The multiplication by a number that alone reads the contraction, and that number: no part of a kernel's text."""
    reader = values.only_reader(instr.outs[0])
    if reader is not None and reader.op == "mul" and isinstance(reader.operands[0], Ref):
        number = reader.operands[1]
        if type(number) is float and values.types[reader.outs[0]] == values.types[instr.outs[0]]:
            return [reader], number
    return [], 1.0


def _reshaped(chain: Chain, values: Values) -> tuple[str, list[Instr]]:
    """What is stored: the chain's result, or that without its dims of size 1."""
    reader = values.only_reader(chain.result)
    if reader is not None and reader.op == "reshape":
        made = reader.outs[0]
        if values.strides[made] == dense(values.types[made].shape, "contiguous"):
            return made, [reader]
    return chain.result, []


def _worth(made: Contraction) -> bool:
    """Whether this kernel takes less than torch, which writes the weights in another order and multiplies matrices."""
    products = made.samples * made.channels * made.groups * len(made.table) * made.columns
    distinct = min(1.0, made.width / len(made.table))  # the same sum again is in the L1 cache
    read = products * (4 * distinct / made.across + made.weights.dtype.itemsize / made.rows)
    copied = elements(made.weights) * (made.weights.dtype.itemsize + 2 * 4)
    by_torch = copied / MACHINES["cuda"].bandwidth + products / MATRIX_PRODUCTS + BY_TORCH * LAUNCH
    return read / CACHED + products / PRODUCTS <= by_torch


def _name(instr: Instr, operand: int = 0) -> str:
    found = instr.operands[operand]
    assert isinstance(found, Ref)
    return found.name
