"""CUDA C++ of a program of pointwise operators and views as one kernel: every output from the inputs. Pure.

The text is made from the outputs backwards: an element of an output asks for the elements that it is made of, views
only say where those lie. What two outputs share is computed for each of them. Sizes and strides are constants of the
text; its parameters are addresses alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fxfuse import vocabulary
from fxfuse.instr import DTYPE_NAMES, Instr, Ref, TensorType
from fxfuse.kernels.arithmetic import STORED_AS, Arithmetic, Given, NotEmittable, Value, literal, stored_name
from fxfuse.kernels.indices import ZERO, Indices, broadcast
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: elements of an output; and how far an element may be from its tensor's first one
MOST_ELEMENTS, MOST_OFFSET = 2**20, 2**31 - 1
#: tensors that a launch may name: it has 4 KB for parameters
MOST_ADDRESSES = 400
#: the same elements at the same places, or the first of them
_SAME_PLACE = ("lay_out", "crop", "detach")


@dataclasses.dataclass(frozen=True)
class Emitted:
    """``text``: with the entry ``bundle``, whose parameter is a struct of the addresses of ``reads`` and then of the
    outputs, 8 bytes each. ``elements``: threads that it takes."""

    text: str
    reads: tuple[str, ...]
    elements: int


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
    texts = [
        _Part(program, types, strides, addresses).text(f"Part{i}", names) for i, names in enumerate(parts.values())
    ]
    if len(addresses) + len(program.outputs) > MOST_ADDRESSES:
        raise NotEmittable(f"more than {MOST_ADDRESSES} tensors")
    fields = [_declared(types[n], a, "const ") for n, a in addresses.items()]
    fields += [_declared(types[n], f"q{i}") for i, n in enumerate(program.outputs)]
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
    return Emitted(text, tuple(addresses), sum(math.prod(shape) for shape, _ in parts))


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
    ) -> None:
        self.program, self.types, self.strides, self.addresses = program, types, strides, addresses
        self.made = {out: instr for instr in program.body for out in instr.outs}
        self.indices, self.arithmetic = Indices(), Arithmetic(round_each=True)
        self.found: dict[tuple[str, tuple[str, ...]], Value] = {}

    def text(self, name: str, outputs: Sequence[str]) -> str:
        shape = _sizes(self.types[outputs[0]])
        at, to = self._places(shape, self.strides[outputs[0]])
        stores = []
        for output in outputs:
            value, kind = self.element(output, at), self.types[output]
            if value.dtype is not kind.dtype:
                raise NotEmittable(f"{output}: {kind} where {value.dtype} is computed")
            address = f"a.q{self.program.outputs.index(output)}"
            address = address if to == ZERO else f"{address} + {to}"
            stores.append(f"fxfuse::pw::store_{stored_name(kind.dtype)}({address}, {value.code});")
        return "\n".join([
            f"struct {name} {{",
            f"  static constexpr unsigned elements = {math.prod(shape)};",
            "  static FXFUSE_DEVICE void make(const Arguments& a, unsigned i) {",
            *(f"    {line}" for line in (*self.indices.lines, *self.arithmetic.lines, *stores)),
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
        kind, strides = self.types[name], self.strides[name]
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
        }.get(instr.op)
        if special is None:
            raise NotEmittable(f"`{instr}`: {instr.op} is neither pointwise nor a view")
        return special(instr, at)

    def _operand(self, operand: object, instr: Instr, position: int, at: tuple[str, ...]) -> Given:
        if not isinstance(operand, Ref):
            return operand  # type: ignore[return-value]
        shape = self._shape(operand.name)
        if instr.op == "prelu" and position == 1:
            return self.element(operand.name, tuple(ZERO if size == 1 else at[1] for size in shape))
        return self.element(operand.name, broadcast(at, shape))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(s or 0 for s in self.types[name].shape)

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
                group = [self.indices.name(f"{at[0]} / {given // groups}u")] if groups > 1 and given > groups else at
                channel = [self.indices.join([group[0], at[1]], [groups, columns])] if groups > 1 else [at[1]]
            place = self.indices.regrouped(channel, (math.prod(shape),), shape)
            value = self.element(scale.name, place)
            factor = dataclasses.replace(value, rank=0 if math.prod(shape) == 1 else len(at))
        product = Instr(instr.outs, "mul", (Ref(_source(instr)), scale), ())
        return self.arithmetic.compute(product, [self.element(_source(instr), at), factor])

    def _to_channels(self, instr: Instr, at: tuple[str, ...]) -> Value:
        """An element of a vector that is made of a number or of a tensor."""
        value, dtype = instr.operands[0], self.types[instr.outs[0]].dtype
        if not isinstance(value, Ref):
            if not dtype.is_floating_point or dtype.itemsize > 4 or value is None:
                raise NotEmittable(f"`{instr}`: {dtype} of a number")
            return Value(literal(value, dtype), dtype, 1)
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
