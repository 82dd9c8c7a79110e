"""Operators of a program taken apart one by one: the values so far, and what has been made of them. Pure."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxfuse import vocabulary
from fxfuse.instr import Instr, Operand, Ref, TensorType
from fxfuse.program import Program

#: dtypes whose statistics kernels gather
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def affine_steps(parameters: Sequence[Operand]) -> list[tuple[str, Operand]]:
    """``* weight + bias``, as far as there are any."""
    return [(op, o) for op, o in zip(("mul", "add"), parameters, strict=False) if o is not None]


class Splitter:
    """Makes the body of another program.

    ``types``, ``gathered``: as of :func:`~fxfuse.kernels.stages.norms.split_norms`.
    """

    def __init__(self, program: Program, types: Mapping[str, TensorType], gathered: Callable[[str], bool]) -> None:
        self.types, self.gathered = types, gathered
        self.taken = {*types}
        self.readers = collections.Counter(n for i in program.body for n in i.reads())
        self.readers.update(program.outputs)
        self.casts = {i.outs[0]: i for i in program.body if i.op == "cast"}
        self.body: list[Instr] = []
        #: value -> the value and the steps per channel that it is made of
        self.mapped: dict[str, tuple[str, tuple[tuple[str, Operand], ...]]] = {}
        self.made: dict[tuple[object, ...], tuple[str, ...]] = {}

    def fits(self, name: str, wanted: Callable[[str], bool]) -> bool:
        source = self.mapped.get(name, (name,))[0]
        kind = self.types[source]
        known = 3 <= len(kind.shape) <= 5 and all(kind.shape)
        return known and kind.dtype in _DTYPES and wanted(source)

    def call(self, op: str, *operands: Operand, outs: tuple[str, ...] | None = None, **attributes: Any) -> str:
        """Add an instruction; the name of its first result."""
        found = vocabulary.lookup(op)
        if outs is None:
            outs = tuple(self._name(f"{op}{len(self.body)}") for _ in range(found.outputs))
        self.body.append(Instr(outs, op, operands, tuple(found.complete(attributes).items())))
        return outs[0]

    def _name(self, wanted: str) -> str:
        while wanted in self.taken:
            wanted += "_"
        self.taken.add(wanted)
        return wanted

    def statistics(self, value: str, *, batch: bool, groups: int, eps: float = 0.0) -> tuple[str, ...]:
        """Names of the mean, the variance and the scale."""
        return self.once("statistics", value, batch=batch, groups=groups, eps=eps)

    def once(self, op: str, value: str, **attributes: Any) -> tuple[str, ...]:
        key = op, value, *attributes.values()
        if key not in self.made:
            self.call(op, Ref(value), **attributes)
            self.made[key] = self.body[-1].outs
        return self.made[key]

    def per_channel(self, operand: Operand, value: str) -> Operand:
        """A vector of channels in the place of ``value``'s channels."""
        if not isinstance(operand, Ref):
            return operand
        spatial, cast = len(self.types[value].shape) - 2, self.casts.get(operand.name)
        source = operand if cast is None else cast.operands[0]  # a view of an input is no operator's affair
        made = self.call("reshape", source, shape=(-1, *(1 for _ in range(spatial))))
        return Ref(made if cast is None else self.call("cast", Ref(made), **dict(cast.attributes)))

    def affine(self, instr: Instr, value: str, mean: str, scale: str, weight: Operand, bias: Operand) -> None:
        """``(value - mean) * scale * weight + bias``, as the first result of ``instr``."""
        steps = [("sub", Ref(mean)), ("mul", Ref(scale)), *affine_steps((weight, bias))]
        if all(not isinstance(o, Ref) or self._per_channel(o, value) for _, o in steps):
            self.map(value, steps, instr.outs[0])
        self.finish(value, steps, instr.outs[0])

    def map(self, value: str, steps: Sequence[tuple[str, Operand]], out: str) -> None:
        """Remember that ``out`` is made of ``value`` by these steps."""
        source, before = self.mapped.get(value, (value, ()))
        self.mapped[out] = source, (*before, *steps)

    def _per_channel(self, operand: Ref, value: str) -> bool:
        """Whether an operand of ``value`` is the same all over a channel: what was made here is."""
        if operand.name not in self.types:
            return True
        spatial = len(self.types[value].shape) - 2
        return all(s == 1 for s in self.types[operand.name].shape[-spatial:])

    def finish(self, value: str, steps: Sequence[tuple[str, Operand]], out: str) -> None:
        """The steps, in float32 at least, and rounded once."""
        narrow = self.types[out].dtype is not torch.float32
        for i, (op, operand) in enumerate(steps):
            last = i == len(steps) - 1 and not narrow
            value = self.call(op, Ref(value), operand, outs=(out,) if last else None)
        if narrow:
            self.call("cast", Ref(value), outs=(out,), dtype=self.types[out].dtype)

    def follow(self, instr: Instr) -> None:
        """Numbers that a value made of steps meets are steps, too."""
        if instr.op not in ("add", "sub", "mul", "div") or len(instr.operands) != 2:
            return
        first, second = instr.operands
        if isinstance(first, Ref) and first.name in self.mapped and isinstance(second, (int, float)):
            same = self.types[first.name] == self.types[instr.outs[0]]
            if same and self.types[first.name].dtype.is_floating_point:
                self.map(first.name, [(instr.op, second)], instr.outs[0])

    def reduced(self, instr: Instr, value: str, made: str) -> bool:
        """What a reduction makes, of a number that every channel has, (N, C, 1, ...) or (1, C, 1, ...)."""
        kind, (out,) = self.types[value], instr.outs
        shape, narrow = tuple(s or 0 for s in self.types[out].shape), kind.dtype is not torch.float32
        alike = 1 in dict(instr.attributes).get("dims", ())  # all channels have the same one
        if alike:
            made = self.call("reshape", Ref(made), shape=(math.prod(shape), self.channels(value)))
            made = self.call("crop", Ref(made), extent=(1,))
        flat = self.call("reshape", Ref(made), shape=shape, outs=None if narrow or alike else (out,))
        if narrow:
            self.call("cast", Ref(flat), outs=(out,), dtype=kind.dtype)
        elif alike:
            self.call("contiguous", Ref(flat), outs=(out,))
        return True

    def vector(self, source: str, factor: float, out: str) -> None:
        """A statistic of the batch times ``factor`` as ``out``, (C,)."""
        kind = self.types[out]
        if factor != 1.0:
            source = self.call("mul", Ref(source), factor)
        narrow = kind.dtype is not torch.float32
        flat = self.call("reshape", Ref(source), shape=kind.shape, outs=None if narrow else (out,))
        if narrow:
            self.call("cast", Ref(flat), outs=(out,), dtype=kind.dtype)

    def over(self, instr: Instr, value: str, dims: tuple[int, ...]) -> dict[str, Any] | None:
        """Which statistics are those over ``dims``, all spatial ones among them, as a reduction makes them."""
        kind = self.types[value]
        if not {*range(2, len(kind.shape))} <= {*dims} or self.types[instr.outs[0]].dtype is not kind.dtype:
            return None
        return {"batch": 0 in dims, "groups": 1 if 1 in dims else self.channels(value)}

    def channels(self, value: str) -> int:
        return self.types[value].shape[1] or 0

    def size(self, value: str, dims: Sequence[int]) -> int:
        """Elements along these dims."""
        return math.prod(self.types[value].shape[d] or 0 for d in dims)

    def count(self, value: str, *, batch: bool) -> int:
        """Elements that a channel's statistics are of."""
        n, _, *spatial = (s or 0 for s in self.types[value].shape)
        return math.prod(spatial) * (n if batch else 1)
