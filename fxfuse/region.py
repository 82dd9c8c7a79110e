"""The region: what one fused operator computes.

A region holds two programs over the same inputs and outputs: ``original``, the chain as the model
wrote it, and ``rewritten``, what the algebra made of it. The forward runs the rewritten one; the
backward differentiates the original, so that ties in a pool route their gradient as in eager mode
and a bias that the algebra dropped still gets its zeros.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from typing import Any

from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import Instr
from fxfuse.program import Program, ProgramError, parse_function, parse_literal, parse_statements, source_of

#: version of the text; a text of another version is refused
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Region:
    """A frozen, hashable chain of operators around one anchor.

    ``rules`` names the rewrites that lead from ``original`` to ``rewritten``, in order.
    ``precision`` is the numerics class of float32 convolutions ("tf32", "ieee"), or None for torch's
    settings at call time. ``statistics`` are positions of outputs that carry no gradient. ``kernels``:
    generated kernels may run it; ``tune``: where no choice between them and torch is kept, the first
    call measures.
    """

    original: Program
    rewritten: Program
    rules: tuple[str, ...] = ()
    precision: str | None = None
    statistics: tuple[int, ...] = ()
    kernels: bool = True
    tune: bool = False

    def __reduce__(self) -> Any:
        # without what is cached: another process computes other hashes
        return Region, self._fields

    @property
    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __str__(self) -> str:
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "rules": self.rules,
            "precision": self.precision,
            "statistics": self.statistics,
            **({} if self.kernels else {"kernels": False}),
            **({"tune": True} if self.tune else {}),
        }
        head = "".join(f"{k} = {v!r}\n" for k, v in facts.items())
        changed = self.rewritten.text("rewritten") if self.rewritten != self.original else ""
        return head + self.original.text("original") + changed

    @functools.cached_property
    def text(self) -> str:
        """``str(self)``, made once: the operator's second argument."""
        return str(self)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    def __hash__(self) -> int:
        return self._hash

    @staticmethod
    def parse(text: str) -> Region:
        """The region that ``str(region)`` spelled; ProgramError for anything else."""
        return _parse(text)

    @property
    def anchor(self) -> Instr:
        """The convolution that the region grew from, as the model wrote it."""
        return next(i for i in self.original.body if vocabulary.lookup(i.op).kind is vocabulary.Kind.ANCHOR)

    def verify(self) -> None:
        """Raise ProgramError unless both programs are well formed and exchange the same tensors."""
        self.original.verify()
        self.rewritten.verify()
        if self.original.inputs != self.rewritten.inputs:
            raise ProgramError("the rewritten program takes other inputs than the original")
        if len(self.original.outputs) != len(self.rewritten.outputs):
            raise ProgramError("the rewritten program gives another number of outputs than the original")
        if not _all(self.statistics, int) or not all(0 <= s < len(self.original.outputs) for s in self.statistics):
            raise ProgramError(f"statistics {self.statistics} names an output that does not exist")
        if not _all(self.rules, str):
            raise ProgramError(f"rules {self.rules} must be names")
        if self.precision not in (None, "tf32", "ieee"):
            raise ProgramError(f"precision {self.precision!r} is none of None, 'tf32', 'ieee'")
        if type(self.kernels) is not bool or type(self.tune) is not bool:
            raise ProgramError(f"kernels {self.kernels!r} and tune {self.tune!r} must be True or False")
        if not any(vocabulary.lookup(i.op).kind is vocabulary.Kind.ANCHOR for i in self.original.body):
            raise ProgramError("the region has no anchor")

    def reference(self, *tensors: Tensor) -> list[Tensor]:
        """Run the rewritten chain in plain torch: the oracle of the kernels, and the path without a GPU.

        ``tensors`` must fit the input types; raises ProgramError otherwise.
        """
        self.rewritten.check(tensors)
        return self.rewritten.run(tensors)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, tuple) and all(type(v) is kind for v in values)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Region:
    facts: dict[str, Any] = {}
    definitions: dict[str, ast.FunctionDef] = {}
    for statement in parse_statements(text):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in facts:
                facts[name] = parse_literal(value)
            case ast.FunctionDef(name=name) if name in ("original", "rewritten") and name not in definitions:
                definitions[name] = statement
            case _:
                raise ProgramError(f"unexpected in a region: {source_of(statement)}")
    if facts.pop("schema", None) != SCHEMA:
        raise ProgramError(f"the region's text is not of schema {SCHEMA}: made by another version of fxfuse")
    if "original" not in definitions:
        raise ProgramError("the region has no `original` program")
    if unknown := facts.keys() - {"rules", "precision", "statistics", "kernels", "tune"}:
        raise ProgramError(f"unexpected in a region: {', '.join(sorted(unknown))}")
    programs = {name: parse_function(definition)[1] for name, definition in definitions.items()}
    region = Region(programs["original"], programs.get("rewritten", programs["original"]), **facts)
    region.verify()
    return region
