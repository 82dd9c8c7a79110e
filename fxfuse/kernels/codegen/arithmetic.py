"""Pointwise operators as lines of C++ over values of one element each, with torch's type promotion and rounding.

What the lines call is in ``cuh/pointwise.cuh``, which must precede them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import DTYPE_NAMES, Instr
from fxfuse.kernels.codegen.formulas import COMPARISONS, COPIES, FORMULAS, LOGIC, OF_SMALL, SELECTIONS, Formula

#: the header, next to this file's ``cuh`` folder's others, that the text needs
HEADER = "pointwise.cuh"
#: C++ types of elements in memory, as ``load_*`` and ``store_*`` take them
STORED_AS = {
    "f32": "float", "f16": "unsigned short", "bf16": "unsigned short", "f64": "double", "b1": "unsigned char",
    "i8": "signed char", "i16": "short", "i32": "int", "i64": "long long", "u8": "unsigned char",
    "u16": "unsigned short", "u32": "unsigned int",
}  # fmt: skip
#: what divides many elements by one value
DIVISOR = "fxfuse::pw::Divisor"
#: operators that do not compute: they take integers, too
_ANY_DTYPE = {*COMPARISONS, *SELECTIONS}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: integers that a float holds exactly
_SHORT = (torch.int8, torch.int16, torch.uint8, torch.uint16)


class NotEmittable(Exception):  # noqa: N818 - a refusal, not an error
    """An operator or a value that has no C++ form here; the message names the instruction and the reason."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of one element: ``code`` is a float, a double, a bool or a long long, as its dtype asks for."""

    code: str
    dtype: torch.dtype
    rank: int
    varies: bool = False  # it depends on the incoming value
    exact: bool = True  # a float holds it exactly
    small: bool = False  # it is at most formulas.SMALL_NUMBER in size


Given = Value | float | int | bool | None


class Arithmetic:
    """Lines that compute values, one per operator. ``flops`` is a rough cost of them, in additions.

    ``round_each``: every float16 and bfloat16 value is rounded as torch rounds it; else only those of a cast.
    """

    def __init__(self, *, round_each: bool) -> None:
        self.round_each = round_each
        self.lines: list[str] = []
        self.flops = 0

    def compute(self, instr: Instr, operands: Sequence[Given]) -> Value:
        """One line: ``const <type> v3 = ...;``. Raises NotEmittable."""
        try:
            dtype, rank = _infer(instr, operands)
            code, exact = self._formula(instr, operands, dtype)
        except NotEmittable as reason:
            raise NotEmittable(f"`{instr}`: {reason}") from None
        except ValueError as error:
            raise NotEmittable(f"`{instr}`: torch refuses it: {error}") from None
        if self.round_each and dtype in (torch.float16, torch.bfloat16):
            code = f"fxfuse::pw::to_{DTYPE_NAMES[dtype]}({code})"
        local = f"v{len(self.lines)}"
        self.lines.append(f"const {c_type(dtype)} {local} = {code};")
        varies = any(isinstance(o, Value) and o.varies for o in operands)
        return Value(local, dtype, rank, varies, exact)

    def load(self, local: str, address: str, dtype: torch.dtype, rank: int) -> Value:
        """One line: the element at ``address``. Raises NotEmittable."""
        name = stored_name(dtype)
        self.lines.append(f"const {c_type(dtype)} {local} = fxfuse::pw::load_{name}({address});")
        exact = dtype.is_floating_point and dtype is not torch.float64
        return Value(local, dtype, rank, exact=exact or dtype in (*_SHORT, torch.bool))

    def cast(self, operand: Given, dtype: torch.dtype, rounded: bool = False) -> str:
        """The operand as C++ text of ``dtype``'s type; ``rounded``: a number as ``dtype`` holds it, not float32."""
        if not isinstance(operand, Value):
            assert operand is not None
            return self.number(operand, dtype if rounded or not dtype.is_floating_point else torch.float32)
        if self.round_each and dtype in (torch.float16, torch.bfloat16) and operand.dtype is not dtype:
            return _cast(operand, dtype)  # torch casts what it promotes, and then computes
        want, have = c_type(dtype), c_type(operand.dtype)
        if want == have:
            return operand.code
        return f"({operand.code} != 0)" if want == "bool" else f"({want}){operand.code}"

    def number(self, number: float | int | bool, dtype: torch.dtype) -> str:
        """An operand that is a number, as ``dtype`` holds it."""
        return literal(number, dtype)

    # --- formulas -----------------------------------------------------------------------------------
    def _formula(self, instr: Instr, operands: Sequence[Given], dtype: torch.dtype) -> tuple[str, bool]:
        """The right side of the line, and whether a float holds its value exactly."""
        op, attributes = instr.op, dict(instr.attributes)
        first = operands[0]
        if op in COPIES:
            assert isinstance(first, Value)
            return first.code, first.exact
        if op == "cast":
            assert isinstance(first, Value)
            return _cast(first, dtype), first.exact or dtype in (*FLOATS, *_SHORT, torch.bool)
        if op in LOGIC:
            self.flops += 1
            return LOGIC[op].format(*(self.cast(o, torch.bool) for o in operands)), True
        compute = _common(operands) if op in COMPARISONS else dtype
        if op in ("isnan", "isinf", "isfinite"):
            assert isinstance(first, Value)
            compute = first.dtype if first.dtype.is_floating_point else torch.float32
        if compute is torch.float64:
            raise NotEmittable("float64 arithmetic")
        if not compute.is_floating_point and op not in _ANY_DTYPE:
            raise NotEmittable(f"arithmetic of {compute}")
        small = op in OF_SMALL and isinstance(first, Value) and first.small
        formula = OF_SMALL[op] if small else FORMULAS[op]
        plain: Formula = formula(attributes, operands) if callable(formula) else formula
        self.flops += plain.cost
        selecting = plain.rounds or op in _ANY_DTYPE
        texts = []
        for i, operand in enumerate(operands):
            if operand is None:
                texts.append("")
            elif i == SELECTIONS.get(op):
                texts.append(self.cast(operand, torch.bool))
            else:
                texts.append(self.cast(operand, compute, rounded=selecting))
        numbers = {
            k: literal(v, compute if plain.rounds else torch.float32)
            for k, v in {**attributes, **plain.extra}.items()
            if isinstance(v, (int, float))
        }
        exact = dtype in (*FLOATS, *_SHORT, torch.bool) or all(
            o.exact if isinstance(o, Value) else o is None or _is_short(o) for o in operands
        )
        return plain.text.format(*texts, **numbers), exact


def _cast(operand: Value, dtype: torch.dtype) -> str:
    code, name = operand.code, stored_name(dtype)
    if dtype is torch.bool:
        return f"({code} != 0)"
    if dtype in (torch.float16, torch.bfloat16):
        return f"fxfuse::pw::to_{name}((float){code})"
    if dtype.is_floating_point:
        return f"({c_type(dtype)}){code}"
    if dtype in (torch.int64, torch.int32):
        return f"(long long)({STORED_AS[name]}){code}"
    return f"(long long)({STORED_AS[name]})(long long){code}"


def stored_name(dtype: torch.dtype) -> str:
    """The name of a dtype whose elements are read and stored; NotEmittable for others."""
    name = DTYPE_NAMES.get(dtype, "")
    if name not in STORED_AS:
        raise NotEmittable(f"no elements of {dtype} are read or made here")
    return name


def c_type(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    if dtype is torch.float64:
        return "double"
    return "float" if dtype.is_floating_point else "long long"


def _is_short(number: float) -> bool:
    return abs(number) <= 1 << 24


# --- types and numbers ----------------------------------------------------------------------------
def _infer(instr: Instr, operands: Sequence[Given]) -> tuple[torch.dtype, int]:
    """dtype and rank of the result, as torch's promotion has it."""
    kinds = tuple((o.dtype, o.rank) if isinstance(o, Value) else o for o in operands)
    # 1, 1.0 and True are equal, and not the same: their texts are
    return _inferred(instr.op, kinds, instr.attributes, repr((kinds, instr.attributes)), torch.get_default_dtype())


@functools.lru_cache(maxsize=4096)
def _inferred(
    op: str, kinds: tuple[Any, ...], attributes: tuple[tuple[str, Any], ...], _texts: str, _default: torch.dtype
) -> tuple[torch.dtype, int]:
    given = [_stand_in(*k) if isinstance(k, tuple) else k for k in kinds]
    try:
        with torch.no_grad():
            made: Tensor = vocabulary.lookup(op)(*given, **dict(attributes))
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return made.dtype, made.dim()


@functools.lru_cache(maxsize=256)
def _stand_in(dtype: torch.dtype, rank: int) -> Tensor:
    return torch.empty((1,) * rank, dtype=dtype, device="meta")


def _common(operands: Sequence[Given]) -> torch.dtype:
    """The dtype in which two operands are compared."""
    a, b = (_stand_in(o.dtype, o.rank) if isinstance(o, Value) else o for o in operands)
    assert a is not None and b is not None
    return torch.result_type(a, b)


def held(number: float | int | bool, dtype: torch.dtype) -> float:
    """``number`` as ``dtype``, of floats, holds it."""
    return float(torch.tensor(number, dtype=torch.int64 if type(number) is int else torch.float64).to(dtype))


def literal(number: float | int | bool, dtype: torch.dtype) -> str:
    """``number`` as ``dtype`` holds it, as a C++ constant that is read back to the same bits."""
    if dtype is torch.bool:
        return "true" if number else "false"
    if not dtype.is_floating_point:
        if number == -(1 << 63):
            return f"({int(number) + 1}LL - 1)"
        return f"({int(number)}LL)" if number < 0 else f"{int(number)}LL"
    value = held(number, dtype)
    if math.isnan(value):
        return "fxfuse::pw::not_a_number()"
    if math.isinf(value):
        return "fxfuse::pw::infinity()" if value > 0 else "(-fxfuse::pw::infinity())"
    for digits in range(1, 10):
        text = f"{value:.{digits}g}"
        if float(torch.tensor(float(text), dtype=torch.float32)) == value:
            break
    if not any(mark in text for mark in ".en"):
        text += ".0"
    return f"({text}f)" if text.startswith("-") else f"{text}f"
