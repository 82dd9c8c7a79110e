"""Views that need not be made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from fxfuse import vocabulary
from fxfuse.chain import Builder, attributes, op_name, op_of, operands, same_type, sizes, strides
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule, X


class ReduceBeforeReshape(Rule):
    """reduce(reshape(x)) = reduce(x) over the dims that the reshape has made those that are reduced

    As in ``x.flatten(2).mean(-1)``, which is the mean over all of space. Along which dims something is reduced is what
    other rules ask for.
    """

    legality = Legality.REASSOCIATING
    pattern = P(
        ("sum", "mean", "amax", "amin", "logsumexp", "var", "std", "vector_norm"),
        P("reshape", X, name="reshape"),
        name="reduce",
    )

    def check(self, match: Match) -> Reject | None:
        found = _dims_before(match)
        return found if isinstance(found, Reject) else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        reduce, value = match["reduce"], operands(match["reshape"])[0]
        given = {**attributes(reduce), "dims": _dims_before(match), "keepdim": False}
        new = build.call(op_of(reduce).name, value, **given)
        return new if sizes(new) == sizes(reduce) else build.call("reshape", new, shape=sizes(reduce))


class DropExpansions(Rule):
    """f(x, expand(y)) = f(x, y) for a pointwise f that broadcasts y to the same size

    The result has the same dtype and strides: a tensor without dims is promoted otherwise than one that has some, and
    where no operand has the size of the result, its dims may lie in another order.
    """

    legality = Legality.BITWISE
    pattern = P([op for op in vocabulary.names(vocabulary.Kind.POINTWISE) if op != "prelu"])

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None or sizes(root) is None:
            return None
        for node in operands(root):
            if op_name(node) == "expand" and self._is_alike(root, node):
                match.bound["expand"] = node
                return match
        return None

    @staticmethod
    def _given(root: fx.Node, without: fx.Node) -> list[Any]:
        return [operands(without)[0] if o is without else o for o in operands(root)]

    def _is_alike(self, root: fx.Node, without: fx.Node) -> bool:
        """Whether the result is the same, but for its values, without a view."""
        nodes = self._given(root, without)
        if any(sizes(o) is None for o in nodes if isinstance(o, fx.Node)):
            return False
        given = [o.meta["val"] if isinstance(o, fx.Node) else o for o in nodes]
        made, expected = op_of(root)(*given, **attributes(root)), root.meta["val"]
        return same_type(made, expected) and strides(made) == strides(expected)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        given = self._given(match.root, match["expand"])
        return build.call(op_of(match.root).name, *given, **attributes(match.root))


def _dims_before(match: Match) -> tuple[int, ...] | Reject:
    """The dims of what is reshaped that the reduction is over."""
    before, after = sizes(operands(match["reshape"])[0]), sizes(match["reshape"])
    if before is None or after is None:
        return Reject("sizes are not known")
    if 0 in before:
        return Reject("there is nothing to reduce")
    reduced, found = {*attributes(match["reduce"])["dims"]}, list[int]()
    for those, these in _groups(before, after):
        long = {d for d in these if after[d] != 1}
        if not long <= reduced and not reduced.isdisjoint(long):
            return Reject("the reshape mixes dims that are reduced with others")
        if long <= reduced and not reduced.isdisjoint(these):
            found += those
    return tuple(found) or Reject("dims of size 1 alone are reduced")


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The shortest runs of dims of both sizes that have as many elements, in order."""
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = (i, j)
        a = before[i] if i < len(before) else 1
        b = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
        yield range(first, i), range(second, j)
