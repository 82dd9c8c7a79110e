"""CUDA C++ of a program of operators on small tensors as one kernel: every output from the inputs. Pure.

The text is made from the outputs backwards: an element of an output asks for the elements that it is made of, views
only say where those lie; a product with a matrix asks for a row of them. What two outputs share is computed for each
of them. Addresses, sizes, strides and numbers are
parameters of the text: it is the same one for another batch, or for another layer of the same form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Mapping, Sequence

import torch

from fxfuse import vocabulary
from fxfuse.instr import DTYPE_NAMES, Instr, Ref, TensorType
from fxfuse.kernels.codegen.arithmetic import (
    FLOATS,
    STORED_AS,
    Arithmetic,
    Given,
    NotEmittable,
    Value,
    held,
    stored_name,
)
from fxfuse.kernels.codegen.indices import ZERO, Indices, Size, broadcast
from fxfuse.kernels.convolution.arguments import MOST_PARAMETERS
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: elements of an output; and how far an element may be from its tensor's first one
MOST_ELEMENTS, MOST_OFFSET = 2**20, 2**31 - 1
#: products that an element may be made of, and all elements: a lane reads a row of its own, so that a multiprocessor
#: takes about a cycle for each, while torch's kernel takes 10 us at least
MOST_PRODUCTS, MOST_PRODUCTS_OF_ALL = 2**11, 2**21
#: the same elements at the same places, or the first of them
_SAME_PLACE = ("lay_out", "crop", "detach")


@dataclasses.dataclass(frozen=True)
class Emitted:
    """``text``: with the entry ``bundle``, whose parameter is a struct of the addresses of ``reads`` and then of the
    outputs, 8 bytes each, and of ``numbers``, packed. ``elements``: threads that it takes."""

    text: str
    reads: tuple[str, ...]
    numbers: bytes
    elements: int


class _Numbers:
    """The sizes, strides and numbers that are parameters, 4 bytes each."""

    def __init__(self) -> None:
        self.fields: list[str] = []
        self.packed = b""
        self._names: dict[tuple[str, str, int], str] = {}

    def size(self, value: int, of: tuple[str, str, int]) -> int:
        """What a size or a stride is called where it is used; 0 and 1 are constants of the text.

        ``of``: a tensor, what of it, and a dim.
        """
        return value if value in (0, 1) else Size.of(value, functools.partial(self._named, value, of))

    def _named(self, value: int, of: tuple[str, str, int]) -> str:
        if of not in self._names:
            self._names[of] = self.add("unsigned", "I", value)
        return self._names[of]

    def add(self, kind: str, form: str, value: float) -> str:
        name = f"n{len(self.fields)}"
        self.fields.append(f"{kind} {name};")
        self.packed += struct.pack(f"<{form}", value)
        return f"a.{name}"


class _Arithmetic(Arithmetic):
    """Floating-point numbers are parameters: what was made of sizes is among them."""

    def __init__(self, numbers: _Numbers) -> None:
        super().__init__(round_each=True)
        self.numbers = numbers

    def number(self, number: float | int | bool, dtype: torch.dtype) -> str:
        if not dtype.is_floating_point:
            return super().number(number, dtype)
        return self.numbers.add("float", "f", held(number, dtype))


def emit_bundle(program: Program, types: Mapping[str, TensorType], strides: Mapping[str, Sequence[int]]) -> Emitted:
    """The kernel of ``program``. ``types``: of all its values; ``strides``: of its inputs and outputs.

    float16 and bfloat16 values are rounded at every operator, as torch's are, and no two operators are contracted.
    Raises NotEmittable.
    """
    parts: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in program.outputs:
        shape = _sizes(types[name])
        parts.setdefault((shape, _wide(shape, strides[name])), []).append(name)
    addresses: dict[str, str] = {}
    numbers = _Numbers()
    texts = [
        _Part(program, types, strides, addresses, numbers).text(f"Part{i}", names)
        for i, names in enumerate(parts.values())
    ]
    fields = [_declared(types[n], a, "const ") for n, a in addresses.items()]
    fields += [_declared(types[n], f"q{i}") for i, n in enumerate(program.outputs)]
    if 8 * len(fields) + len(numbers.packed) > MOST_PARAMETERS:
        raise NotEmittable(f"tensors and numbers that take more than {MOST_PARAMETERS} bytes of parameters")
    fields += numbers.fields
    text = "\n".join([
        "// NVRTC: --fmad=false",
        '#include "bundle.cuh"',
        "struct Arguments {",
        *(f"  {f}" for f in fields),
        "};",
        *texts,
        'extern "C" __global__ void __launch_bounds__(fxfuse::kBundleThreads)',
        "bundle(const __grid_constant__ Arguments a) {",
        "  fxfuse::begin_dependent();",
        f"  fxfuse::bundle<{', '.join(f'Part{i}' for i in range(len(parts)))}>(a);",
        "}",
        "",
    ])  # fmt: skip
    return Emitted(text, tuple(addresses), numbers.packed, sum(math.prod(shape) for shape, _ in parts))


def _declared(kind: TensorType, name: str, const: str = "") -> str:
    return f"{const}{STORED_AS[DTYPE_NAMES[kind.dtype]]}* {name};"


def _sizes(kind: TensorType) -> tuple[int, ...]:
    sizes = tuple(s or 0 for s in kind.shape)
    if not 0 < math.prod(sizes) <= MOST_ELEMENTS:
        raise NotEmittable(f"{kind}: of 1 to {MOST_ELEMENTS} elements")
    return sizes


def _wide(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides, 0 for dims that have one element."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class _Part:
    """Outputs of one shape and layout, which the same thread makes."""

    def __init__(
        self,
        program: Program,
        types: Mapping[str, TensorType],
        strides: Mapping[str, Sequence[int]],
        addresses: dict[str, str],
        numbers: _Numbers,
    ) -> None:
        self.program, self.types, self.strides, self.addresses = program, types, strides, addresses
        self.made = {out: instr for instr in program.body for out in instr.outs}
        self.numbers, self.indices, self.arithmetic = numbers, Indices(), _Arithmetic(numbers)
        self.found: dict[tuple[str, tuple[str, ...]], Value] = {}
        self.depth, self.products = 0, 1  # of loops, and turns of all of them
        self.elements = 1

    def text(self, name: str, outputs: Sequence[str]) -> str:
        shape = self._shape(outputs[0])
        self.elements = math.prod(shape)
        at, to = self._places(shape, self._strides(outputs[0]))
        elements = self.indices.product([self.numbers.size(math.prod(shape), (outputs[0], "elements", 0))])
        stores: list[str] = []
        for output in outputs:
            value, kind = self.element(output, at), self.types[output]
            if value.dtype is not kind.dtype:
                raise NotEmittable(f"{output}: {kind} where {value.dtype} is computed")
            address = f"a.q{self.program.outputs.index(output)}"
            address = address if to == ZERO else f"{address} + {to}"
            stores.append(f"fxfuse::pw::store_{stored_name(kind.dtype)}({address}, {value.code});")
        lines = "\n".join((*self.indices.lines, *self.arithmetic.lines, *stores)).split("\n")
        return "\n".join([
            f"struct {name} {{",
            f"  static FXFUSE_DEVICE unsigned elements(const Arguments& a) {{ return {elements}; }}",
            "  static FXFUSE_DEVICE void make(const Arguments& a, unsigned i) {",
            *(f"    {line}" for line in lines),
            "  }",
            "};",
        ])  # fmt: skip

    def _places(self, shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[str, ...], str]:
        """Of element i, counted as they lie in memory: its index in every dim, and its offset."""
        wide = _wide(shape, strides)
        order = sorted((d for d, size in enumerate(shape) if size > 1), key=lambda d: wide[d], reverse=True)
        room, dense = 1, True
        for d in reversed(order):
            if wide[d] < room:
                raise NotEmittable("an output whose elements lie in the same place")
            dense = dense and wide[d] == room
            room = (shape[d] - 1) * wide[d] + room
        if room > MOST_OFFSET:
            raise NotEmittable("an output that is too far from end to end")
        at = [ZERO] * len(shape)
        for d, place in zip(order, self.indices.split("i", [shape[d] for d in order]), strict=True):
            at[d] = place
        return tuple(at), ("i" if order else ZERO) if dense else self.indices.offset(at, wide)

    # --- elements -----------------------------------------------------------------------------------
    def element(self, name: str, at: tuple[str, ...]) -> Value:
        """The element of a value at a place: one index per dim, ``ZERO`` where a dim has one element."""
        if (name, at) not in self.found:
            instr = self.made.get(name)
            self.found[name, at] = self._load(name, at) if instr is None else self._computed(instr, at)
        return self.found[name, at]

    def _load(self, name: str, at: tuple[str, ...]) -> Value:
        kind, strides = self.types[name], self._strides(name)
        stored_name(kind.dtype)
        if _reach([s or 0 for s in kind.shape], strides) > MOST_OFFSET:
            raise NotEmittable(f"{name}: too far from end to end")
        address = self.addresses.setdefault(name, f"p{len(self.addresses)}")
        offset = self.indices.offset(at, strides)
        place = f"a.{address}" if offset == ZERO else f"a.{address} + {offset}"
        return self.arithmetic.load(f"x{len(self.arithmetic.lines)}", place, kind.dtype, len(kind.shape))

    def _computed(self, instr: Instr, at: tuple[str, ...]) -> Value:
        if instr.op in _SAME_PLACE:
            return self.element(_source(instr), at)
        if vocabulary.lookup(instr.op).kind is Kind.POINTWISE:
            operands = [self._operand(o, instr, i, at) for i, o in enumerate(instr.operands)]
            return self.arithmetic.compute(instr, operands)
        special = {
            "reshape": self._reshape,
            "permute": self._permute,
            "scale_weight": self._scale_weight,
            "to_channels": self._to_channels,
            "linear": self._linear,
        }.get(instr.op)
        if special is None:
            raise NotEmittable(f"`{instr}`: {instr.op} is neither pointwise nor a view nor a product")
        return special(instr, at)

    def _operand(self, operand: object, instr: Instr, position: int, at: tuple[str, ...]) -> Given:
        if not isinstance(operand, Ref):
            return operand  # type: ignore[return-value]
        shape = self._shape(operand.name)
        if instr.op == "prelu" and position == 1:
            return self.element(operand.name, tuple(ZERO if size == 1 else at[1] for size in shape))
        return self.element(operand.name, broadcast(at, shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.numbers.size(s or 0, (name, "size", d)) for d, s in enumerate(self.types[name].shape))

    def _strides(self, name: str) -> tuple[int, ...]:
        return tuple(self.numbers.size(s, (name, "stride", d)) for d, s in enumerate(self.strides[name]))

    # --- operators that are not pointwise -------------------------------------------------------------
    def _reshape(self, instr: Instr, at: tuple[str, ...]) -> Value:
        source = _source(instr)
        return self._ranked(instr, self.element(source, self._regrouped(at, instr.outs[0], source)))

    def _regrouped(self, at: tuple[str, ...], made: str, source: str) -> tuple[str, ...]:
        return self.indices.regrouped(at, self._shape(made), self._shape(source))

    def _permute(self, instr: Instr, at: tuple[str, ...]) -> Value:
        source, dims = _source(instr), dict(instr.attributes)["dims"]
        place = {d % len(at): index for d, index in zip(dims, at, strict=True)}
        return self.element(source, tuple(place[d] for d in range(len(at))))

    def _ranked(self, instr: Instr, value: Value) -> Value:
        """A view's value: its rank counts where types are promoted."""
        return dataclasses.replace(value, rank=len(self.types[instr.outs[0]].shape))

    def _scale_weight(self, instr: Instr, at: tuple[str, ...]) -> Value:
        """An element of the weight, times the factor of its output channel."""
        scale = instr.operands[1]
        if not isinstance(scale, Ref):
            factor: Given = scale
        else:
            shape = self._shape(scale.name)
            if math.prod(shape) == 1:
                channel = [ZERO]
            else:
                given, columns, *_ = self._shape(_source(instr))
                groups = dict(instr.attributes)["groups"]
                each = self.numbers.size(given // groups, (_source(instr), "input channels", 0))
                group = [self.indices.split(at[0], [groups, each])[0]] if groups > 1 else at
                channel = [self.indices.join([group[0], at[1]], [groups, columns])] if groups > 1 else [at[1]]
            place = self.indices.regrouped(channel, (math.prod(shape),), shape)
            value = self.element(scale.name, place)
            factor = dataclasses.replace(value, rank=0 if math.prod(shape) == 1 else len(at))
        product = Instr(instr.outs, "mul", (Ref(_source(instr)), scale), ())
        return self.arithmetic.compute(product, [self.element(_source(instr), at), factor])

    def _linear(self, instr: Instr, at: tuple[str, ...]) -> Value:
        """A loop over what the sample's vector has: float32 sums, rounded once."""
        (x, weight), bias = (_source(instr), instr.operands[1]), instr.operands[2]
        dtype = self.types[instr.outs[0]].dtype
        if dtype not in FLOATS or not isinstance(weight, Ref):
            raise NotEmittable(f"`{instr}`: products of {dtype}")
        features = self._shape(x)[1]
        inside = _Part(self.program, self.types, self.strides, self.addresses, self.numbers)
        inside.depth, inside.products, inside.elements = self.depth + 1, self.products * features, self.elements
        if inside.products > MOST_PRODUCTS:
            raise NotEmittable(f"`{instr}`: more than {MOST_PRODUCTS} products in an element")
        if inside.products * inside.elements > MOST_PRODUCTS_OF_ALL:
            raise NotEmittable(f"`{instr}`: more than {MOST_PRODUCTS_OF_ALL} products in all elements")
        letter = f"i{self.depth}n{len(self.arithmetic.lines)}"
        inside.indices = Indices(f"{letter}k")
        one = ZERO if features == 1 else letter
        left = inside.element(x, (at[0], one, *at[2:]))
        right = inside.element(weight.name, (at[1], one, *at[2:]))
        if left.dtype is not dtype or right.dtype is not dtype:
            raise NotEmittable(f"`{instr}`: {left.dtype} times {right.dtype} makes {dtype}")
        total = f"{letter}s"
        self.arithmetic.lines.append("\n".join([
            f"float {total} = 0.f;",
            "#pragma unroll 8",
            f"for (unsigned {letter} = 0; {letter} < {self.indices.product([features])}; ++{letter}) {{",
            *(f"  {line}" for line in "\n".join((*inside.indices.lines, *inside.arithmetic.lines)).split("\n")),
            f"  {total} = fmaf({left.code}, {right.code}, {total});",
            "}",
        ]))  # fmt: skip
        if isinstance(bias, Ref):
            total = f"{total} + {self.element(bias.name, (at[1],)).code}"
        if dtype is not torch.float32:
            total = f"fxfuse::pw::to_{DTYPE_NAMES[dtype]}({total})"
        local = f"v{len(self.arithmetic.lines)}"
        self.arithmetic.lines.append(f"const float {local} = {total};")
        return Value(local, dtype, len(at))

    def _to_channels(self, instr: Instr, at: tuple[str, ...]) -> Value:
        """An element of a vector that is made of a number or of a tensor."""
        value, dtype = instr.operands[0], self.types[instr.outs[0]].dtype
        if not isinstance(value, Ref):
            if not dtype.is_floating_point or dtype.itemsize > 4 or value is None:
                raise NotEmittable(f"`{instr}`: {dtype} of a number")
            return Value(self.arithmetic.number(value, dtype), dtype, 1)
        shape = self._shape(value.name)
        whole = math.prod(shape)
        found = self.element(value.name, self.indices.regrouped(at if whole > 1 else [ZERO], (whole,), shape))
        if found.dtype is not dtype:
            found = self.arithmetic.compute(Instr(instr.outs, "cast", (value,), (("dtype", dtype),)), [found])
        return dataclasses.replace(found, rank=1)


def _source(view: Instr) -> str:
    first = view.operands[0]
    if not isinstance(first, Ref):
        raise NotEmittable(f"`{view}`: {first!r} is not a tensor")
    return first.name
