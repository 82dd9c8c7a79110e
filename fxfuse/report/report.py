"""The report: regions, rules, near misses, and the graph before and after."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, fx

from fxfuse import vocabulary
from fxfuse.kernels import execute
from fxfuse.kernels.account import Account, account
from fxfuse.kernels.codegen.chains import elements, needed_by
from fxfuse.partition import Draft
from fxfuse.patterns import Application, Rejection
from fxfuse.propagate import facts, label
from fxfuse.region import Region
from fxfuse.report import code, document, dot, page, text, words
from fxfuse.report.nodes import NodeReport, node_reports

if TYPE_CHECKING:
    from fxfuse.lower import Rewritten


@dataclasses.dataclass(frozen=True)
class RegionReport:
    """One region: where it starts, what it holds, why it ended.

    ``anchor`` is the path or node of the convolution, ``operators`` are the model's nodes, ``rules`` the rewrites in
    the order in which they were applied, ``ended`` pairs of a node and the reason why the region ends there.
    """

    anchor: str
    operators: tuple[str, ...]
    region: Region
    rules: tuple[Application, ...]
    ended: tuple[tuple[str, str], ...]
    strides: tuple[tuple[int, ...], ...] | None = None  #: of its inputs; None where they are not known
    device: torch.device | None = None  #: of its inputs

    @property
    def stages(self) -> tuple[str, ...]:
        """The operators of the rewritten chain, those on weights included, in order."""
        return tuple(i.op for i in self.region.rewritten.body)

    @property
    def plan(self) -> str:
        """What runs in a call without gradients, step by step, for the sizes that the region names.

        On the GPU of the inputs, and as it was measured where it was; for inputs on the CPU on a Hopper GPU.
        """
        return execute.describe(self.region, self.strides, self.device)

    @property
    def source(self) -> str:
        """The CUDA C++ of the kernels of that plan; empty where it has none."""
        return execute.source(self.region, self.strides, self.device)

    @property
    def account(self) -> Account | None:
        """Launches, bytes, multiply-adds and seconds before and after; None where a size is not known."""
        return account(self.region, self.strides, self.device)

    @property
    def chain(self) -> tuple[str, ...]:
        """The operators of the chain as the model wrote it, in the vocabulary's terms."""
        return tuple(i.op for i in self.region.original.body)

    @property
    def sentence(self) -> str:
        """The chain and what became of it, in a line."""
        return f"{' > '.join(self.chain)}: {words.sentence(self.account)}"

    def __str__(self) -> str:
        return "\n".join(text.region_lines(self))

    @property
    def visible_stages(self) -> tuple[str, ...]:
        """The stages that touch activations: what depends on weights alone is not worth a word."""
        touched, shown = {_data_input(self.region)}, []
        for instr in self.region.rewritten.body:
            if not touched.isdisjoint(instr.reads()):
                touched.update(instr.outs)
                shown.append(instr.op)
        return tuple(shown)


def _data_input(region: Region) -> str:
    """The name of the tensor that the anchor convolves, or of the largest input that it is made of."""
    convolved = next(region.anchor.reads())
    read = {convolved, *(n for i in needed_by(region.original.body, [convolved]) for n in i.reads())}
    return max((elements(kind), name) for name, kind in region.original.inputs if name in read)[1]


@dataclasses.dataclass
class Report:
    """What fxfuse did to a model. ``str()`` is a table for a terminal.

    ``notes`` say how the model was captured and what was left alone; ``rules`` name what fired where;
    ``rejected`` the near misses. ``graph_before`` and ``graph_after`` are fx graphs, None while there
    is no capture; ``nodes`` tell of the former's. ``parts`` are the reports of parts of a model, by their
    path, where several were optimised.
    """

    model: str = "model"
    notes: list[str] = dataclasses.field(default_factory=list)
    regions: list[RegionReport] = dataclasses.field(default_factory=list)
    rules: list[Application] = dataclasses.field(default_factory=list)
    rejected: list[Rejection] = dataclasses.field(default_factory=list)
    graph_before: fx.Graph | None = None
    graph_after: fx.Graph | None = None
    nodes: tuple[NodeReport, ...] = dataclasses.field(default=(), repr=False)
    parts: dict[str, Report] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def headline(self) -> str:
        """The first line: how many regions, operators and rewrites there are."""
        if not self.regions:
            return f"{self.model}: {'nothing to fuse' if self.graph_before is not None else 'runs as it is'}"
        regions = words.count(len(self.regions), "region")
        operators = words.count(sum(len(r.operators) for r in self.regions), "operator")
        return f"{self.model}: {regions} of {operators}, {words.count(len(self.rules), 'rewrite')}"

    @property
    def staying(self) -> dict[str, int]:
        """What stays in torch: operators on tensors that are in no region, with how often they occur."""
        return dict(Counter(n.spelling for n in self.nodes if n.kind == "operator" and n.region is None and n.value))

    def __str__(self) -> str:
        return text.plain(self)

    def __rich__(self) -> Any:
        return text.rich(self)

    def _repr_html_(self) -> str:
        return page.notebook(self)

    def show(self, file: TextIO | None = None) -> None:
        """Print the report, to standard output or ``file``: in colour on a terminal where rich is installed."""
        text.show(self, file)

    def to_html(self, path: str | os.PathLike[str], *, registers: bool = False) -> pathlib.Path:
        """Write a page that shows the graph before and after, every region's plan and source; the path of it.

        The page is one file, which works offline. ``registers``: compile the kernels that are not in the cache, for
        the registers that they take; this needs no GPU, but NVRTC (``fxfuse[cuda]``) and some seconds per kernel.
        """
        return page.write(self, pathlib.Path(path), registers)

    def to_json(self) -> str:
        """What the page shows, as JSON: see :func:`fxfuse.report.document.document`."""
        return json.dumps(document.document(self), indent=1)

    def to_dot(self) -> str:
        """The graph before and after in Graphviz' language, regions coloured."""
        return dot.text(self)

    @property
    def code_before(self) -> str:
        """The captured graph as Python, for reading; empty without a capture."""
        return code.of_graph(self, self.graph_before)

    @property
    def code_after(self) -> str:
        """The graph with its regions as Python, for reading; empty without a capture."""
        return code.of_graph(self, self.graph_after)


def summarize(graph: fx.Graph, regions: Sequence[Rewritten], before: fx.Graph) -> Report:
    """The report of a partitioned graph, before it is lowered."""
    members = [frozenset(n.name for n in r.draft.operators) for r in regions]
    ended = {n.name: reason for r in regions for n, reason in r.draft.ended}
    report = Report(graph_before=before, nodes=node_reports(graph, before, members, ended))
    for rewritten in regions:
        draft = rewritten.draft
        report.regions.append(
            RegionReport(
                anchor=label(draft.anchor),
                operators=tuple(label(n) for n in draft.operators),
                region=rewritten.region,
                rules=tuple(rewritten.applied),
                ended=tuple((label(n) if n.op != "output" else "the output", reason) for n, reason in draft.ended),
                strides=_strides(draft),
                device=_device(draft),
            )
        )
        report.rules += rewritten.applied
        report.rejected += rewritten.rejected
    inside = {n for r in regions for n in r.draft.members}
    for node in graph.nodes:
        if node not in inside and _names_an_anchor(node):
            reason = facts(node).refusal or "its value is not known before the call"
            report.rejected.append(Rejection("the region", label(node), reason))
    return report


def _inputs(draft: Draft) -> list[Tensor]:
    """Fake tensors for a region's inputs."""
    return [n.meta["val"] for n in draft.build.graph.nodes if n.op == "placeholder"]


def _strides(draft: Draft) -> tuple[tuple[int, ...], ...] | None:
    found = tuple(tuple(t.stride()) for t in _inputs(draft))
    return found if all(isinstance(s, int) for strides in found for s in strides) else None


def _device(draft: Draft) -> torch.device | None:
    found = {t.device for t in _inputs(draft)}
    return found.pop() if len(found) == 1 else None


def _names_an_anchor(node: fx.Node) -> bool:
    """Whether a node that is in no region would have been an anchor, by its name."""
    spelled = facts(node).spelling.lower().replace("_", "")
    known = vocabulary.names(vocabulary.Kind.ANCHOR)
    return node.op.startswith("call") and any(name.replace("_", "") in spelled for name in known)
