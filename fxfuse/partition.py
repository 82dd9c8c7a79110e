"""Grow a region from every anchor, and say why it stopped.

A region takes every operator of the vocabulary that depends on its anchor, as long as the whole
stays *convex*: nothing it needs may depend on it through a node outside. Dependence includes the order of effects
(:mod:`fxfuse.order`). In front of the anchor it takes what leads to the anchor's input alone (:mod:`fxfuse.prologue`).

Of a view of a tensor from outside, ``weight.view(-1, 1, 1, 1)``, a region is given the tensor, and has the view as
an operator of its own. Where others read that view, too, it also stays a node of the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import vocabulary
from fxfuse.call import Call, Statistics
from fxfuse.chain import Builder, eliminate_dead, op_of, same_type
from fxfuse.instr import DTYPE_NAMES
from fxfuse.order import Order, index_of, is_number, read_after, writes_of
from fxfuse.prologue import prologue_of
from fxfuse.propagate import Facts, facts, label
from fxfuse.vocabulary import Kind


@dataclasses.dataclass
class Draft:
    """A region in the making: nodes of the user's graph, and the chain they mean."""

    anchor: fx.Node
    build: Builder
    members: dict[fx.Node, fx.Node]  #: node of the user's graph -> its value in the chain
    inputs: dict[fx.Node, fx.Node]  #: node of the user's graph -> placeholder of the chain
    views: dict[fx.Node, fx.Node]  #: view of an input, a node of the user's graph -> its value in the chain
    statistics: list[tuple[Statistics, fx.Node, fx.Node]]  #: buffers to update, from (mean, var) of the chain
    ended: list[tuple[fx.Node, str]]  #: the nodes that ended it, and why
    outputs: list[fx.Node] = dataclasses.field(default_factory=list)  #: members whose value is used outside
    own_views: list[fx.Node] = dataclasses.field(default_factory=list)  #: views that nothing outside of regions reads

    @property
    def operators(self) -> list[fx.Node]:
        """The nodes of the user's graph that it stands for, in order."""
        return sorted([*self.members, *self.own_views], key=index_of)


def looks_like_anchor(node: fx.Node) -> bool:
    call = facts(node).call
    return call is not None and vocabulary.lookup(call.op).kind is Kind.ANCHOR


def partition(graph: fx.Graph, order: Order) -> list[Draft]:
    """All regions of a propagated graph, in order. Regions never share a node; ``order`` learns of them."""
    drafts: list[Draft] = []
    taken: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in taken or not looks_like_anchor(node):
            continue
        draft = _grow(graph, node, order, taken, {n for d in drafts for n in d.inputs})
        if draft is not None:
            drafts.append(draft)
            taken.update(draft.members)
            order.merge(draft.members)
    _own_views(drafts)
    return drafts


def forward_inplace_results(graph: fx.Graph) -> None:
    """Let later readers of a value that was written in place read the writer's result: the same tensor."""
    for node in graph.nodes:
        known = facts(node)
        if known.call is None or not known.call.inplace or not isinstance(known.call.operands[0], fx.Node):
            continue
        base = known.call.operands[0]
        if known.holds == facts(base).holds:
            for user in [u for u in base.users if facts(u).index > known.index]:
                user.replace_input_with(base, node)
                call = facts(user).call
                if call is not None:
                    operands = tuple(node if o is base else o for o in call.operands)
                    facts(user).call = dataclasses.replace(call, operands=operands)


def _own_views(drafts: Sequence[Draft]) -> None:
    """Hand the views that no one reads but regions, each of which has them by itself, to the first of these."""
    readers: set[fx.Node] = {m for draft in drafts for m in draft.members}
    given: set[fx.Node] = {n for draft in drafts for n in draft.inputs}
    first = {view: draft for draft in reversed(drafts) for view in draft.views}
    for view in sorted(first, key=index_of, reverse=True):
        if view not in given and view not in readers and readers.issuperset(view.users):
            first[view].own_views.append(view)
            readers.add(view)


# --- growing --------------------------------------------------------------------------------------
def _grow(
    graph: fx.Graph, anchor: fx.Node, order: Order, taken: set[fx.Node], given: Collection[fx.Node]
) -> Draft | None:
    """``taken``, ``given``: members and inputs of other regions."""
    val = facts(anchor).tensor
    if val is None or not val.is_floating_point():
        return None
    draft = _begin(anchor, val, order, taken)
    if draft is None:
        return None
    tainted: set[fx.Node] = set()  # outside, but after some member
    for node in _after(graph, draft.members, order):
        needs = order.needs(node)
        if not (needs & draft.members.keys() or needs & tainted):
            continue
        reads = any(n in draft.members for n in node.all_input_nodes)
        reads = reads and (bool(facts(node).writes) or not is_number(node))
        inside = order.needs_inside(node)
        reason = _refuse(draft, node, inside, tainted, taken) if reads else "not a reader of the region"
        if reason is None:
            reason = _join(draft, node, order)
        if reason is not None:
            tainted.add(node)
            if node in taken:  # the whole other region comes after this one
                tainted |= order._unit[node]
            if reads and node.op != "output":
                draft.ended.append((node, reason))
            elif reads:
                draft.ended.append((node, "its value is an output of the model"))
    _close(draft, given)
    if not draft.inputs:
        facts(anchor).refusal = "nothing reads what follows it"
        return None
    return draft


def _begin(anchor: fx.Node, val: Tensor, order: Order, taken: set[fx.Node]) -> Draft | None:
    """A region of the anchor and of what it takes in front of it; None where the anchor itself cannot be built."""
    mode = detect_fake_mode([val]) or FakeTensorMode()
    front = prologue_of(anchor, order, taken)
    while True:
        draft = Draft(anchor, Builder(fx.Graph(), mode), {}, {}, {}, [], [])
        failed = next(((i, why) for i, n in enumerate([*front, anchor]) if (why := _join(draft, n, order))), None)
        if failed is None:
            return draft
        at, reason = failed
        if at == len(front):
            facts(anchor).refusal = reason
            return None
        front = front[at + 1 :]  # what comes before that one stays outside with it


def _after(graph: fx.Graph, members: Collection[fx.Node], order: Order) -> list[fx.Node]:
    """The nodes that may come after some of ``members``, each behind all that it needs, whole regions included."""
    nodes = order.sorted(graph)
    return [n for n in nodes[min(map(nodes.index, members)) :] if n not in members]


def _refuse(draft: Draft, node: fx.Node, needs: set[fx.Node], tainted: set[fx.Node], taken: set[fx.Node]) -> str | None:
    """Why ``node`` may not join, seen from the graph; None where it may."""
    known = facts(node)
    if node.op == "output":
        return "the model ends"
    if node in taken:
        return "it belongs to another region"
    if known.call is None:
        return known.refusal or "it is not in the vocabulary"
    if vocabulary.lookup(known.call.op).kind is Kind.ANCHOR:
        return "it is the anchor of a region of its own"
    late = [n for n in needs if n in tainted]
    if any(facts(n).switches for n in late):
        return "autocast, gradients or another mode is switched between it and the region"
    if late:
        return f"it also needs {label(late[0])}, which comes after the region"
    if known.call.inplace:
        return _refuse_inplace(draft, node, known)
    if known.call.statistics is not None:
        shared = _touching(node, known.writes)
        if shared:
            return f"its running statistics are also used by {label(shared[0])}"
    elif known.writes:
        return "it writes to memory"
    return _refuse_alias(node, known)


def _refuse_inplace(draft: Draft, node: fx.Node, known: Facts) -> str | None:
    assert known.call is not None
    base = known.call.operands[0]
    if not isinstance(base, fx.Node) or base not in draft.members:
        return "it writes in place to a value from outside the region"
    for other in read_after(node, facts(base).holds):
        if other is not base:
            return f"it writes in place to memory that {label(other)} shares and that is read later"
    return None


def _refuse_alias(node: fx.Node, known: Facts) -> str | None:
    """A value that shares memory gets memory of its own in a region: no later write may be missed by a reader."""
    memory = known.holds & known.reads
    for writer in node.graph.nodes if memory else ():
        if facts(writer).index <= known.index or not writes_of(writer) & memory:
            continue
        given = [n for n in writer.all_input_nodes if facts(n).holds & memory]
        stale = [n for n in read_after(writer, memory) if len(given) > 1 or n not in given]
        if stale:
            return f"it shares memory that {label(writer)} writes to and that is read later as {label(stale[0])}"
    return None


def _touching(node: fx.Node, memory: frozenset[int]) -> list[fx.Node]:
    return [
        n
        for n in node.graph.nodes
        if n is not node and n.op not in ("placeholder", "output") and memory & (facts(n).reads | facts(n).holds)
    ]


def _join(draft: Draft, node: fx.Node, order: Order) -> str | None:
    """Add ``node`` to the chain; why not, and nothing changed, where it does not mean what torch did."""
    call, wanted = facts(node).call, facts(node).tensor
    assert call is not None
    if wanted is None:
        return "its value is not one tensor known before the call"
    if any(type(size) is int and size == 0 for size in wanted.shape):
        return "its value is empty: there is nothing to compute"
    devices = {
        t.device for o in call.operands if isinstance(o, fx.Node) and (t := facts(o).tensor) is not None and t.dim()
    }
    if len(devices) > 1:
        return "its operands are on several devices"
    graph, marks = draft.build.graph, set(draft.build.graph.nodes)
    inputs, views = dict(draft.inputs), dict(draft.views)
    try:
        operands = [_operand(draft, o, node, order) for o in call.operands]
        new = _call_as_eager(draft.build, call, operands, wanted, facts(node).autocast)
        value = draft.build.output(new, 0) if op_of(new).outputs > 1 else new
        if not same_type(value.meta["val"], wanted):
            raise TypeError(f"it would give {value.meta['val']} where torch gives {wanted}")
    except Exception as error:  # noqa: BLE001 - then the node stays as the model wrote it
        for added in reversed(graph.nodes):
            if added not in marks:
                graph.erase_node(added)
        draft.inputs, draft.views = inputs, views
        return f"its meaning could not be built ({type(error).__name__}: {error})"
    value.meta["label"] = new.meta["label"] = label(node)
    draft.members[node] = value
    if call.statistics is not None:
        draft.statistics.append((call.statistics, draft.build.output(new, 1), draft.build.output(new, 2)))
    return None


def _operand(draft: Draft, operand: Any, reader: fx.Node, order: Order) -> Any:
    if not isinstance(operand, fx.Node):
        return operand
    if operand in draft.members:
        return draft.members[operand]
    if reader is not draft.anchor and order.sees_through(operand, reader):
        if operand not in draft.views:
            draft.views[operand] = _view(draft, operand, reader, order)
        return draft.views[operand]
    if operand not in draft.inputs:
        if facts(operand).val.dtype not in DTYPE_NAMES:
            raise TypeError(f"{label(operand)} is of {facts(operand).val.dtype}")
        graph = draft.build.graph
        first = next((n for n in graph.nodes if n.op != "placeholder"), None)
        if first is None:
            draft.inputs[operand] = draft.build.input(operand.name, facts(operand).val)
        else:
            with graph.inserting_before(first):
                draft.inputs[operand] = draft.build.input(operand.name, facts(operand).val)
    return draft.inputs[operand]


def _view(draft: Draft, node: fx.Node, reader: fx.Node, order: Order) -> fx.Node:
    view = facts(node).call
    assert view is not None
    operands = [_operand(draft, o, reader, order) for o in view.operands]
    value = draft.build.call(view.op, *operands, **view.attributes)
    value.meta["label"] = label(node)
    return value


def _call_as_eager(build: Builder, call: Call, operands: list[Any], wanted: Tensor, autocast: bool) -> fx.Node:
    """The operator, with the casts written out that autocast would insert around it.

    Every policy of autocast is "run in this dtype", and shows in the dtype of the result: where it
    differs from the one without autocast, the floating-point operands are cast to it.
    """
    if not autocast:
        return build.call(call.op, *operands, **call.attributes)
    if vocabulary.lookup(call.op).kind is Kind.ANCHOR:  # fake tensors convolve values of mixed dtypes
        return build.call(call.op, *(_cast(build, o, wanted.dtype) for o in operands), **call.attributes)
    with contextlib.suppress(Exception):  # operands of mixed dtypes, which only the casts make equal
        plain = build.call(call.op, *operands, **call.attributes)
        val = plain.meta["val"][0] if isinstance(plain.meta["val"], tuple) else plain.meta["val"]
        if val.dtype is wanted.dtype:
            return plain
        build.graph.erase_node(plain)
    return build.call(call.op, *(_cast(build, o, wanted.dtype) for o in operands), **call.attributes)


def _cast(build: Builder, operand: Any, dtype: torch.dtype) -> Any:
    if isinstance(operand, fx.Node):
        val = operand.meta["val"]
        if val.is_floating_point() and val.dtype is not dtype:
            return build.call("cast", operand, dtype=dtype)
    return operand


def _close(draft: Draft, given: Collection[fx.Node]) -> None:
    """Name the values that leave the region, the statistics last, and drop what leads to none of them.

    ``given``: inputs of other regions, which may look through views in this one.
    """
    draft.outputs = [n for n in draft.members if n in given or any(u not in draft.members for u in n.users)]
    results = [draft.members[n] for n in draft.outputs]
    for _, mean, var in draft.statistics:
        results += [mean, var]
    draft.build.graph.output(tuple(results))
    eliminate_dead(draft.build.graph)
    for node, placeholder in list(draft.inputs.items()):
        if not placeholder.users:
            draft.build.graph.erase_node(placeholder)
            del draft.inputs[node]
