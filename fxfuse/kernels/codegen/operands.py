"""Where the operands of kernels lie: what is known of it before a call, and what a call fills in.

A kernel reads an operand by its address and its strides. Of most operands all but the address is known when a
region is prepared, and a view needs no operator to run: it lies where the tensor lies that it is a view of.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.program import Program

Values = Mapping[str, Tensor]
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
    def of(name: str, tensor: Tensor | Form) -> Place:
        return Place(name, 0, tensor.dtype, tuple(tensor.shape), tensor.stride())

    @property
    def end(self) -> int:
        """Bytes from the first element of ``base`` to the end of the last one here."""
        if 0 in self.shape:
            return self.offset
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + (last + 1) * self.dtype.itemsize


def views(program: Program, places: Mapping[str, Place]) -> dict[str, Place]:
    """Where the outputs of ``program`` lie, if it does nothing but look at tensors in ``places`` in other ways.

    Empty if it computes or copies, or looks at another tensor.
    """
    only_looks = all(vocabulary.lookup(i.op).view for i in program.body)
    if not only_looks or not all(name in places for name, _ in program.inputs):
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
    """The fields of an expression's struct, 8 bytes each, as functions of the values. For any thread.

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
        self.told = tuple(operands)
        strides = [f"{WORD * len(o.axes)}s" if o.strides is None else o.strides for o in operands]
        #: parts of a kernel's parameters, as of ``runtime/launch.py``, and their values of a call
        self.parts: tuple[str | bytes, ...] = tuple(p for s in strides for p in ("q", s)) or (bytes(WORD),)
        self.tell = told_by([self])
        packing = struct.Struct("<" + "".join(f"q{WORD * len(o.axes)}s" for o in operands))
        self.size = packing.size or WORD
        #: the fields, packed; None where there are none
        self.pack: Callable[[Values], bytes] | None = _written(self.told, packing.pack) if self.told else None


def told_by(operands: Sequence[Operands]) -> Callable[[Values], tuple[int | bytes, ...]]:
    """The values of a call for the parts of all of these."""
    return _written([t for o in operands for t in o.told])


def addresses(reads: Sequence[tuple[str, int]]) -> Callable[[Values], tuple[int, ...]]:
    """A function of the values: where they lie, so many bytes behind their first elements."""
    return _written([_Operand(value, offset, (), b"") for value, offset in reads])


def _written(operands: Sequence[_Operand], pack: Callable[..., bytes] | None = None) -> Callable[[Values], Any]:
    """A function of the values: what ``pack`` makes of the fields of ``operands``, or a tuple of those that change.

    It is written out, since every call asks it: a loop takes twice as long. Where several operands lie in one tensor,
    its address is asked for once.
    """
    space: dict[str, Any] = {"pack": pack, "packed": _packed}
    tensors = {value: f"t{i}" for i, value in enumerate(dict.fromkeys(o.value for o in operands))}
    lines = [f"{t} = values[{value!r}]; {t}_at = {t}.data_ptr()" for value, t in tensors.items()]
    terms = ""
    for i, (value, offset, axes, strides) in enumerate(operands):
        t = tensors[value]
        space[f"strides{i}"] = strides
        terms += f"{t}_at + {offset}, "
        if strides is None:
            terms += f"packed({t}.shape, {t}.stride(), {axes}), "
        elif pack is not None:
            terms += f"strides{i}, "
    lines.append(f"return {'' if pack is None else 'pack'}({terms})")
    exec("\n    ".join(["def written(values):", *lines]), space)  # noqa: S102 - written above
    return space.pop("written")  # type: ignore[no-any-return]


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
