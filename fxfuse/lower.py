"""Put regions into the graph: rewrite each chain, replace its nodes by one, and sort the rest around it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxfuse.chain import Builder, to_graph, to_program
from fxfuse.ops import run_region, update_running_statistics
from fxfuse.partition import Draft, Order
from fxfuse.patterns import Application, Rejection, RewriteError, Rule, Settings, apply_rules
from fxfuse.region import Region


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A region with the story of its rewriting."""

    draft: Draft
    region: Region
    applied: list[Application]
    rejected: list[Rejection]


def rewrite(draft: Draft, rules: Sequence[Rule], settings: Settings, precision: str | None) -> Rewritten:
    """Apply the algebra to a draft. Rules that come to no end leave the chain as it was."""
    original = to_program(draft.build.graph)
    build = _copy(draft.build, original)
    try:
        applied, rejected = apply_rules(build, rules, settings)
        rewritten = to_program(build.graph)
    except RewriteError as error:
        applied, rejected = [], [Rejection("the rewriting", draft.anchor.name, str(error))]
        rewritten = original
    count = len(original.outputs)
    region = Region(
        original,
        rewritten,
        tuple(a.rule for a in applied),
        precision,
        tuple(range(count - 2 * len(draft.statistics), count)),
    )
    region.verify()
    return Rewritten(draft, region, applied, rejected)


def _copy(build: Builder, program: Any) -> Builder:
    """The same chain once more, labels included."""
    inputs = [n.meta["val"] for n in build.graph.nodes if n.op == "placeholder"]
    copy = to_graph(program, inputs)
    for old, new in zip(build.graph.nodes, copy.graph.nodes, strict=True):
        if "label" in old.meta:
            new.meta["label"] = old.meta["label"]
    return copy


def lower(graph: fx.Graph, order: Order, regions: Sequence[Rewritten], target: Callable[..., Any] = run_region) -> None:
    """Replace the members of every region by one call of ``target``, in place; lints the result."""
    sequence = order.sorted(graph)
    output = graph.output_node()
    updates: list[fx.Node] = []
    replaced: dict[fx.Node, list[fx.Node]] = {}
    for rewritten in regions:
        draft = rewritten.draft
        inputs = list(draft.inputs)
        placeholders = [n for n in draft.build.graph.nodes if n.op == "placeholder"]
        inputs.sort(key=lambda n, d=draft, p=placeholders: p.index(d.inputs[n]))  # type: ignore[misc]
        with graph.inserting_before(output):
            fused = graph.call_function(target, (inputs, rewritten.region.text))
            fused.meta["fxfuse_region"] = rewritten.region
            items = [
                graph.call_function(operator.getitem, (fused, i)) for i in range(len(rewritten.region.original.outputs))
            ]
            statistics = iter(items[len(draft.outputs) :])
            for buffers, _, _ in draft.statistics:
                mean, var = next(statistics), next(statistics)
                args = (buffers.mean, buffers.var, buffers.count, mean, var, buffers.momentum)
                updates.append(graph.call_function(update_running_statistics, args))
        for member, item in zip(draft.outputs, items, strict=False):
            member.replace_all_uses_with(item, delete_user_cb=lambda user, d=draft: user not in d.members)  # type: ignore[misc]
            item.meta["label"] = member.name
        first = next(n for n in sequence if n in draft.members)
        replaced[first] = [fused, *items]
    members = {m for r in regions for m in r.draft.members}
    final: list[fx.Node] = []
    for node in sequence:
        if node in replaced:
            final += replaced[node]
        elif node not in members and node is not output:
            final.append(node)
    for node in members:
        node.args, node.kwargs = (), {}
    for node in members:
        graph.erase_node(node)
    for node in [*final, *updates]:
        output.prepend(node)
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    graph.lint()
