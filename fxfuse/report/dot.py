"""The graph before and after in Graphviz' language."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fxfuse.report import words
from fxfuse.report.nodes import NodeReport, fused_nodes

if TYPE_CHECKING:
    from fxfuse.report.report import Report

#: fills of the regions, in turns: ColorBrewer's "set3" without its greys and yellows
_COLOURS = ("#8dd3c7", "#bebada", "#fb8072", "#80b1d3", "#fdb462", "#b3de69", "#fccde5", "#bc80bd")


def text(report: Report) -> str:
    """A digraph with a cluster "before" and a cluster "after"; without either where there is no capture."""
    lines = [
        "digraph fxfuse {",
        f"  label={_quoted(report.headline)};",
        "  labelloc=t;",
        '  node [shape=box, fontname="monospace"];',
    ]
    if report.graph_after is not None:
        after = fused_nodes(report.graph_after, report.nodes, [r.region for r in report.regions])
        for name, nodes in (("before", report.nodes), ("after", after)):
            lines += [f"  subgraph cluster_{name} {{", f"    label={name};", *_cluster(name, nodes, report), "  }"]
    return "\n".join([*lines, "}"]) + "\n"


def _cluster(graph: str, nodes: Sequence[NodeReport], report: Report) -> Iterator[str]:
    drawn = [n for n in nodes if n.kind != "weight"]
    names = {n.name for n in drawn}
    for node in drawn:
        fill = "" if node.region is None else f', style=filled, fillcolor="{_COLOURS[node.region % len(_COLOURS)]}"'
        yield f"    {_quoted(f'{graph} {node.name}')} [label={_quoted(_label(node, report))}{fill}];"
    for node in drawn:
        for read in node.reads:
            if read in names:
                yield f"    {_quoted(f'{graph} {read}')} -> {_quoted(f'{graph} {node.name}')};"


def _label(node: NodeReport, report: Report) -> str:
    if node.kind == "region":
        assert node.region is not None
        region = report.regions[node.region]
        return f"{node.label}: {region.anchor}\n{' > '.join(region.visible_stages)}\n{words.sentence(region.account)}"
    return "\n".join(dict.fromkeys(t for t in (node.spelling, node.label, node.value) if t))


def _quoted(words_: str) -> str:
    return json.dumps(words_, ensure_ascii=False)
