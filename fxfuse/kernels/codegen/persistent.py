"""A value and its own reductions, taken together: what one kernel makes of the rows that it holds.

``y * sigmoid(y.mean(1, keepdim=True) + y.amax(1, keepdim=True))`` reads y three times. All of it is one reduction to
the kernels that hold a row: the derived operator ``persistent`` (Inductor's word for reductions whose rows stay in
registers), whose meaning is a program. Pure: programs in, programs out.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.arithmetic import NotEmittable
from fxfuse.kernels.codegen.chains import needed
from fxfuse.kernels.codegen.emit_persistent import Persistent, emit_persistent
from fxfuse.kernels.codegen.folds import combine_of, dims_of, keeps, reduces
from fxfuse.program import Program
from fxfuse.vocabulary import Kind
from fxfuse.vocabulary.op import define

OP = "persistent"
#: reductions that are taken together: each computes anew what it reduces, of those before it
MOST_REDUCTIONS = 6


@define(Kind.DERIVED)
def persistent(x: Tensor, *, dims: tuple[int, ...], keeps: bool, program: str) -> Tensor:
    """What ``program``, as text, makes of x and of reductions over ``dims`` of what is made of x elementwise.

    ``keeps``: the result has the shape of x, else one value per row.
    """
    (made,) = _parsed(program).run([x])
    return made


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Program:
    return Program.parse(text)[1]


def body_of(instr: Instr) -> Persistent | None:
    """What a kernel makes for an instruction of this module's operator; None for others."""
    if instr.op != OP:
        return None
    attributes = dict(instr.attributes)
    return _emitted(attributes["program"], attributes["keeps"])


@functools.lru_cache(maxsize=256)
def _emitted(text: str, keeps: bool) -> Persistent:
    return emit_persistent(_parsed(text), keeps=keeps)


def names_of(body: Sequence[Instr]) -> tuple[str, ...]:
    """The operators, for a person to read: of this module's those of its program."""
    return tuple(name for i in body for name in _names(i))


def _names(instr: Instr) -> tuple[str, ...]:
    return names_of(_parsed(dict(instr.attributes)["program"]).body) if instr.op == OP else (instr.op,)


class _Role(enum.Enum):
    """What a value is to the rows of another one."""

    ELEMENT = "an element of a row"
    ROW = "one value per row, of size 1 in the reduced dims"
    SQUEEZED = "one value per row, without those dims"


@dataclasses.dataclass(frozen=True)
class _Found:
    """``body`` makes ``result`` of ``value`` and its reductions over ``dims``. ``outside``: others that read that."""

    value: str
    dims: tuple[int, ...]
    body: tuple[Instr, ...]
    result: str
    role: _Role
    outside: int

    @property
    def order(self) -> tuple[int, int, int]:
        """The best one first: the value is not read again, most is reduced, nothing is taken that other expressions of
        a kernel compute; it has none behind what has fewer dims.
        """
        more = -1 if self.role is _Role.SQUEEZED else 1
        return self.outside, -sum(map(reduces, self.body)), more * len(self.body)


def taken_together(
    program: Program, types: Mapping[str, TensorType], wanted: Callable[[str, tuple[int, ...]], bool]
) -> Program:
    """``program`` with values and several reductions of theirs, or one that they meet again, as one instruction each.

    ``types``: of every value. ``wanted``: of a value and dims, whether kernels hold its rows.
    """
    while (best := _best(program, types, wanted)) is not None:
        program = _replaced(program, types, best)
    return program


def _best(
    program: Program, types: Mapping[str, TensorType], wanted: Callable[[str, tuple[int, ...]], bool]
) -> _Found | None:
    found = sorted(_all(program, types, wanted), key=lambda f: f.order)
    return next((f for f in found if _is_emittable(f, types)), None)


def _replaced(program: Program, types: Mapping[str, TensorType], found: _Found) -> Program:
    kind = types[found.value]
    text = Program(((found.value, kind),), found.body, (found.result,)).text("rows")
    given = {"dims": found.dims, "keeps": types[found.result].shape == kind.shape, "program": text}
    made = Instr((found.result,), OP, (Ref(found.value),), tuple(given.items()))
    body = [made if i is found.body[-1] else i for i in program.body]
    return Program(program.inputs, tuple(i for i in body if all(i is not b for b in found.body)), program.outputs)


def _all(
    program: Program, types: Mapping[str, TensorType], wanted: Callable[[str, tuple[int, ...]], bool]
) -> Iterator[_Found]:
    reduced = {
        (len(types[name].shape), dims_of(i, types[name]))
        for i in program.body
        if i.op != OP and reduces(i)
        for name in i.reads()
        if combine_of(i, types[name]) is not None
    }
    for value in types:
        for rank, dims in reduced:
            if rank == len(types[value].shape) and dims and wanted(value, dims):
                yield from _of(program, types, value, dims)


def _of(program: Program, types: Mapping[str, TensorType], value: str, dims: tuple[int, ...]) -> Iterator[_Found]:
    roles = {value: _Role.ELEMENT}
    reached: list[Instr] = []
    for instr in program.body:
        role = _role(instr, roles, types, types[value], dims)
        if role is not None:
            roles[instr.outs[0]] = role
            reached.append(instr)
    for last in reached:
        body = needed(reached, last)
        kind = types[last.outs[0]]
        if kind.dtype is not types[value].dtype or any(_escapes(i.outs[0], body, program) for i in body[:-1]):
            continue
        if _is_straight(body, value) or sum(map(reduces, body)) > MOST_REDUCTIONS:
            continue
        outside = sum(value in i.reads() and all(i is not b for b in body) for i in program.body)
        outside += program.outputs.count(value)
        yield _Found(value, dims, tuple(body), last.outs[0], roles[last.outs[0]], outside)


def _role(
    instr: Instr,
    roles: Mapping[str, _Role],
    types: Mapping[str, TensorType],
    kind: TensorType,
    dims: tuple[int, ...],
) -> _Role | None:
    """What an instruction makes, to the rows of a value of this ``kind``; None of what does not take part."""
    read = {*instr.reads()}
    if not read or not read <= roles.keys() or len(instr.outs) > 1:
        return None
    given, made = {roles[name] for name in read}, types[instr.outs[0]]
    row = tuple(1 if d in dims else s for d, s in enumerate(kind.shape))
    squeezed = tuple(s for d, s in enumerate(kind.shape) if d not in dims)
    shapes = {_Role.ELEMENT: kind.shape, _Role.ROW: row, _Role.SQUEEZED: squeezed}
    op, role = vocabulary.lookup(instr.op), None
    if reduces(instr):
        (name,) = read
        of = types[name]
        combine = combine_of(instr, of) if given == {_Role.ELEMENT} and instr.op != OP else None
        if combine is None or dims_of(instr, of) != dims or made.dtype is not of.dtype:
            return None
        if keeps(combine):
            role = _Role.ELEMENT
        else:
            role = _Role.ROW if len(made.shape) == len(kind.shape) else _Role.SQUEEZED
    elif op.kind is Kind.POINTWISE:
        if len(given) == 1:
            (role,) = given
        elif given == {_Role.ELEMENT, _Role.ROW}:
            role = _Role.ELEMENT
    elif instr.op == "reshape" and _Role.ELEMENT not in given:
        role = next((r for r in (_Role.ROW, _Role.SQUEEZED) if made.shape == shapes[r]), None)
    return role if role is not None and made.shape == shapes[role] else None


def _is_straight(body: Sequence[Instr], value: str) -> bool:
    """Whether ``body`` is no more than a chain that leads to one reduction, and one that leads from it: kernels have
    names for that.
    """
    reductions = [i for i in body if reduces(i)]
    if len(reductions) != 1:
        return not reductions
    front = needed(body, reductions[0])
    there = {value, *(i.outs[0] for i in front[:-1])}
    return all(there.isdisjoint(i.reads()) for i in body if all(i is not f for f in front))


def _escapes(name: str, body: Collection[Instr], program: Program) -> bool:
    """Whether something else than ``body`` reads a value."""
    return name in program.outputs or any(name in i.reads() and all(i is not b for b in body) for i in program.body)


def _is_emittable(found: _Found, types: Mapping[str, TensorType]) -> bool:
    program = Program(((found.value, types[found.value]),), found.body, (found.result,))
    try:
        emit_persistent(program, keeps=types[found.result].shape == types[found.value].shape)
    except NotEmittable:
        return False
    return True
