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
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxfuse import vocabulary
from fxfuse.program import Instr, Program, ProgramError, parse_function, parse_literal

#: version of the text; a text of another version is refused
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Region:
    """A frozen, hashable chain of operators behind one anchor.

    ``rules`` names the rewrites that lead from ``original`` to ``rewritten``, in order.
    ``precision`` is the numerics class of float32 convolutions ("tf32", "ieee"), or None for torch's
    settings at call time. ``statistics`` are positions of outputs that carry no gradient.
    """

    original: Program
    rewritten: Program
    rules: tuple[str, ...] = ()
    precision: str | None = None
    statistics: tuple[int, ...] = ()

    def __str__(self) -> str:
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "rules": self.rules,
            "precision": self.precision,
            "statistics": self.statistics,
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
        return hash((self.original, self.rewritten, self.rules, self.precision, self.statistics))

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
        if not all(0 <= s < len(self.original.outputs) for s in self.statistics):
            raise ProgramError(f"statistics {self.statistics} names an output that does not exist")

    def reference(self, *tensors: Tensor) -> list[Tensor]:
        """Run the rewritten chain in plain torch: the oracle of the kernels, and the path without a GPU.

        ``tensors`` must fit the input types; raises ProgramError otherwise.
        """
        self.rewritten.check(tensors)
        return self.rewritten.run(tensors)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Region:
    facts: dict[str, Any] = {}
    programs: dict[str, Program] = {}
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ProgramError(f"not the text of a region: {error}") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            facts[statement.targets[0].id] = parse_literal(statement.value)
        elif isinstance(statement, ast.FunctionDef):
            name, program = parse_function(statement)
            programs[name] = program
        else:
            raise ProgramError(f"unexpected in a region: {ast.unparse(statement)}")
    if facts.pop("schema", None) != SCHEMA:
        raise ProgramError(f"the region's text is not of schema {SCHEMA}: made by another version of fxfuse")
    if "original" not in programs:
        raise ProgramError("the region has no `original` program")
    original = programs["original"]
    region = Region(original, programs.get("rewritten", original), **facts)
    region.verify()
    return region


def describe(programs: Sequence[Instr]) -> str:
    """The operators of a chain as one readable line: ``conv_transpose > relu > group_norm``."""
    return " > ".join(i.op for i in programs)
