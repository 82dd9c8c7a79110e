"""Put regions into the graph: rewrite each chain, replace its nodes by one, and sort the rest around it."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.chain import Builder, eliminate_dead, strides, to_graph, to_program
from fxfuse.ops import run_region, update_running_statistics
from fxfuse.order import Order
from fxfuse.partition import Draft
from fxfuse.patterns import Application, Rejection, RewriteError, Rule, Settings, apply_rules
from fxfuse.propagate import label
from fxfuse.region import Region

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A region with the story of its rewriting."""

    draft: Draft
    region: Region
    applied: list[Application]
    rejected: list[Rejection]


def rewrite(
    draft: Draft,
    rules: Sequence[Rule],
    settings: Settings,
    *,
    precision: str | None = None,
    kernels: bool = True,
    tune: bool = False,
) -> Rewritten:
    """Apply the algebra to a draft. Rules that come to no end, or edit the chain, leave it as it was.

    ``precision``, ``kernels``, ``tune``: how the region is to run, see :class:`~fxfuse.region.Region`.
    """
    original = to_program(draft.build.graph)
    build = _copy(draft.build, original)
    try:
        applied, rejected = apply_rules(build, rules, settings)
        if applied:
            _keep_layouts(build, draft.build)
        rewritten = to_program(build.graph)
    except RewriteError as error:
        log.warning(
            "rules are defective, and the chain of %s goes on as it was written: %s", label(draft.anchor), error
        )
        applied, rejected = [], [Rejection("the rewriting", label(draft.anchor), str(error))]
        rewritten = original
    names = tuple(a.rule for a in applied)
    statistics = tuple(i for i in range(len(original.outputs)) if not any(original.differentiable_in([i])))
    region = Region(original, rewritten, names, precision, statistics, kernels, tune)
    region.verify()
    return Rewritten(draft, region, applied, rejected)


def _copy(build: Builder, program: Any) -> Builder:
    """The same chain once more, labels included."""
    inputs = [n.meta["val"] for n in build.graph.nodes if n.op == "placeholder"]
    copy = to_graph(program, inputs)
    eliminate_dead(copy.graph)  # outputs of an operator of several that nothing reads
    for old, new in zip(build.graph.nodes, copy.graph.nodes, strict=True):
        if "label" in old.meta:
            new.meta["label"] = old.meta["label"]
    return copy


def _keep_layouts(build: Builder, original: Builder) -> None:
    """Give the outputs of a rewritten chain the layouts that they have in the original one."""
    output, before = build.graph.output_node(), original.graph.output_node()
    inputs = [n.meta["val"] for n in build.graph.nodes if n.op == "placeholder"]
    # what rules leave in place keeps the layout that was noted for it, whatever comes in front of it now
    made = to_graph(to_program(build.graph), inputs).graph.output_node()
    kept = []
    for node, new, old in zip(output.args[0], made.args[0], before.args[0], strict=True):  # type: ignore[arg-type]
        order = _order(old.meta["val"])
        if order is not None and strides(new.meta["val"]) != strides(old.meta["val"]):
            with build.graph.inserting_before(output):
                node = build.call("lay_out", node, order=order)
        kept.append(node)
    output.args = (tuple(kept),)


def _order(val: Tensor) -> tuple[int, ...] | None:
    """The dims of a dense tensor as they are in memory, the slowest first; None where it is not dense, or unknown."""
    if strides(val) is None:
        return None
    steps = val.stride()
    order = sorted(range(val.dim()), key=lambda d: (-steps[d], d))
    return tuple(order) if val.permute(order).is_contiguous() else None


def lower(graph: fx.Graph, order: Order, regions: Sequence[Rewritten], target: Callable[..., Any] = run_region) -> None:
    """Replace the members of every region by one call of ``target``, in place; lints the result."""
    sequence = order.sorted(graph)
    output = graph.output_node()
    placed: dict[fx.Node, list[fx.Node]] = {}
    updates: list[fx.Node] = []
    with graph.inserting_before(output):
        calls = [_call(graph, order, rewritten, target) for rewritten in regions]
        for rewritten, (fused, items) in zip(regions, calls, strict=True):
            updates += _updates(graph, rewritten, items)
            first = next(n for n in sequence if n in rewritten.draft.members)
            copies = [n for n in fused.all_input_nodes if n.target is torch.clone and n not in order.before]
            placed[first] = [*copies, fused, *items]
    for rewritten, (_, items) in zip(regions, calls, strict=True):
        for member, item in zip(rewritten.draft.outputs, items, strict=False):
            # what others wrote down about the value: its fake tensor, the line of the model
            item.meta.update((k, v) for k, v in member.meta.items() if not k.startswith("fxfuse"))
            for user in [u for u in member.users if u not in rewritten.draft.members]:
                user.replace_input_with(member, item)
    members = {m for r in regions for m in r.draft.operators}
    for node in sequence:
        for moved in placed.get(node, [node]):
            if moved not in members and moved is not output:
                output.prepend(moved)
    for node in updates:  # last: a call that fails on the way leaves the buffers as they were
        output.prepend(node)
    for node in reversed([n for n in sequence if n in members]):
        graph.erase_node(node)
    for item in [i for _, items in calls for i in items if not i.users]:
        graph.erase_node(item)
    graph.lint()


def _call(
    graph: fx.Graph, order: Order, rewritten: Rewritten, target: Callable[..., Any]
) -> tuple[fx.Node, list[fx.Node]]:
    """The fused node, and one node per output of the region.

    An input that is written to later is copied: a backward that runs the chain again needs it as it was.
    """
    inputs = [
        graph.call_function(torch.clone, (n,)) if order.written_after(n, rewritten.draft.members) else n
        for n in rewritten.draft.inputs
    ]
    fused = graph.call_function(target, (inputs, rewritten.region.text))
    fused.meta["fxfuse_region"] = rewritten.region
    count = len(rewritten.region.original.outputs)
    return fused, [graph.call_function(operator.getitem, (fused, i)) for i in range(count)]


def _updates(graph: fx.Graph, rewritten: Rewritten, items: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that update running statistics from the region's last outputs."""
    draft, kernels = rewritten.draft, rewritten.region.kernels
    values = iter(items[len(draft.outputs) :])
    return [
        graph.call_function(
            update_running_statistics,
            (buffers.mean, buffers.var, buffers.count, next(values), next(values), buffers.momentum, kernels),
        )
        for buffers, _, _ in draft.statistics
    ]
