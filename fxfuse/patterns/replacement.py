"""Whether what a rule built can take the root's place, and whether it left everything else as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxfuse.chain import same_type


class Snapshot:
    """The calls of a graph at one moment, to see whether a rule edits them: it may only add others."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes = {n: (n.target, n.args, n.kwargs) for n in graph.nodes}

    def edited(self) -> fx.Node | None:
        """A node that was erased, or that calls something else now."""
        present = set(self.graph.nodes)
        changed = (n for n, call in self.nodes.items() if n not in present or (n.target, n.args, n.kwargs) != call)
        return next(changed, None)


def misfit(root: fx.Node, new: Any, added: Sequence[fx.Node]) -> str | None:
    """Why ``new``, which needed the nodes ``added``, cannot take the place of ``root``; None where it can.

    ``new`` is whatever a rule returned: a node, or a tuple with one per output.
    """
    results = new if isinstance(new, tuple) else (new,)
    if not results or not all(isinstance(n, fx.Node) for n in results):
        return f"rewrite() returned {new!r}, not a node or a tuple of nodes"
    present = set(root.graph.nodes)
    if any(n not in present for a in (*added, *results) for n in (a, *a.all_input_nodes)):
        return "the replacement reads a node that is not in the chain"
    after = _readers(root)
    if any(n in after for a in added for n in a.all_input_nodes) or not after.isdisjoint(results):
        return "the replacement reads what it replaces"
    wanted, got = root.meta["val"], _value(new)
    if isinstance(wanted, tuple) is not isinstance(got, tuple) or not (
        same_type(wanted, got) or _unknown_sizes(wanted, got)
    ):
        return f"it gives {got} where {wanted} is expected"
    return None


def differs_in_unknown_sizes(root: fx.Node, new: fx.Node | tuple[fx.Node, ...]) -> bool:
    """Whether sizes that are not known before the call keep ``new`` from being of the root's type, provably."""
    return not same_type(root.meta["val"], _value(new))


def _readers(root: fx.Node) -> set[fx.Node]:
    """``root`` and all that depends on it."""
    found, stack = {root}, [root]
    while stack:
        fresh = [user for user in stack.pop().users if user not in found]
        found.update(fresh)
        stack += fresh
    return found


def _value(new: fx.Node | tuple[fx.Node, ...]) -> Any:
    return new.meta["val"] if isinstance(new, fx.Node) else tuple(n.meta["val"] for n in new)


def _unknown_sizes(wanted: Any, got: Any) -> bool:
    """Whether two fake values may differ in sizes that are not known, and in nothing else."""
    if isinstance(wanted, tuple):
        if len(wanted) != len(got):
            return False
        return all(same_type(a, b) or _unknown_sizes(a, b) for a, b in zip(wanted, got, strict=True))
    if (wanted.dtype, wanted.device, wanted.dim()) != (got.dtype, got.device, got.dim()):
        return False
    sizes = zip(wanted.shape, got.shape, strict=True)
    return all(not isinstance(a, int) or not isinstance(b, int) or a == b for a, b in sizes)
