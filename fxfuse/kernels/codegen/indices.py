"""Where the elements of views lie: dims of one shape against dims of another, and index arithmetic as C++."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fxfuse.instr import Instr

#: the index of a dim that has one element
ZERO = "0"

Shape = Sequence[int]


def regroup(one: Shape, other: Shape) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of as many elements, matched: the fewest in a row with as many elements on both sides.

    Dims of size 1 are left out; sizes are positive.
    """
    left, right = ([d for d, size in enumerate(shape) if size != 1] for shape in (one, other))
    groups: list[tuple[list[int], list[int]]] = []
    while left or right:
        taken: tuple[list[int], list[int]] = ([left.pop(0)], [right.pop(0)])
        while (sizes := [math.prod(s[d] for d in t) for s, t in zip((one, other), taken, strict=True)])[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                taken[0].append(left.pop(0))
            else:
                taken[1].append(right.pop(0))
        groups.append(taken)
    return groups


def axes_of(view: Instr, made: Shape, source: Shape) -> dict[int, int] | None:
    """For every dim of a view with more than one element, the dim of its source that it is; None where it is no one.

    ``made``, ``source``: their shapes.
    """
    wide = [d for d, size in enumerate(made) if size != 1]
    if view.op == "permute":
        dims = dict(view.attributes)["dims"]
        return {d: dims[d] % len(source) for d in wide}
    if view.op == "reshape":
        groups = regroup(made, source)
        if any(len(a) > 1 or len(b) > 1 for a, b in groups):
            return None
        return {a: b for (a,), (b,) in groups}
    return {d: d for d in wide}


class Size(int):
    """A size or a stride that is no constant of the text: ``named`` gives what stands for it, where it is needed."""

    named: Callable[[], str]

    @staticmethod
    def of(value: int, named: Callable[[], str]) -> Size:
        made = Size(value)
        made.named = named
        return made


class Indices:
    """Lines that compute indices, each of them once. Sizes are constants of the text, but for each :class:`Size`."""

    def __init__(self, prefix: str = "k") -> None:
        self.lines: list[str] = []
        self._prefix = prefix  # of variables' names
        self._names: dict[str, str] = {}

    def name(self, text: str) -> str:
        """The variable of an expression; itself, where it is a variable or a number."""
        if text.isalnum():
            return text
        if text not in self._names:
            self._names[text] = f"{self._prefix}{len(self._names)}"
            self.lines.append(f"const unsigned {self._names[text]} = {text};")
        return self._names[text]

    def join(self, at: Sequence[str], sizes: Shape) -> str:
        """One index for several dims, the last of them the fastest."""
        found = ZERO
        for index, size in zip(at, sizes, strict=True):
            if size > 1:
                found = index if found == ZERO else self.name(f"{found} * {self.product([size])} + {index}")
        return found

    def split(self, index: str, sizes: Shape) -> list[str]:
        """The other way round."""
        found = []
        for d in range(len(sizes)):
            behind = sizes[d + 1 :]
            if math.prod(behind) == 1:
                found.append(index)
                continue
            inner = self.product(behind)
            found.append(self.name(f"{index} / {inner}"))
            index = self.name(f"{index} - {found[-1]} * {inner}")
        return found

    def product(self, sizes: Shape) -> str:
        """The product of sizes as C++."""
        named = [size.named() for size in sizes if isinstance(size, Size) and size != 1]
        known = math.prod(size for size in sizes if not isinstance(size, Size))
        terms = [*named, *([f"{known}u"] if known != 1 or not named else [])]
        return terms[0] if len(terms) == 1 else self.name(" * ".join(terms))

    def regrouped(self, at: Sequence[str], made: Shape, source: Shape) -> tuple[str, ...]:
        """The place in a tensor of the shape ``source`` that is ``at`` in its reshape to ``made``."""
        found = [ZERO] * len(source)
        for ours, theirs in regroup(made, source):
            sizes = [made[d] for d in ours], [source[d] for d in theirs]
            places = [at[d] for d in ours]
            if sizes[0] != sizes[1]:
                places = self.split(self.join(places, sizes[0]), sizes[1])
            for dim, place in zip(theirs, places, strict=True):
                found[dim] = place
        return tuple(found)

    def offset(self, at: Sequence[str], strides: Mapping[int, int] | Sequence[int]) -> str:
        """How many elements behind the first one: an expression."""
        terms = [
            place if strides[d] == 1 else f"{place} * {self.product([strides[d]])}"
            for d, place in enumerate(at)
            if place != ZERO and strides[d]
        ]
        return " + ".join(terms) or ZERO


def broadcast(at: Sequence[str], shape: Shape) -> tuple[str, ...]:
    """The place in an operand of ``shape`` that is ``at`` in the result."""
    behind = at[len(at) - len(shape) :]
    return tuple(ZERO if size == 1 else place for place, size in zip(behind, shape, strict=True))
