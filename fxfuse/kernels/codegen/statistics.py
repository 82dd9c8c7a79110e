"""Kinds of statistics over all of space that the kernel which makes a value gathers on its way. Pure.

Each is an operator of the vocabulary, of one value, and a struct of that name in ``cuh/statistics.cuh``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from fxfuse.instr import Instr


@dataclasses.dataclass(frozen=True)
class Kind:
    """``merged``: numbers in float64 that the parts of a channel become. ``cycles``: of a multiprocessor, that an
    accumulator costs a convolution's kernel where it becomes such a part, beyond its products and its store.
    """

    merged: int
    cycles: float


#: by operator, in the order in which they lie in memory. Cycles of ``statistics`` were read off chains on an H100
#: (benchmarks/results/h100_ways.json): few warps hide little of a latency. The others are by their instructions
KINDS: Mapping[str, Kind] = {
    "statistics": Kind(3, 0.2),
    "exponentials": Kind(2, 0.3),
    "extremes": Kind(2, 0.15),
}


def kinds_of(instrs: Iterable[Instr]) -> tuple[str, ...]:
    """The kinds among instructions, in order."""
    found = {i.op for i in instrs}
    return tuple(kind for kind in KINDS if kind in found)


def struct_of(kind: str) -> str:
    """The struct of ``cuh/statistics.cuh``."""
    return f"fxfuse::{kind.capitalize()}"
