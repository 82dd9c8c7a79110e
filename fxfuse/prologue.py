"""What a region takes in front of its anchor: the pools, norms and pointwise operators that lead to its input alone.

The anchor's input is read once more all the same, to bring it into the form that the convolution multiplies: an
operator there costs no pass of its own. One whose value others read, too, stays outside, since memory has to hold it.
"""

from __future__ import annotations

import types
from collections.abc import Collection

import torch
from torch import fx, nn

from fxfuse import vocabulary
from fxfuse.order import Order, index_of, read_after
from fxfuse.propagate import facts
from fxfuse.vocabulary import Kind

KINDS = (Kind.POINTWISE, Kind.POOL, Kind.NORM)


def prologue_of(anchor: fx.Node, order: Order, taken: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes in front of ``anchor`` that its region takes, in order. ``taken``: those of other regions."""
    before = _all_needs(anchor, order)
    members = {anchor}
    for node in sorted(before, key=index_of, reverse=True):  # readers of a value come before the node that makes it
        if node not in taken and _leads_to(node, anchor, members) and _may_join(node, before, members, order):
            members.add(node)
    return sorted(members - {anchor}, key=index_of)


def _all_needs(node: fx.Node, order: Order) -> set[fx.Node]:
    """Everything that ``node`` comes after."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        new = order.needs(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def _leads_to(node: fx.Node, anchor: fx.Node, members: Collection[fx.Node]) -> bool:
    """Whether all that reads ``node`` is the anchor, as its input, or other members."""
    call = facts(anchor).call
    assert call is not None
    inputs = call.operands[:1]
    return bool(node.users) and all(u in members and (u is not anchor or node in inputs) for u in node.users)


def _may_join(node: fx.Node, before: Collection[fx.Node], members: Collection[fx.Node], order: Order) -> bool:
    """Whether a region means the same with ``node`` in it. ``before``: what its anchor comes after."""
    known = facts(node)
    if known.call is None or vocabulary.lookup(known.call.op).kind not in KINDS:
        return False
    if known.tensor is None or not known.tensor.is_floating_point():
        return False
    if known.writes and not (known.call.inplace and _own_memory(node) and not read_after(node, known.writes)):
        return False
    return not any(node in order.needs(other) for other in before if other not in members)


def _own_memory(writer: fx.Node) -> bool:
    """Whether what ``writer`` writes over is memory that an operator of torch allocated in this call."""
    known = facts(writer)
    assert known.call is not None
    base = known.call.operands[0]
    if not isinstance(base, fx.Node):
        return False
    made = facts(base)
    if known.writes != made.holds or len(known.writes) != 1:
        return False
    if made.call is not None and made.call.inplace:
        return _own_memory(base)
    if base.op == "call_function":
        by_torch = _is_torchs(base.target)
    else:
        by_torch = base.op == "call_method" or (base.op == "call_module" and hasattr(nn, made.spelling))
    return by_torch and not made.holds & made.reads


def _is_torchs(function: object) -> bool:
    """Whether a function is one of torch's own, not an operator or a function that somebody registered there."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(function).split(".")[0] in ("aten", "prims")
    plain = isinstance(function, (types.FunctionType, types.BuiltinFunctionType))
    return plain and (function.__module__ or "").split(".")[0] in ("torch", "_operator")
