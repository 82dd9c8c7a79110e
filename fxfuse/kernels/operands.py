"""Where the operands of kernels lie: what is known of it before a call, and what a call fills in.

A kernel reads an operand by its address and its strides. Of most operands all but the address is known when a
region is prepared, and a view needs no operator to run: it lies where the tensor lies that it is a view of.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.kernels.expression import Expression
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: address and strides of an operand; a struct without fields takes as much room as one with one
WORD = 8


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``offset`` bytes behind the first element of the value ``base``."""

    base: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(name: str, tensor: Tensor) -> Place:
        return Place(name, 0, tensor.dtype, tuple(tensor.shape), tensor.stride())


def views(program: Program, places: Mapping[str, Place]) -> dict[str, Place]:
    """Where the outputs of ``program`` lie, if it does nothing but look at tensors in ``places`` in other ways.

    Empty if it computes or copies, or looks at another tensor.
    """
    shapes_only = all(vocabulary.lookup(i.op).kind is Kind.SHAPE for i in program.body)
    if not shapes_only or not all(name in places for name, _ in program.inputs):
        return {}
    given = [places[name] for name, _ in program.inputs]
    tensors = [torch.empty_strided(p.shape, p.strides, dtype=p.dtype, device="meta") for p in given]
    memory = {t.untyped_storage()._cdata: place for t, place in zip(tensors, given, strict=True)}
    found = {}
    for name, made in zip(program.outputs, program.run(tensors), strict=True):
        place = memory.get(made.untyped_storage()._cdata)
        if place is None or made.dtype is not place.dtype:
            return {}
        offset = place.offset + int(made.storage_offset()) * made.dtype.itemsize
        found[name] = Place(place.base, offset, made.dtype, tuple(made.shape), made.stride())
    return found


class _Operand(NamedTuple):
    """``strides``: packed; None where a call has to ask the tensor, along ``axes``."""

    value: str
    offset: int
    axes: tuple[int, ...]
    strides: bytes | None


class Operands:
    """The fields of an expression's struct, 8 bytes each: call it with the values. For any thread.

    ``places``: of the values of which more is known than a call tells.
    """

    def __init__(self, expression: Expression | None, places: Mapping[str, Place]) -> None:
        operands = []
        for value, axes in [] if expression is None else _read(expression):
            place = places.get(value)
            if place is None:
                operands.append(_Operand(value, 0, axes, None))
            else:
                operands.append(_Operand(place.base, place.offset, axes, _packed(place.shape, place.strides, axes)))
        #: what a call fills in; with none of them it makes nothing
        self.told = tuple(operands)
        #: what they are to :mod:`struct`, without a mark of byte order: C++ has no struct of size 0
        self.form = "".join(f"q{WORD * len(o.axes)}s" for o in operands) or f"{WORD}x"
        self._struct = struct.Struct(f"<{self.form}")
        self.size = self._struct.size

    def __call__(self, values: Mapping[str, Tensor]) -> bytes:
        return self._struct.pack(*self.tell(values)) if self.told else b""

    def tell(self, values: Mapping[str, Tensor]) -> list[int | bytes]:
        """What goes into the fields, in order."""
        told: list[int | bytes] = []
        for value, offset, axes, strides in self.told:
            tensor = values[value]
            told.append(tensor.data_ptr() + offset)
            told.append(_packed(tensor.shape, tensor.stride(), axes) if strides is None else strides)
        return told


def _read(expression: Expression) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The values whose addresses an expression takes, in order, each with the axes whose strides follow."""
    fields = expression.fields
    starts = [i for i, f in enumerate(fields) if f.axis is None]
    for start, end in itertools.pairwise([*starts, len(fields)]):
        yield fields[start].value, tuple(f.axis for f in fields[start + 1 : end] if f.axis is not None)


def _packed(shape: Sequence[int], strides: Sequence[int], axes: tuple[int, ...]) -> bytes:
    """Strides along ``axes``: 0 where there is one element."""
    return _integers(len(axes)).pack(*(0 if shape[a] == 1 else strides[a] for a in axes))


@functools.cache
def _integers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}q")
