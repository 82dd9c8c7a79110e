"""Sizes of tensors as numbers in the graph, where they are known: who asks for a size alone needs no value.

``b, c, *space = y.shape`` would otherwise keep ``y`` in memory, for nothing but its shape.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.propagate import facts

#: what asks a tensor for sizes: methods, attributes, functions
_METHODS = ("size", "dim", "ndimension", "numel", "nelement")
_ATTRIBUTES = ("shape", "ndim")
_FUNCTIONS = (torch.numel, len)


def sizes_as_numbers(graph: fx.Graph) -> None:
    """Put the sizes that a propagated graph asks for, and parts of a shape, where they are used; in place.

    What the model returns stays as it is, and so does a shape that is asked for something itself (``y.shape.numel()``).
    """
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if _asks(node) or (node.target is operator.getitem and node.args[0] in known):
            val = facts(node).val
            if type(val) is int or (isinstance(val, tuple) and all(type(v) is int for v in val)):
                known[node] = tuple(val) if isinstance(val, tuple) else val
    for node in reversed(known):
        for user in list(node.users):
            itself = user.op == "call_method" and user.args[0] is node
            if user.op != "output" and not itself and user not in known:
                _replace(user, node, known[node])
        if not node.users:
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


def _replace(user: fx.Node, node: fx.Node, number: Any) -> None:
    user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
    user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)
    call = facts(user).call
    if call is not None:
        operands = tuple(number if o is node else o for o in call.operands)
        facts(user).call = dataclasses.replace(call, operands=operands)
