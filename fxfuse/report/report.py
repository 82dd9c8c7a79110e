"""The report: regions, rules, near misses, and the graph before and after."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxfuse import vocabulary
from fxfuse.kernels import execute
from fxfuse.partition import Draft, label
from fxfuse.patterns import Application, Rejection
from fxfuse.propagate import facts
from fxfuse.region import Region

if TYPE_CHECKING:
    from fxfuse.lower import Rewritten

_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class RegionReport:
    """One region: where it starts, what it holds, why it ended.

    ``operators`` are the model's nodes, ``stages`` the vocabulary's operators of the rewritten chain.
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

    def __str__(self) -> str:
        before, after = " > ".join(i.op for i in self.region.original.body), " > ".join(self.visible_stages)
        lines = [f"{self.anchor}: {before}"]
        if after != before:
            lines.append(f"rewritten: {after}")
        lines += [
            f"{count}x {rule}" if count > 1 else rule for rule, count in Counter(r.rule for r in self.rules).items()
        ]
        lines += [f"ends at {node}: {reason}" for node, reason in self.ended]
        return "\n".join(lines)

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
    """The name of the tensor that the anchor convolves, or of the input that it is cast from."""
    source = next(region.anchor.reads())
    made_by = {out: i for i in region.original.body for out in i.outs}
    while source in made_by:
        source = next(made_by[source].reads())
    return source


@dataclasses.dataclass
class Report:
    """What fxfuse did to a model. ``str()`` is a table for a terminal.

    ``notes`` say how the model was captured and what was left alone; ``rules`` name what fired where;
    ``rejected`` the near misses. ``graph_before`` and ``graph_after`` are fx graphs, None while there
    is no capture.
    """

    model: str = "model"
    notes: list[str] = dataclasses.field(default_factory=list)
    regions: list[RegionReport] = dataclasses.field(default_factory=list)
    rules: list[Application] = dataclasses.field(default_factory=list)
    rejected: list[Rejection] = dataclasses.field(default_factory=list)
    graph_before: fx.Graph | None = None
    graph_after: fx.Graph | None = None

    @property
    def headline(self) -> str:
        if not self.regions:
            return f"{self.model}: {'nothing to fuse' if self.graph_before is not None else 'runs as it is'}"
        regions = _count(len(self.regions), "region")
        operators = _count(sum(len(r.operators) for r in self.regions), "operator")
        return f"{self.model}: {regions} of {operators}, {_count(len(self.rules), 'rewrite')}"

    def __str__(self) -> str:
        lines = [self.headline, *(line for n in self.notes for line in _wrap(f"  note: {n}", 8))]
        for number, region in enumerate(self.regions, 1):
            first, *rest = str(region).splitlines()
            lines += ["", *_wrap(f"[{number}] {first}", 4), *(line for r in rest for line in _wrap(f"    {r}", 6))]
        if self.rules:
            lines += ["", "rewrites"]
            identities = dict.fromkeys((r.rule, r.identity) for r in self.rules)
            lines += [line for rule, identity in identities for line in _wrap(f"  {rule}: {identity}", 6)]
        if self.rejected:
            lines += ["", "near misses"]
            misses = dict.fromkeys(f"  {r.rule} at {r.node}: {r.reason}" for r in self.rejected)
            lines += [line for miss in misses for line in _wrap(miss, 6)]
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False) or [text]


def summarize(graph: fx.Graph, regions: Sequence[Rewritten], before: fx.Graph) -> Report:
    """The report of a partitioned graph, before it is lowered."""
    report = Report(graph_before=before)
    for rewritten in regions:
        draft = rewritten.draft
        report.regions.append(
            RegionReport(
                anchor=label(draft.anchor),
                operators=tuple(label(n) for n in draft.members),
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
