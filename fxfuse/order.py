"""What must come before what in a graph: through data, and through effects.

A node that writes to memory comes after earlier readers of it and before later ones, random operators keep their order,
and nothing moves across a switch of autocast or of gradients.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxfuse import vocabulary
from fxfuse.propagate import UNKNOWN, facts


class Order:
    """The nodes that each node must come after, through data and through effects."""

    def __init__(self, graph: fx.Graph) -> None:
        self.before: dict[fx.Node, set[fx.Node]] = {n: set(n.all_input_nodes) for n in graph.nodes}
        self._unit: dict[fx.Node, set[fx.Node]] = {}
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        writers = [n for n in nodes if facts(n).writes or _opaque(n)]
        for writer in writers:
            touched = writes_of(writer)
            for other in nodes:
                if other is writer or not touched & (facts(other).reads | facts(other).holds):
                    continue
                first, last = sorted((writer, other), key=lambda n: facts(n).index)
                self.before[last].add(first)
        chained = [n for n in nodes if facts(n).random or _opaque(n)]
        for first, last in itertools.pairwise(chained):
            self.before[last].add(first)
        for switch in [n for n in nodes if facts(n).switches]:
            for other in nodes:
                if facts(other).index < facts(switch).index:
                    self.before[switch].add(other)
                elif other is not switch:
                    self.before[other].add(switch)

    def merge(self, members: Any) -> None:
        """From now on ``members`` are one node: whoever needs one needs all that any of them needs."""
        unit = set(members)
        for member in members:
            self._unit[member] = unit

    def needs(self, node: fx.Node) -> set[fx.Node]:
        unit = self._unit.get(node)
        if unit is None:
            return self.before[node]
        return set().union(*(self.needs_inside(m) for m in unit)) - unit

    def needs_inside(self, node: fx.Node) -> set[fx.Node]:
        """What ``node`` needs as a member of a region: sizes and other numbers are written into its text."""
        if facts(node).call is None:
            return self.before[node]
        return self.before[node] - {n for n in node.all_input_nodes if is_number(n) and not facts(n).switches}

    def written_after(self, value: fx.Node, members: Collection[fx.Node]) -> bool:
        """Whether the memory of ``value``, which the region ``members`` reads, is written to once that has run."""
        memory = facts(value).holds
        read = [m for m in members if (call := facts(m).call) is not None and value in call.operands]
        now = min(map(index_of, read), default=len(self.before))  # read in views alone: never written to
        return any(index_of(w) > now and writes_of(w) & memory for w in self.before if w not in members)

    def sees_through(self, view: fx.Node, reader: fx.Node) -> bool:
        """Whether ``view`` is one, and a region may have it by itself, for its operator ``reader``.

        It looks later than the model does: nothing may write to that memory, nor switch a mode in between. A view
        that is a member of another region is given by that.
        """
        call, memory = facts(view).call, facts(view).holds
        if view in self._unit or call is None or call.inplace or not vocabulary.lookup(call.op).view:
            return False
        base = call.operands[0]
        if not isinstance(base, fx.Node) or facts(base).tensor is None or facts(base).holds != memory:
            return False
        between = range(index_of(view), index_of(reader))
        return not any(
            writes_of(n) & memory or (facts(n).switches and index_of(n) in between)
            for n in self.before
            if n.op != "output"
        )

    def sorted(self, graph: fx.Graph) -> list[fx.Node]:
        """All nodes in an order that respects ``needs``, units together, else as captured."""
        done: dict[fx.Node, None] = {}
        for root in graph.nodes:
            stack = [root]
            while stack:
                node = stack[-1]
                missing = [n for n in self.needs(node) if n not in done]
                if node in done:
                    stack.pop()
                elif missing:
                    stack.extend(sorted(missing, key=index_of, reverse=True))
                else:
                    stack.pop()
                    unit = sorted(self._unit.get(node, {node}), key=index_of)
                    done.update(dict.fromkeys(unit))
        return list(done)


def index_of(node: fx.Node) -> int:
    return facts(node).index


def _opaque(node: fx.Node) -> bool:
    """A node of unknown effect: it could not be run on fake tensors, or is not an operator of torch."""
    return facts(node).val is UNKNOWN and node.op != "output" and node.target is not operator.getitem


def is_number(node: fx.Node) -> bool:
    """Whether the value of ``node`` holds no tensor: a size, a shape, a flag."""
    val = facts(node).val
    return val is not UNKNOWN and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(val))


def writes_of(node: fx.Node) -> frozenset[int]:
    """The storages that ``node`` writes to, or may write to."""
    return facts(node).writes | (facts(node).reads if _opaque(node) else frozenset())


def read_after(writer: fx.Node, memory: frozenset[int]) -> list[fx.Node]:
    """The values in ``memory`` that were made before ``writer`` and are read after it."""
    now = index_of(writer)
    return [
        n
        for n in writer.graph.nodes
        if index_of(n) < now and facts(n).holds & memory and any(index_of(user) > now for user in n.users)
    ]
