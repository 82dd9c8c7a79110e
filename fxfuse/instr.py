"""Values and instructions: what a program is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxfuse import vocabulary

DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
    "b1": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorType:
    """dtype and shape of a tensor; a size of None is not known."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("_" if s is None else str(s) for s in self.shape)
        return f"{DTYPE_NAMES[self.dtype]}[{sizes or '()'}]"

    @functools.cached_property
    def _known(self) -> bool:
        return None not in self.shape

    def mismatch(self, tensor: Tensor) -> str | None:
        """Why ``tensor`` is not of this type, or None."""
        if self._known and tensor.shape == self.shape and tensor.dtype is self.dtype:
            return None
        if tensor.dtype is not self.dtype:
            return f"dtype {tensor.dtype} where {self.dtype} is expected"
        if len(self.shape) != tensor.dim() or any(
            s is not None and s != t for s, t in zip(self.shape, tensor.shape, strict=True)
        ):
            return f"shape {tuple(tensor.shape)} where {self} is expected"
        return None


@dataclasses.dataclass(frozen=True)
class Ref:
    """An operand that is a value of the program."""

    name: str


Operand = Ref | float | int | bool | None


@dataclasses.dataclass(frozen=True, eq=False)
class Instr:
    """``outs = op(*operands, **attributes)``; the attributes are complete and in the operator's order.

    Equal where written alike: 1, 1.0 and True are three operands, and NaN is equal to itself.
    """

    outs: tuple[str, ...]
    op: str
    operands: tuple[Operand, ...]
    attributes: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        defaults = vocabulary.lookup(self.op).attributes
        given = [show(o) for o in self.operands]
        given += [f"{k}={show(v)}" for k, v in self.attributes if show(v) != show(defaults.get(k))]
        return f"{', '.join(self.outs)} = {self.op}({', '.join(given)})"

    def _key(self) -> Any:
        return self.outs, self.op, [*map(show, self.operands)], [(k, show(v)) for k, v in self.attributes]

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Instr) else NotImplemented

    def __hash__(self) -> int:
        return hash(repr(self._key()))

    def reads(self) -> Iterator[str]:
        return (o.name for o in self.operands if isinstance(o, Ref))


def show(value: Any) -> str:
    """An operand or a literal as the text of a program spells it."""
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, tuple):
        return "(" + ", ".join(show(v) for v in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
