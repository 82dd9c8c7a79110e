"""Pointwise instructions as C++: one struct whose call operator computes an element in a kernel's epilogue.

The functions that the text calls are in ``cuh/pointwise.cuh``, which must precede it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import torch

from fxfuse import vocabulary
from fxfuse.instr import DTYPE_NAMES, Instr, Operand, Ref, TensorType
from fxfuse.kernels.codegen.arithmetic import DIVISOR, FLOATS, STORED_AS, Arithmetic, Given, NotEmittable, Value, c_type
from fxfuse.kernels.codegen.monotone import condition

#: elements at least for which a thread has something ahead: the positions of a channel in its accumulators
SHARED_BY = 4
#: cost of dividing one of many elements by the same value: ``pw::Divisor`` in ``cuh/pointwise.cuh``
DIVIDED = 3
#: the coordinates of an element, in the order of the call operator's parameters
COORDINATES = ("n", "c", "d", "h", "w")


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
    rough cost of one element, in additions, with its part of what is had ahead. What does not depend on ``y`` nor
    on the place within a channel can be had ahead, for many elements: ``channel(n, c)`` is it, a ``Channel``, which
    the operator takes in front of ``y``.
    ``local``: the struct reads operands that differ within a channel, so that the place must be one of the tensor.
    ``monotone``: in a channel the result only grows with ``y``, or only falls, where ``steady(channel)`` holds;
    ``always``: that holds for every channel.
    """

    name: str
    code: str
    fields: tuple[Field, ...]
    flops: int
    monotone: bool = False
    always: bool = False

    def renamed(self, name: str) -> Expression:
        """The same as a struct of another name."""
        return dataclasses.replace(self, name=name, code=self.code.replace(_head(self.name), _head(name)))


def emit_expression(
    name: str,
    body: Sequence[Instr],
    *,
    value: str,
    result: str,
    types: Mapping[str, TensorType],
    small_numbers: Collection[str] = (),
    channels_only: bool = False,
    round_each: bool = False,
) -> Expression:
    """The expression that leads from one element of ``value`` to the element of ``result`` at the same place.

    ``value``: (N, C, *spatial) with one to three spatial dims, float32, float16 or bfloat16. ``body``:
    instructions in order; only those between the two are looked at, and they must be pointwise. Every
    other name that they read is a tensor of ``types``, broadcast against ``value``. Where sizes are not
    known the caller must see to it that they broadcast: each is 1 or that of ``value``.

    Intermediate float16 and bfloat16 values are kept in float32, except at a cast, or everywhere with
    ``round_each``; the result is for the caller to round. ``small_numbers``: values known to hold
    only such, for which there are cheaper formulas. ``channels_only`` refuses operands that vary with
    anything but the channel. Raises NotEmittable.
    """
    emitter = _Emitter(value, types, small_numbers, channels_only, round_each=round_each)
    for instr in _between(body, value, result):
        emitter.emit(instr)
    returned = emitter.returned(result)
    monotone, conditions = emitter.conditions is not None, emitter.conditions or []
    return Expression(
        name,
        _struct(name, emitter, returned),
        tuple(emitter.fields),
        emitter.flops + -(-emitter.flops_ahead // SHARED_BY),
        monotone=monotone,
        always=monotone and not conditions,
    )


def _head(name: str) -> str:
    return f"struct {name} {{"


def _struct(name: str, emitter: _Emitter, returned: str) -> str:
    ahead, rest = emitter.parts()
    place = "int n, int c, int d, int h, int w"
    conditions = " && ".join(emitter.conditions or [])

    def known(*text: str) -> list[str]:
        """Of what is had ahead that which ``text`` reads."""
        read = set(re.findall(r"\w+", " ".join(text)))
        return [f"    const {kind} {name} = k.{name};" for name, kind in emitter.ahead.items() if name in read]

    steady = (
        [
            "  FXFUSE_DEVICE bool steady(const Channel& k) const {",
            *known(conditions),
            f"    return {conditions};",
            "  }",
        ]
        if conditions
        else []
    )
    return "\n".join([
        _head(name),
        *(f"  {_declaration(f, emitter.types)};" for f in emitter.fields),
        f"  static constexpr bool local = {str(emitter.local).lower()};",
        "  struct Channel {",
        *(f"    {kind} {name};" for name, kind in emitter.ahead.items()),
        "  };",
        "  FXFUSE_DEVICE Channel channel(int n, int c) const {",
        *(f"    {line}" for line in ahead),
        f"    return {{{', '.join(emitter.ahead)}}};",
        "  }",
        *steady,
        f"  FXFUSE_DEVICE float operator()(const Channel& k, float y, {place}) const {{",
        *known(*rest, returned),
        *(f"    {line}" for line in rest),
        f"    return {returned};",
        "  }",
        f"  FXFUSE_DEVICE float operator()(float y, {place}) const {{",
        "    return (*this)(channel(n, c), y, n, c, d, h, w);",
        "  }",
        "};",
        "",
    ])  # fmt: skip


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
    return f"const {STORED_AS[DTYPE_NAMES[types[field.value].dtype]]}* {field.name}"


class _Emitter(Arithmetic):
    def __init__(
        self,
        value: str,
        types: Mapping[str, TensorType],
        small_numbers: Collection[str],
        channels_only: bool,
        *,
        round_each: bool,
    ) -> None:
        super().__init__(round_each=round_each)
        self.value, self.types, self.channels_only = value, types, channels_only
        self.small_numbers = small_numbers
        incoming = types[value]
        self.shape = incoming.shape
        if not 3 <= len(self.shape) <= 5:
            raise NotEmittable(f"{value}: {incoming} has not one to three spatial dims")
        if incoming.dtype not in FLOATS:
            raise NotEmittable(f"{value}: an incoming element is float32, float16 or bfloat16, not {incoming}")
        self.values = {value: Value("y", incoming.dtype, len(self.shape), varies=True, small=value in small_numbers)}
        self.loaded: dict[tuple[str, bool], Value] = {}
        self.fields: list[Field] = []
        self.made: list[str] = []  # what every line makes
        self.late = {"y"}  # what differs within a channel
        self.ahead: dict[str, str] = {}  # what does not, and is read by what does: its C++ type
        self.flops_ahead = 0
        self.local = False
        self.conditions: list[str] | None = []  # for the result to be monotone in the value; None: it is not

    def parts(self) -> tuple[list[str], list[str]]:
        """The lines that compute what does not differ within a channel, and the others."""
        lines = list(zip(self.made, self.lines, strict=True))
        ahead = [line for made, line in lines if made not in self.late]
        return ahead, [line for made, line in lines if made in self.late]

    def returned(self, result: str) -> str:
        found = self.values.get(result)
        if found is None or not found.varies:
            raise NotEmittable(f"{result} does not depend on {self.value}")
        if not found.exact:
            raise NotEmittable(f"{result}: a float does not hold every {found.dtype}")
        return self.cast(found, torch.float32)

    def emit(self, instr: Instr) -> None:
        try:
            operands = [self._operand(o, instr, i) for i, o in enumerate(instr.operands)]
        except NotEmittable as reason:
            raise NotEmittable(f"`{instr}`: {reason}") from None
        (out,) = instr.outs
        before = self.flops
        made = self.values[out] = dataclasses.replace(self.compute(instr, operands), small=out in self.small_numbers)
        self.made.append(made.code)
        read = [o for o in operands if isinstance(o, Value)]
        if all(o.code not in self.late for o in read):
            self.flops_ahead, self.flops = self.flops_ahead + self.flops - before, before
            return
        self._bend(instr, operands)
        self.late.add(made.code)
        self.ahead |= {o.code: c_type(o.dtype) for o in read if o.code not in self.late}
        if instr.op == "div" and len(read) == 2 and read[0].code in self.late and read[1].code not in self.late:
            self._divide(made, *read)
            self.flops_ahead, self.flops = self.flops_ahead + self.flops - before, before + DIVIDED

    def _divide(self, made: Value, of: Value, by: Value) -> None:
        """Divide many elements by one and the same value as that is done fast."""
        name = f"by_{made.code}"
        self.lines[-1] = f"const float {made.code} = {name}({self.cast(of, torch.float32)});"
        self.lines.append(f"const {DIVISOR} {name}({self.cast(by, torch.float32)});")
        self.made.append(name)
        self.ahead[name] = DIVISOR

    def _bend(self, instr: Instr, operands: Sequence[Given]) -> None:
        """What an instruction on the way of the value asks for, so that the result stays monotone in it."""
        late = [i for i, o in enumerate(operands) if isinstance(o, Value) and o.code in self.late]
        found = condition(instr, late[0], operands) if len(late) == 1 else None
        if found is None or self.conditions is None:
            self.conditions = None
        elif found:
            self.conditions.append(found)

    # --- operands -----------------------------------------------------------------------------------
    def _operand(self, operand: Operand, instr: Instr, position: int) -> Given:
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

    def _load(self, name: str, per_channel: bool) -> Value:
        """Fields for the tensor ``name``, and its element at the place of the value's."""
        kind = self.types[name]
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
        made = self.load(f"x{number}", " + ".join([f"p{number}", *terms]), kind.dtype, own)
        made = dataclasses.replace(made, small=name in self.small_numbers)
        self.made.append(made.code)
        if any(f.dim is not None and f.dim > 1 for f in fields):
            self.local = True
            self.late.add(made.code)
        return made
