"""Sizes of tensors as numbers in the graph, where they are known: who asks for a size alone needs no value.

``b, c, *space = y.shape`` would otherwise keep ``y`` in memory, for nothing but its shape.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import Tensor, fx

from fxfuse.propagate import facts

#: what asks a tensor for sizes: methods, attributes, functions
_METHODS = ("size", "dim", "ndimension", "numel", "nelement")
_ATTRIBUTES = ("shape", "ndim")
_FUNCTIONS = (torch.numel, len)


def sizes_as_numbers(graph: fx.Graph) -> None:
    """Put the sizes that a propagated graph asks for where they are used, and shapes in the place of the question."""
    known: set[fx.Node] = set()
    for node in list(graph.nodes):
        val = facts(node).val if node.op != "output" else None
        if not (_asks(node) or (node.target is operator.getitem and node.args[0] in known)):
            continue
        if type(val) is int:
            for user in list(node.users):
                _replace(user, node, val)
            graph.erase_node(node)
        elif isinstance(val, torch.Size) and all(type(v) is int for v in val):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.Size, (list(val),), {}
            facts(node).reads, facts(node).call = frozenset(), None
            known.add(node)
    for node in reversed([n for n in graph.nodes if n in known and not n.users]):
        graph.erase_node(node)


def _asks(node: fx.Node) -> bool:
    """Whether a node asks a tensor for its shape or a size."""
    subject = node.args[0] if node.args else None
    if not isinstance(subject, fx.Node) or not isinstance(facts(subject).val, Tensor):
        return False
    if node.op == "call_method":
        return node.target in _METHODS
    if node.op != "call_function":
        return False
    return node.target in _FUNCTIONS or (node.target is getattr and node.args[1] in _ATTRIBUTES)


def _replace(user: fx.Node, node: fx.Node, number: int) -> None:
    user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
    user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)
    call = facts(user).call if user.op != "output" else None
    if call is not None:
        operands = tuple(number if o is node else o for o in call.operands)
        facts(user).call = dataclasses.replace(call, operands=operands)
