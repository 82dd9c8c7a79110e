"""Pointwise chains of a program: how far one kernel can go before something else has to run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.arithmetic import NotEmittable
from fxfuse.kernels.codegen.expression import Expression, emit_expression
from fxfuse.kernels.codegen.formulas import SMALL_NUMBER
from fxfuse.kernels.codegen.ranges import ranges_of
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: dtypes that a kernel reads and stores
STORED = (torch.float32, torch.float16, torch.bfloat16)
#: an operand that is smaller by this factor may be computed again for every element
SMALL = 64


@dataclasses.dataclass(frozen=True)
class Chain:
    """Pointwise instructions that lead to ``result``."""

    result: str
    body: tuple[Instr, ...] = ()
    expression: Expression | None = None


class Values:
    """What is known of a program's values: types, strides, who reads them, which hold small numbers."""

    def __init__(self, program: Program, values: Mapping[str, Form]) -> None:
        self.program = program
        self.types = {name: TensorType(t.dtype, tuple(t.shape)) for name, t in values.items()}
        self.strides = {name: t.stride() for name, t in values.items()}
        self.readers: dict[str, list[Instr]] = {name: [] for name in values}
        for instr in program.body:
            for name in set(instr.reads()):
                self.readers[name].append(instr)
        #: products with a matrix, and what is made of them and is no larger: kernels on small tensors make all of it
        self.of_products = set[str]()
        for instr in program.body:
            sizes = [elements(self.types[n]) for n in self.of_products.intersection(instr.reads())]
            product = vocabulary.lookup(instr.op).kind is Kind.PRODUCT
            if product or (sizes and elements(self.types[instr.outs[0]]) <= max(sizes)):
                self.of_products.update(instr.outs)
        self.small_numbers = {n for n, r in ranges_of(program, self.types).items() if r.within(SMALL_NUMBER)}

    def storable(self, name: str) -> bool:
        kind = self.types[name]
        return kind.dtype in STORED and layout_of(kind.shape, self.strides[name]) is not None

    def longest(
        self,
        value: str,
        name: str,
        missing: Collection[str],
        *,
        there: Collection[str] = (),
        kept: bool = False,
        small: int = SMALL,
        widened: bool = True,
    ) -> Chain:
        """The most of the pointwise instructions behind ``value`` that lead to one result and leave no other use.

        ``missing``: values that are not there when the chain runs, unless it makes them. ``name``: of the
        expression. ``kept``: ``value`` is in memory, for others to read. Operands that are smaller by the factor
        ``small`` and pointwise themselves are computed in the chain, too, unless they are ``there`` or made of
        products. Not ``widened``: a cast to a wider dtype is not its last instruction, which would make twice the
        bytes of what it was given.
        """
        reached, operands = {value}, set[str]()
        behind = []
        for instr in self.program.body:
            reads = set(instr.reads())
            if reads & reached:
                made_here = reads.intersection(missing) <= reached | operands and not {*instr.outs}.isdisjoint(missing)
                if made_here and self._same_place(instr, value):
                    reached.update(instr.outs)
                    behind.append(instr)
            elif (
                self._small(instr, value, small)
                and reads.intersection(missing) <= operands
                and not {*instr.outs} <= {*there}
            ):
                operands.update(instr.outs)
                behind.append(instr)
        for last in reversed(behind):
            if last.outs[0] in operands or (not widened and self.widens(last)):
                continue
            body = needed(behind, last)
            inside = [i for i in body if i.outs[0] not in operands]
            between = [*([] if kept else [value]), *(i.outs[0] for i in inside[:-1])]
            if any(self._escapes(v, inside) for v in between) or not self.storable(last.outs[0]):
                continue
            try:
                made = emit_expression(
                    name, body, value=value, result=last.outs[0], types=self.types, small_numbers=self.small_numbers
                )
            except NotEmittable:
                continue
            return Chain(last.outs[0], tuple(body), made)
        return Chain(value)

    def widens(self, instr: Instr) -> bool:
        """Whether it is a cast to a wider dtype."""
        (made,), given = instr.outs, next(instr.reads(), None)
        return instr.op == "cast" and self.types[made].dtype.itemsize > self.types[given or made].dtype.itemsize

    def _same_place(self, instr: Instr, value: str) -> bool:
        pointwise = vocabulary.lookup(instr.op).kind is Kind.POINTWISE
        return pointwise and self.types[instr.outs[0]].shape == self.types[value].shape

    def _small(self, instr: Instr, value: str, factor: int) -> bool:
        size, own = (elements(self.types[n]) for n in (instr.outs[0], value))
        pointwise = vocabulary.lookup(instr.op).kind is Kind.POINTWISE
        return pointwise and size * factor <= own and instr.outs[0] not in self.of_products

    def _escapes(self, value: str, body: Sequence[Instr]) -> bool:
        """Whether something else than ``body`` reads ``value``."""
        readers = self.readers[value]
        return value in self.program.outputs or any(all(r is not i for i in body) for r in readers)

    def only_reader(self, value: str) -> Instr | None:
        """The instruction that alone reads ``value``, once."""
        readers = self.readers[value]
        return readers[0] if len(readers) == 1 and value not in self.program.outputs else None


def needed(body: Sequence[Instr], last: Instr) -> list[Instr]:
    """The instructions of ``body`` that ``last`` needs, itself included, in order."""
    return list(_backwards(body, set(last.outs)))[::-1]


def needed_by(body: Sequence[Instr], values: Collection[str]) -> list[Instr]:
    """The instructions of ``body`` that ``values`` need, in order."""
    return list(_backwards(body, set(values)))[::-1]


def _backwards(body: Sequence[Instr], wanted: set[str]) -> Iterator[Instr]:
    for instr in reversed(body):
        if not wanted.isdisjoint(instr.outs):
            wanted.update(instr.reads())
            yield instr


def elements(kind: TensorType) -> int:
    """How many there are."""
    return math.prod(s or 0 for s in kind.shape)


# --- layouts --------------------------------------------------------------------------------------
def dense(shape: Sequence[int | None], layout: str) -> tuple[int, ...]:
    """The strides of a dense tensor (N, C, *spatial): "contiguous", or "channels_last" with C the fastest dim."""
    sizes = [s or 0 for s in shape]
    order = list(range(len(sizes))) if layout == "contiguous" else [0, *range(2, len(sizes)), 1]
    strides, step = [0] * len(sizes), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return tuple(strides)


def layouts_of(shape: Sequence[int | None], strides: Sequence[int]) -> list[str]:
    """The memory formats that a tensor (N, C, *spatial) has: "contiguous", "channels_last", both or none."""
    return [
        layout
        for layout in ("contiguous", "channels_last")
        if all(s == 1 or a == b for s, a, b in zip(shape, strides, dense(shape, layout), strict=True))
    ]


def layout_of(shape: Sequence[int | None], strides: Sequence[int]) -> str | None:
    """The first of :func:`layouts_of`, or None."""
    return next(iter(layouts_of(shape, strides)), None)
