"""What a program makes of a value and of that value's own reductions, as C++: a struct like those of ``cuh/fold.cuh``.

The values of a row, or the channels of a position, lie in registers. What differs from one to the next is computed
again wherever it is asked for; reductions, and what is made of them alone, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fxfuse import vocabulary
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.arithmetic import DIVISOR, FLOATS, Arithmetic, Given, NotEmittable, Value, c_type
from fxfuse.kernels.codegen.folds import combine_of, keeps, number_of, reduces, struct_of
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

_NAME = "Persistent"


@dataclasses.dataclass(frozen=True)
class Persistent:
    """The text of the struct ``name``.

    ``keeps``: every element has a result. ``flops``: a rough cost of an element, in additions.
    """

    code: str
    keeps: bool
    flops: int

    @property
    def name(self) -> str:
        return _NAME


def emit_persistent(program: Program, *, keeps: bool) -> Persistent:
    """The struct of a ``program`` of one value. Raises NotEmittable.

    Its body is pointwise operators on that value, numbers and reductions, views of one value per row, and reductions
    over one and the same dims.
    """
    ((value, kind),) = program.inputs
    emitter = _Emitter(value, kind)
    for instr in program.body:
        emitter.emit(instr)
    (result,) = program.outputs
    return emitter.made(result, keeps=keeps)


class _Emitter(Arithmetic):
    def __init__(self, value: str, kind: TensorType) -> None:
        super().__init__(round_each=False)
        if kind.dtype not in FLOATS:
            raise NotEmittable(f"{value}: elements are float32, float16 or bfloat16, not {kind}")
        self.kind = kind
        self.values = {value: Value("y", kind.dtype, len(kind.shape), varies=True)}
        self.types = dict[str, str]()  # of what is made once, in C++
        self.once: list[str] = []  # the lines that make it
        self.each: dict[str, tuple[str, tuple[str, ...]]] = {}  # what is made of each element: its line, what it reads
        self.costs = dict[str, int]()  # of these lines
        self.spent = 0  # of an element, so far

    def emit(self, instr: Instr) -> None:
        operands = [self.values[o.name] if isinstance(o, Ref) else o for o in instr.operands]
        if reduces(instr):
            made = self._reduced(instr, operands)
        elif vocabulary.lookup(instr.op).kind is Kind.SHAPE:
            (made,) = (o for o in operands if isinstance(o, Value))
        else:
            made = self._computed(instr, operands)
        self.values[instr.outs[0]] = made

    def _computed(self, instr: Instr, operands: Sequence[Given]) -> Value:
        before = self.flops
        made = self.compute(instr, operands)
        self.costs[made.code] = self.flops - before
        reads = [o.code for o in operands if isinstance(o, Value)]
        if instr.op == "div" and len(reads) == 2 and self._differs(reads[0]) and not self._differs(reads[1]):
            reads.append(self._divided(made, *operands))
        if any(self._differs(code) for code in reads):
            self.each[made.code] = self.lines[-1], tuple(reads)
        else:
            self.types[made.code] = c_type(made.dtype)
            self.once.append(self.lines[-1])
        return made

    def _divided(self, made: Value, of: Given, by: Given) -> str:
        """Of many elements by one and the same value, which is what is returned."""
        name = f"by_{made.code}"
        self.once.append(f"const {DIVISOR} {name}({self.cast(by, torch.float32)});")
        self.types[name] = DIVISOR
        self.lines[-1] = f"const float {made.code} = {name}({self.cast(of, torch.float32)});"
        return name

    def _reduced(self, instr: Instr, operands: Sequence[Given]) -> Value:
        (of,) = operands
        combine = combine_of(instr, self.kind)
        if combine in (None, _NAME) or not isinstance(of, Value) or of.dtype not in FLOATS:
            raise NotEmittable(f"`{instr}`: kernels have no such reduction")
        op = struct_of(combine, number_of(instr, of.dtype))
        number = len(self.lines)
        self.lines.append("")  # names are numbers of lines
        read = self.cast(of, torch.float32)
        body = [*self._lines([of.code]), f"return {read};"]
        self.once += [
            "\n".join(
                [f"auto of{number} = fxfuse::through(f, [&](float y) {{", *(f"      {b}" for b in body), "    });"]
            ),
            f"const auto r{number} = {op}::fold(of{number}, channels);",
        ]
        self.types[f"r{number}"] = DIVISOR if combine == "UnitNorm" else "float"
        self.spent += 2 + self._cost([of.code])
        rank = len(self.kind.shape)
        if not keeps(combine):
            return Value(f"r{number}", of.dtype, rank, varies=True)
        self.once.append(f"const fxfuse::Left left{number} = of{number}.left;")
        self.types[f"left{number}"] = "fxfuse::Left"
        made = f"v{number}"
        line = f"const float {made} = {op}::result(left{number}({read}), r{number});"
        self.each[made] = line, (of.code, f"left{number}", f"r{number}")
        self.costs[made] = 4
        return Value(made, of.dtype, rank, varies=True)

    def _differs(self, code: str) -> bool:
        return code == "y" or code in self.each

    def _needed(self, codes: Sequence[str]) -> set[str]:
        """All that is read for these."""
        found, left = set[str](), [*codes]
        while left:
            code = left.pop()
            if code not in found:
                found.add(code)
                left += self.each.get(code, ("", ()))[1]
        return found

    def _lines(self, codes: Sequence[str]) -> list[str]:
        """What makes these of an element, in order."""
        needed = self._needed(codes)
        return [line for code, (line, _) in self.each.items() if code in needed]

    def _cost(self, codes: Sequence[str]) -> int:
        return sum(self.costs[code] for code in self._needed(codes) & self.each.keys())

    def made(self, result: str, *, keeps: bool) -> Persistent:
        value = self.values[result]
        read, kept = self.cast(value, torch.float32), [c for c in self.types if c in self._needed([value.code])]
        flag = str(keeps).lower()
        once = [f"    {line}" for line in self.once]
        if keeps:
            fields = [f"    {self.types[c]} {c};" for c in kept]
            known = [f"    const {self.types[c]} {c} = made.{c};" for c in kept]
            each = [f"    {line}" for line in self._lines([value.code])]
            parts = [
                ["  struct Made {", *fields, "  };"],
                _function("template <class F>", "Made fold(F& f, int channels)", once, f"{{{', '.join(kept)}}}"),
                _function("", "float result(float y, const Made& made)", [*known, *each], read),
            ]
        else:
            parts = [_function("template <class F>", "float fold(F& f, int channels)", once, read)]
        lines = [f"struct {_NAME} {{", f"  static constexpr bool keeps = {flag};", *(line for p in parts for line in p)]
        return Persistent("\n".join([*lines, "};", ""]), keeps, self.spent + self._cost([value.code]))


def _function(template: str, head: str, body: Sequence[str], returned: str) -> list[str]:
    heads = [f"  {template}"] if template else []
    return [*heads, f"  static FXFUSE_INLINE {head} {{", *body, f"    return {returned};", "  }"]
