"""A program: straight-line operators of the vocabulary over typed tensors. Frozen, hashable, text and back.

The text is Python syntax, read with :mod:`ast` and never executed::

    def chain(x: f32[2, 32, 8, 8, 8], w: f32[32, 64, 5, 5, 5], b: f32[64]):
        y = conv_transpose(x, w, b, stride=(2, 2, 2), padding=(2, 2, 2), ...)
        m = max_pool(y, kernel=(2, 2, 2), ...)
        return m

``_`` in a shape is a size not known when the program was made.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import keyword
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import DTYPE_NAMES, DTYPES, Instr, Ref, TensorType
from fxfuse.trim import late_trims

#: the outputs of a program, of its inputs
Run = Callable[[Sequence[Tensor]], list[Tensor]]


class ProgramError(ValueError):
    """A program that is not well formed; the message names the instruction."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Typed inputs, instructions in order, names of the outputs."""

    inputs: tuple[tuple[str, TensorType], ...]
    body: tuple[Instr, ...]
    outputs: tuple[str, ...]

    def text(self, name: str) -> str:
        head = ", ".join(f"{n}: {t}" for n, t in self.inputs)
        lines = [f"def {name}({head}):", *(f"    {i}" for i in self.body)]
        return "\n".join([*lines, f"    return {', '.join(self.outputs) or '()'}"]) + "\n"

    def __str__(self) -> str:
        return self.text("program")

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.inputs, self.body, self.outputs))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        # without what is cached: functions, and hashes that another process computes otherwise
        return Program, (self.inputs, self.body, self.outputs)

    def verify(self) -> None:
        """Every operator known and fully attributed, every name defined once and before its use."""
        defined: set[str] = set()
        for name, _ in self.inputs:
            _define(defined, name, "the inputs")
        for instr in self.body:
            _verify_instr(instr)
            for read in instr.reads():
                if read not in defined:
                    raise ProgramError(f"`{instr}`: {read} is not defined here")
            for out in instr.outs:
                _define(defined, out, f"`{instr}`")
        for out in self.outputs:
            if out not in defined:
                raise ProgramError(f"the output {out} is not defined")

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ProgramError unless ``tensors`` fit the input types."""
        if len(tensors) != len(self.inputs):
            raise ProgramError(f"{len(tensors)} tensors given; the program takes {len(self.inputs)}")
        for (name, kind), tensor in zip(self.inputs, tensors, strict=True):
            wrong = kind.mismatch(tensor)
            if wrong:
                raise ProgramError(f"input {name}: {wrong}")

    def differentiable_in(self, outputs: Sequence[int]) -> list[bool]:
        """For each input, whether a gradient of one of the ``outputs`` (positions) reaches it."""
        reached = {self.outputs[i] for i in outputs}
        for instr in reversed(self.body):
            if instr.outs[0] in reached and vocabulary.lookup(instr.op).differentiable:
                reached.update(instr.reads())
        return [name in reached and kind.dtype.is_floating_point for name, kind in self.inputs]

    def run(self, tensors: Sequence[Tensor], *, reuse: bool = False) -> list[Tensor]:
        """Run in plain torch. ``reuse`` lets pointwise operators write over dead intermediates (no autograd)."""
        return (self._reusing if reuse else self._running)(tensors)

    @functools.cached_property
    def _steps(self) -> _Steps:
        return _schedule(self)

    @functools.cached_property
    def _running(self) -> Run:
        return _written(self._steps, len(self.inputs), reuse=False)

    @functools.cached_property
    def _reusing(self) -> Run:
        return _written(self._steps, len(self.inputs), reuse=True)

    @staticmethod
    def parse(text: str) -> tuple[str, Program]:
        """The name and the program that ``text`` spells; ProgramError names what is wrong."""
        statements = parse_statements(text)
        if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
            raise ProgramError("a program is one `def`")
        return parse_function(statements[0])


def _verify_instr(instr: Instr) -> None:
    try:
        op = vocabulary.lookup(instr.op)
        complete = op.complete(dict(instr.attributes))
    except (KeyError, TypeError) as error:
        raise ProgramError(f"in `{instr.op}`: {error.args[0]}") from None
    if tuple(complete) != tuple(k for k, _ in instr.attributes):
        raise ProgramError(f"`{instr}`: attributes must be complete and in the order {tuple(complete)}")
    if len(instr.operands) != op.arity:
        raise ProgramError(f"`{instr}`: {op.name} takes {op.arity} operands, not {len(instr.operands)}")
    if len(instr.outs) != op.outputs:
        raise ProgramError(f"`{instr}`: {op.name} gives {op.outputs} tensors, not {len(instr.outs)}")
    for operand in instr.operands:
        if operand is not None and type(operand) not in (Ref, bool, int, float):
            raise ProgramError(f"`{instr}`: {operand!r} is neither a value nor a real number")
    for name, value in instr.attributes:
        if not _is_literal(value):
            raise ProgramError(f"`{instr}`: {name}={value!r} cannot be written as text")
    if not any(isinstance(o, Ref) for o in instr.operands):
        raise ProgramError(f"`{instr}`: no operand is a value")


def program_of(body: Sequence[Instr], outputs: Iterable[str], types: Mapping[str, TensorType]) -> Program:
    """The program of these instructions; what they or the outputs read and none of them makes are its inputs."""
    outputs, made = tuple(outputs), {out for i in body for out in i.outs}
    read = dict.fromkeys([*(n for i in body for n in i.reads()), *outputs])
    return Program(tuple((n, types[n]) for n in read if n not in made), tuple(body), outputs)


# --- running --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Step:
    op: Callable[..., Any]
    operands: tuple[tuple[bool, Any], ...]
    attributes: dict[str, Any]
    outs: tuple[int, ...]
    dead: tuple[int, ...]  # slots that nothing reads afterwards
    inplace: Callable[..., Any] | None  # the first operand is ours and dies here


@dataclasses.dataclass(frozen=True)
class _Steps:
    steps: tuple[_Step, ...]
    outputs: tuple[int, ...]


def _written(steps: _Steps, inputs: int, *, reuse: bool) -> Run:
    """The steps as a function of the inputs, written out: a loop over them costs half a microsecond for each."""
    space: dict[str, Any] = {"fits": _fits_inplace}
    lines = [f"{''.join(f'v{i}, ' for i in range(inputs))} = tensors"] if inputs else []

    def named(value: Any) -> str:
        name = f"c{len(space)}"
        space[name] = value
        return name

    for step in steps.steps:
        operands = "".join(f"v{o}, " if is_value else f"{named(o)}, " for is_value, o in step.operands)
        attributes = "".join(f"{name}={named(value)}, " for name, value in step.attributes.items())
        called = named(step.op)
        if reuse and step.inplace is not None:
            called = f"({named(step.inplace)} if fits(({operands})) else {called})"
        lines.append(f"{', '.join(f'v{o}' for o in step.outs)} = {called}({operands}{attributes})")
        lines += [f"v{slot} = None" for slot in step.dead]
    lines.append(f"return [{', '.join(f'v{o}' for o in steps.outputs)}]")
    exec("\n    ".join(["def run(tensors):", *lines]), space)  # noqa: S102 - written above
    return space.pop("run")  # type: ignore[no-any-return]


def _schedule(program: Program) -> _Steps:
    slot = {name: i for i, (name, _) in enumerate(program.inputs)}
    last: dict[str, int] = {}
    for i, instr in enumerate(program.body):
        for out in instr.outs:
            slot[out] = len(slot)
            last[out] = i  # a value that nothing reads dies where it is made
        for name in instr.reads():
            last[name] = i
    inputs, keep = {n for n, _ in program.inputs}, set(program.outputs)
    shared = _shared_memory(program)
    replaced = late_trims(program.body, program.outputs)
    steps = []
    for i, instr in enumerate(program.body):
        op = vocabulary.lookup(instr.op)
        candidates = {*instr.reads(), *instr.outs}
        dead = {n for n in candidates if last[n] == i and n not in keep}
        reads = list(instr.reads())
        first = instr.operands[0] if instr.operands else None
        own = isinstance(first, Ref) and first.name in dead - inputs - shared and reads.count(first.name) == 1
        steps.append(
            _Step(
                op=replaced.get(i, op.fn),
                operands=tuple((True, slot[o.name]) if isinstance(o, Ref) else (False, o) for o in instr.operands),
                attributes=dict(instr.attributes),
                outs=tuple(slot[o] for o in instr.outs),
                dead=tuple(slot[n] for n in dead if n not in instr.outs),
                inplace=op.inplace if own else None,
            )
        )
    return _Steps(tuple(steps), tuple(slot[o] for o in program.outputs))


def _shared_memory(program: Program) -> set[str]:
    """Values that may share memory with another one: results and operands of views."""
    shared: set[str] = set()
    for instr in program.body:
        if vocabulary.lookup(instr.op).view:
            shared.update(instr.reads(), instr.outs)
    return shared


def _fits_inplace(operands: Sequence[Any]) -> bool:
    first = operands[0]
    # the result of a tensor with holes is dense, and its layout is planned with
    if not first.is_floating_point() or not torch.ops.aten.is_non_overlapping_and_dense(first):
        return False
    for other in operands[1:]:
        if isinstance(other, Tensor):
            if other.dtype is not first.dtype or other.dim() > first.dim():
                return False
            for own, wanted in zip(reversed(other.shape), reversed(first.shape)):  # noqa: B905 - it has no more dims
                if own != wanted and own != 1:
                    return False
    return True


# --- text -----------------------------------------------------------------------------------------
def _define(defined: set[str], name: str, where: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name in _CONSTANTS or name == "_":
        raise ProgramError(f"{where}: {name!r} cannot be the name of a value")
    if name in defined:
        raise ProgramError(f"{where}: {name} is defined twice")
    defined.add(name)


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_literal, value))
    return (
        value is None
        or type(value) in (bool, int, float, str)
        or (isinstance(value, torch.dtype) and value in DTYPE_NAMES)
    )


_CONSTANTS = {"inf": math.inf, "nan": math.nan, **DTYPES}


#: CPython 3.11 counts how deep the syntax trees of all threads are together, and may find a mismatch
_one_parser = threading.Lock()


def parse_statements(text: str) -> list[ast.stmt]:
    """The statements of ``text``; ProgramError where it is not Python, or too deeply nested to be a program."""
    try:
        with _one_parser:
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"not the text of a program: {error}") from None


def source_of(node: ast.AST) -> str:
    """The text of a node, for a message."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return "something too deeply nested"


def parse_literal(node: ast.expr) -> Any:
    """A literal of the text: numbers, strings, None, tuples, ``inf``, ``nan`` and dtype names."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Tuple(elts=elements):
            return tuple(parse_literal(e) for e in elements)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() as operand):
            value = parse_literal(operand)
            if type(value) in (int, float):
                return -value
    raise ProgramError(f"not a literal: {source_of(node)}")


def _parse_type(node: ast.expr | None) -> TensorType:
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=sizes) if name in DTYPES:
            elements = sizes.elts if isinstance(sizes, ast.Tuple) else [sizes]
            shape = [None if isinstance(e, ast.Name) and e.id == "_" else parse_literal(e) for e in elements]
            if all(s is None or (type(s) is int and s >= 0) for s in shape):
                return TensorType(DTYPES[name], tuple(shape))
    raise ProgramError(f"not a tensor type: {source_of(node) if node else 'nothing'}")


def _parse_instr(node: ast.Assign) -> Instr:
    call = node.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or len(node.targets) != 1:
        raise ProgramError(f"not a call of an operator: {source_of(node)}")
    operands = tuple(
        Ref(a.id) if isinstance(a, ast.Name) and a.id not in _CONSTANTS else parse_literal(a) for a in call.args
    )
    try:
        op = vocabulary.lookup(call.func.id)
        attributes = op.complete({str(k.arg): parse_literal(k.value) for k in call.keywords})
    except (KeyError, TypeError) as error:
        raise ProgramError(f"in `{source_of(node)}`: {error.args[0]}") from None
    return Instr(_names(node.targets[0]), op.name, operands, tuple(attributes.items()))


def _names(node: ast.expr) -> tuple[str, ...]:
    """``a`` or ``a, b``."""
    elements = node.elts if isinstance(node, ast.Tuple) else [node]
    names = tuple(e.id for e in elements if isinstance(e, ast.Name))
    if len(names) < len(elements):
        raise ProgramError(f"not the names of values: {source_of(node)}")
    return names


def parse_function(node: ast.FunctionDef) -> tuple[str, Program]:
    """The name and the program of one parsed ``def``."""
    given = node.args
    if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults or node.decorator_list:
        raise ProgramError(f"{node.name}: a program has plain inputs, no defaults and no decorators")
    inputs = tuple((a.arg, _parse_type(a.annotation)) for a in given.args)
    *statements, last = node.body
    if not isinstance(last, ast.Return) or last.value is None:
        raise ProgramError(f"{node.name}: a program ends with the return of its outputs")
    body: list[Instr] = []
    for statement in statements:
        if not isinstance(statement, ast.Assign):
            raise ProgramError(f"not an assignment: {source_of(statement)}")
        body.append(_parse_instr(statement))
    program = Program(inputs, tuple(body), _names(last.value))
    program.verify()
    return node.name, program
