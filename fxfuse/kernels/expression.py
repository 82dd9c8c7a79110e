"""Pointwise instructions as C++: one struct whose call operator computes an element in a kernel's epilogue.

The functions that the text calls are in ``cuh/pointwise.cuh``, which must precede it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import DTYPE_NAMES, Instr, Operand, Ref, TensorType
from fxfuse.kernels.formulas import COMPARISONS, COPIES, FORMULAS, LOGIC, SELECTIONS, Formula

#: the header, next to this file's ``cuh`` folder's others, that the text needs
HEADER = "pointwise.cuh"
#: the coordinates of an element, in the order of the call operator's parameters
COORDINATES = ("n", "c", "d", "h", "w")

_LOADED_AS = {
    "f32": "float", "f16": "unsigned short", "bf16": "unsigned short", "f64": "double", "b1": "unsigned char",
    "i8": "signed char", "i16": "short", "i32": "int", "i64": "long long", "u8": "unsigned char",
    "u16": "unsigned short", "u32": "unsigned int",
}  # fmt: skip
#: operators that do not compute: they take integers, too
_ANY_DTYPE = {*COMPARISONS, *SELECTIONS}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: integers that a float holds exactly
_SHORT = (torch.int8, torch.int16, torch.uint8, torch.uint16)


class NotEmittable(Exception):  # noqa: N818 - a refusal, not an error
    """An expression that has no C++ form here; the message names the instruction and the reason."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One 8-byte field of the struct. ``kind``: "pointer" to the first element, or "stride" in elements.

    A stride belongs to coordinate ``dim`` (0..4 = n, c, d, h, w) and to dimension ``axis`` of the tensor;
    of a size-1 dimension it must be 0.
    """

    name: str
    value: str
    kind: str
    dim: int | None = None
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Expression:
    """C++ text ``struct <name> {fields; float operator()(float y, int n, int c, int d, int h, int w) const;};``.

    The fields lie in the struct in the order of ``fields``, 8 bytes each, no padding. ``flops`` is a
    rough cost of one element, in additions.
    """

    name: str
    code: str
    fields: tuple[Field, ...]
    flops: int


def emit_expression(
    name: str,
    body: Sequence[Instr],
    *,
    value: str,
    result: str,
    types: Mapping[str, TensorType],
    channels_only: bool = False,
    round_each: bool = False,
) -> Expression:
    """The expression that leads from one element of ``value`` to the element of ``result`` at the same place.

    ``value``: (N, C, *spatial) with one to three spatial dims, float32, float16 or bfloat16. ``body``:
    instructions in order; only those between the two are looked at, and they must be pointwise. Every
    other name that they read is a tensor of ``types``, broadcast against ``value``. Where sizes are not
    known the caller must see to it that they broadcast: each is 1 or that of ``value``.

    Intermediate float16 and bfloat16 values are kept in float32, except at a cast, or everywhere with
    ``round_each``; the result is for the caller to round. ``channels_only`` refuses operands that vary
    with anything but the channel. Raises NotEmittable.
    """
    emitter = _Emitter(value, types, channels_only, round_each)
    for instr in _between(body, value, result):
        emitter.emit(instr)
    returned = emitter.returned(result)
    fields = [f"  {_declaration(f, types)};" for f in emitter.fields]
    code = "\n".join(
        [
            f"struct {name} {{",
            *fields,
            "  FXFUSE_DEVICE float operator()(float y, int n, int c, int d, int h, int w) const {",
            *(f"    {line}" for line in emitter.lines),
            f"    return {returned};",
            "  }",
            "};",
            "",
        ]
    )
    return Expression(name, code, tuple(emitter.fields), emitter.flops)


def _between(body: Sequence[Instr], value: str, result: str) -> list[Instr]:
    """The instructions of ``body`` that ``result`` needs, ``value`` being given."""
    needed, found = {result} - {value}, []
    for instr in reversed(body):
        if needed.isdisjoint(instr.outs):
            continue
        if vocabulary.lookup(instr.op).kind is not vocabulary.Kind.POINTWISE:
            raise NotEmittable(f"`{instr}`: {instr.op} is not pointwise")
        needed = (needed - set(instr.outs)) | (set(instr.reads()) - {value})
        found.append(instr)
    return found[::-1]


def _declaration(field: Field, types: Mapping[str, TensorType]) -> str:
    if field.kind == "stride":
        return f"long long {field.name}"
    return f"const {_LOADED_AS[DTYPE_NAMES[types[field.value].dtype]]}* {field.name}"


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of one element: ``code`` is a float, a double, a bool or a long long, as its dtype asks for."""

    code: str
    dtype: torch.dtype
    rank: int
    varies: bool = False  # it depends on the incoming value
    exact: bool = True  # a float holds it exactly


class _Emitter:
    def __init__(self, value: str, types: Mapping[str, TensorType], channels_only: bool, round_each: bool) -> None:
        self.value, self.types = value, types
        self.channels_only, self.round_each = channels_only, round_each
        incoming = types[value]
        self.shape = incoming.shape
        if not 3 <= len(self.shape) <= 5:
            raise NotEmittable(f"{value}: {incoming} has not one to three spatial dims")
        if incoming.dtype not in _FLOATS:
            raise NotEmittable(f"{value}: an incoming element is float32, float16 or bfloat16, not {incoming}")
        self.values = {value: _Value("y", incoming.dtype, len(self.shape), varies=True)}
        self.loaded: dict[tuple[str, bool], _Value] = {}
        self.fields: list[Field] = []
        self.lines: list[str] = []
        self.flops = 0

    def returned(self, result: str) -> str:
        found = self.values.get(result)
        if found is None or not found.varies:
            raise NotEmittable(f"{result} does not depend on {self.value}")
        if not found.exact:
            raise NotEmittable(f"{result}: a float does not hold every {found.dtype}")
        return self._as(found, torch.float32)

    def emit(self, instr: Instr) -> None:
        """One line: ``const <type> v3 = ...;``"""
        try:
            operands = [self._operand(o, instr, i) for i, o in enumerate(instr.operands)]
            dtype, rank = _infer(instr, operands)
            code, exact = self._formula(instr, operands, dtype)
        except NotEmittable as reason:
            raise NotEmittable(f"`{instr}`: {reason}") from None
        except ValueError as error:
            raise NotEmittable(f"`{instr}`: torch refuses it: {error}") from None
        if self.round_each and dtype in (torch.float16, torch.bfloat16):
            code = f"fxfuse::pw::to_{DTYPE_NAMES[dtype]}({code})"
        local = f"v{len(self.lines)}"
        self.lines.append(f"const {_c_type(dtype)} {local} = {code};")
        varies = any(isinstance(o, _Value) and o.varies for o in operands)
        self.values[instr.outs[0]] = _Value(local, dtype, rank, varies, exact)

    # --- operands -----------------------------------------------------------------------------------
    def _operand(self, operand: Operand, instr: Instr, position: int) -> _Value | float | int | bool | None:
        if not isinstance(operand, Ref):
            return operand
        per_channel = instr.op == "prelu" and position == 1
        if operand.name in self.values:
            found = self.values[operand.name]
            if per_channel and found.rank > 0:
                raise NotEmittable(f"{operand.name} is computed here, and not in the place of a channel")
            return found
        if operand.name not in self.types:
            raise NotEmittable(f"the type of {operand.name} is not known")
        key = operand.name, per_channel
        if key not in self.loaded:
            self.loaded[key] = self._load(operand.name, per_channel)
        return self.loaded[key]

    def _load(self, name: str, per_channel: bool) -> _Value:
        """Fields for the tensor ``name``, and its element at the place of the value's."""
        kind = self.types[name]
        dtype_name = DTYPE_NAMES.get(kind.dtype, "")
        if dtype_name not in _LOADED_AS:
            raise NotEmittable(f"{name}: no elements of {kind.dtype} are read here")
        rank, own = len(self.shape), len(kind.shape)
        if own > rank:
            raise NotEmittable(f"{name}: {kind} has more dims than {self.value}")
        number = sum(f.kind == "pointer" for f in self.fields)
        fields, terms = [Field(f"p{number}", name, "pointer")], []
        for axis, size in enumerate(kind.shape):
            place = 1 if per_channel else rank - own + axis  # the dim of the value
            if size == 1:
                continue
            if size is not None and self.shape[place] not in (size, None):
                raise NotEmittable(f"{name}: {kind} does not broadcast to {self.types[self.value]}")
            dim = place if place < 2 else 5 - rank + place
            if self.channels_only and dim != 1:
                raise NotEmittable(f"{name}: {kind} varies with more than the channel")
            fields.append(Field(f"s{number}{COORDINATES[dim]}", name, "stride", dim, axis))
            terms.append(f"{COORDINATES[dim]} * {fields[-1].name}")
        self.fields += fields
        local = f"x{number}"
        place_text = " + ".join([f"p{number}", *terms])
        self.lines.append(f"const {_c_type(kind.dtype)} {local} = fxfuse::pw::load_{dtype_name}({place_text});")
        exact = kind.dtype.is_floating_point and kind.dtype is not torch.float64
        return _Value(local, kind.dtype, own, exact=exact or kind.dtype in (*_SHORT, torch.bool))

    def _as(self, operand: _Value | float | int | bool | None, dtype: torch.dtype, rounded: bool = False) -> str:
        """The operand as C++ text of ``dtype``'s type; ``rounded``: a number as ``dtype`` holds it, not float32."""
        if not isinstance(operand, _Value):
            assert operand is not None
            return literal(operand, dtype if rounded or not dtype.is_floating_point else torch.float32)
        want, have = _c_type(dtype), _c_type(operand.dtype)
        if want == have:
            return operand.code
        return f"({operand.code} != 0)" if want == "bool" else f"({want}){operand.code}"

    # --- formulas -----------------------------------------------------------------------------------
    def _formula(
        self, instr: Instr, operands: Sequence[_Value | float | int | bool | None], dtype: torch.dtype
    ) -> tuple[str, bool]:
        """The right side of the line, and whether a float holds its value exactly."""
        op, attributes = instr.op, dict(instr.attributes)
        first = operands[0]
        if op in COPIES:
            assert isinstance(first, _Value)
            return first.code, first.exact
        if op == "cast":
            assert isinstance(first, _Value)
            return _cast(first, dtype), first.exact or dtype in (*_FLOATS, *_SHORT, torch.bool)
        if op in LOGIC:
            self.flops += 1
            return LOGIC[op].format(*(self._as(o, torch.bool) for o in operands)), True
        compute = _common(operands) if op in COMPARISONS else dtype
        if op in ("isnan", "isinf", "isfinite"):
            assert isinstance(first, _Value)
            compute = first.dtype if first.dtype.is_floating_point else torch.float32
        if compute is torch.float64:
            raise NotEmittable("float64 arithmetic")
        if not compute.is_floating_point and op not in _ANY_DTYPE:
            raise NotEmittable(f"arithmetic of {compute}")
        formula = FORMULAS[op]
        plain: Formula = formula(attributes, operands) if callable(formula) else formula
        self.flops += plain.cost
        selecting = plain.rounds or op in _ANY_DTYPE
        texts = []
        for i, operand in enumerate(operands):
            if operand is None:
                texts.append("")
            elif i == SELECTIONS.get(op):
                texts.append(self._as(operand, torch.bool))
            else:
                texts.append(self._as(operand, compute, rounded=selecting))
        numbers = {
            k: literal(v, compute if plain.rounds else torch.float32)
            for k, v in {**attributes, **plain.extra}.items()
            if isinstance(v, (int, float))
        }
        exact = dtype in (*_FLOATS, *_SHORT, torch.bool) or all(
            o.exact if isinstance(o, _Value) else o is None or _is_short(o) for o in operands
        )
        return plain.text.format(*texts, **numbers), exact


def _cast(operand: _Value, dtype: torch.dtype) -> str:
    code, name = operand.code, DTYPE_NAMES.get(dtype, "")
    if name not in _LOADED_AS:
        raise NotEmittable(f"no elements of {dtype} are made here")
    if dtype is torch.bool:
        return f"({code} != 0)"
    if dtype in (torch.float16, torch.bfloat16):
        return f"fxfuse::pw::to_{name}((float){code})"
    if dtype.is_floating_point:
        return f"({_c_type(dtype)}){code}"
    if dtype in (torch.int64, torch.int32):
        return f"(long long)({_LOADED_AS[name]}){code}"
    return f"(long long)({_LOADED_AS[name]})(long long){code}"


def _c_type(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    if dtype is torch.float64:
        return "double"
    return "float" if dtype.is_floating_point else "long long"


def _is_short(number: float) -> bool:
    return abs(number) <= 1 << 24


# --- types and numbers ----------------------------------------------------------------------------
def _infer(instr: Instr, operands: Sequence[_Value | float | int | bool | None]) -> tuple[torch.dtype, int]:
    """dtype and rank of the result, as torch's promotion has it."""
    given = [_stand_in(o.dtype, o.rank) if isinstance(o, _Value) else o for o in operands]
    try:
        with torch.no_grad():
            made: Tensor = vocabulary.lookup(instr.op)(*given, **dict(instr.attributes))
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return made.dtype, made.dim()


@functools.lru_cache(maxsize=256)
def _stand_in(dtype: torch.dtype, rank: int) -> Tensor:
    return torch.empty((1,) * rank, dtype=dtype, device="meta")


def _common(operands: Sequence[_Value | float | int | bool | None]) -> torch.dtype:
    """The dtype in which two operands are compared."""
    a, b = (_stand_in(o.dtype, o.rank) if isinstance(o, _Value) else o for o in operands)
    assert a is not None and b is not None
    return torch.result_type(a, b)


def literal(number: float | int | bool, dtype: torch.dtype) -> str:
    """``number`` as ``dtype`` holds it, as a C++ constant that is read back to the same bits."""
    if dtype is torch.bool:
        return "true" if number else "false"
    if not dtype.is_floating_point:
        if number == -(1 << 63):
            return f"({int(number) + 1}LL - 1)"
        return f"({int(number)}LL)" if number < 0 else f"{int(number)}LL"
    held = float(torch.tensor(number, dtype=torch.int64 if type(number) is int else torch.float64).to(dtype))
    if math.isnan(held):
        return "fxfuse::pw::not_a_number()"
    if math.isinf(held):
        return "fxfuse::pw::infinity()" if held > 0 else "(-fxfuse::pw::infinity())"
    for digits in range(1, 10):
        text = f"{held:.{digits}g}"
        if float(torch.tensor(float(text), dtype=torch.float32)) == held:
            break
    if not any(mark in text for mark in ".en"):
        text += ".0"
    return f"({text}f)" if text.startswith("-") else f"{text}f"
