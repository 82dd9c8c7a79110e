"""The graph before and after as boxes and lines: whole, and with what is not fused collapsed into groups."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fxfuse.report import words
from fxfuse.report.layout import layered
from fxfuse.report.nodes import NodeReport, fused_nodes

if TYPE_CHECKING:
    from fxfuse.report.report import RegionReport, Report

#: width of a character of the page's monospaced type at its two sizes, height of a line, and what is around it
CHARACTER, SMALL, LINE, PADDING = 7.5, 6.7, 16.0, 11.0
#: the longest text in a box; of a longer one the end is kept
MOST_CHARACTERS = 34
#: kinds of operators that a group's box names
MOST_KINDS = 4


@dataclasses.dataclass(frozen=True)
class Box:
    """What is drawn for one node, or for several: ``kind`` "input", "operator", "output", "region" or "group"."""

    name: str
    kind: str
    title: str
    lines: tuple[str, ...]
    members: tuple[str, ...]
    region: int | None = None

    @property
    def size(self) -> tuple[float, float]:
        text = max([len(self.title) * CHARACTER, *(len(line) * SMALL for line in self.lines)])
        return text + 2 * PADDING + 4, LINE * (1 + len(self.lines)) + 2 * PADDING - 5


def drawings(report: Report) -> dict[str, Any]:
    """The graph "before" and "after", each "whole" and "collapsed", laid out: for JSON. Empty without a capture."""
    if report.graph_before is None or report.graph_after is None or not report.nodes:
        return {}
    after = fused_nodes(report.graph_after, report.nodes, [r.region for r in report.regions])
    found = {}
    for name, nodes in (("before", report.nodes), ("after", after)):
        boxes, edges = _boxes(nodes, report.regions)
        found[name] = {
            "whole": _laid_out(boxes, edges),
            "collapsed": _laid_out(*_collapsed(boxes, edges, nodes)),
        }
    return found


# --- boxes ----------------------------------------------------------------------------------------
Edges = list[tuple[str, str]]


def _boxes(nodes: Sequence[NodeReport], regions: Sequence[RegionReport]) -> tuple[list[Box], Edges]:
    """One box per node that is no weight, and the lines between them."""
    drawn = [n for n in nodes if n.kind != "weight"]
    names = {n.name for n in drawn}
    boxes = [_box(n, regions) for n in drawn]
    return boxes, [(r, n.name) for n in drawn for r in n.reads if r in names]


def _box(node: NodeReport, regions: Sequence[RegionReport]) -> Box:
    if node.kind == "region":
        assert node.region is not None
        return _region(node, node.region, regions[node.region])
    if node.kind == "operator":
        # a name that fx made of the function's says nothing new
        own = node.label if node.label.rstrip("_0123456789") != node.spelling else ""
        return _made(node, node.spelling, own, node.value)
    if node.kind == "output":
        return _made(node, "output")
    return _made(node, node.label, node.value)


def _made(node: NodeReport, title: str, *lines: str) -> Box:
    shown = tuple(shortened(line) for line in lines if line)
    return Box(node.name, node.kind, shortened(title), shown, (node.name,), node.region)


def _region(node: NodeReport, number: int, region: RegionReport) -> Box:
    account = region.account
    if account is None:
        lines = [*_wrapped(" > ".join(region.visible_stages)), "sizes are not known"]
    else:
        marks = {"kernel": "\N{BLACK SQUARE}", "helper": "\N{BLACK SMALL SQUARE}", "torch": "\N{WHITE SQUARE}"}
        lines = [line for p in account.parts for line in _wrapped(f"{marks[p.by]} {p.what}")]
        seconds = f"{words.duration(account.seconds)} est." if account.kernels else "by torch"
        saved = [f"{words.size(account.unwritten)} never written"] if account.unwritten else []
        lines += [seconds, *saved]
    mark = f"[{number + 1}] "
    title = mark + shortened(region.anchor, MOST_CHARACTERS - len(mark))
    return Box(node.name, "region", title, tuple(map(shortened, lines)), (node.name,), number)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """The end of a text that is too long for a box: of a path that is what tells it from others."""
    return text if len(text) <= most else f"\N{HORIZONTAL ELLIPSIS}{text[1 - most :]}"


def _wrapped(stages: str) -> list[str]:
    return textwrap.wrap(stages, MOST_CHARACTERS, subsequent_indent="  ", break_on_hyphens=False)


# --- groups ---------------------------------------------------------------------------------------
def _collapsed(boxes: Sequence[Box], edges: Edges, nodes: Sequence[NodeReport]) -> tuple[list[Box], Edges]:
    """Neighbours that are in no region as one box each, so that no line leads back.

    Operators may be grouped where as many regions come before them: a line never leads to fewer.
    """
    reads: dict[str, list[str]] = {b.name: [] for b in boxes}
    for a, b in edges:
        reads[b].append(a)
    depth = _depths(boxes, reads)
    loose = {b.name for b in boxes if b.kind == "operator" and b.region is None}
    leader = {name: name for name in loose}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for a, b in edges:
        if a in loose and b in loose and depth[a] == depth[b]:
            leader[find(b)] = find(a)
    members: dict[str, list[str]] = {}
    for box in boxes:
        members.setdefault(find(box.name) if box.name in loose else box.name, []).append(box.name)
    known, drawn = {n.name: n for n in nodes}, {b.name: b for b in boxes}
    groups = [_group([known[m] for m in names]) if len(names) > 1 else drawn[names[0]] for names in members.values()]
    stands_in = {m: group.name for group in groups for m in group.members}
    lines = dict.fromkeys((stands_in[a], stands_in[b]) for a, b in edges if stands_in[a] != stands_in[b])
    return _sorted(groups, list(lines)), list(lines)


def _depths(boxes: Sequence[Box], reads: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The most regions on a way to every box; a region's own boxes have one depth, as they are one operator."""
    known = {b.name: b for b in boxes}
    depth: dict[str, int] = dict.fromkeys(known, 0)
    together: dict[int, int] = {}
    changed = True
    while changed:  # what a region's last box needs counts for its first one, and for what follows that
        changed = False
        for box in boxes:
            steps = [
                depth[a] + (known[a].region is not None and known[a].region != box.region) for a in reads[box.name]
            ]
            least = max([depth[box.name], *steps])
            if box.region is not None:
                least = together[box.region] = max(least, together.get(box.region, 0))
            changed |= least != depth[box.name]
            depth[box.name] = least
    return depth


def _group(nodes: Sequence[NodeReport]) -> Box:
    operators = [n for n in nodes if n.value] or nodes
    kinds = Counter(n.spelling for n in operators).most_common()
    lines = [f"{count} {kind}" if count > 1 else kind for kind, count in kinds[:MOST_KINDS]]
    if len(kinds) > MOST_KINDS:
        lines.append(f"and {words.count(len(kinds) - MOST_KINDS, 'other kind')}")
    title = f"{len(nodes)} operators"
    return Box(f"group {nodes[0].name}", "group", title, tuple(map(shortened, lines)), tuple(n.name for n in nodes))


def _sorted(boxes: Sequence[Box], edges: Edges) -> list[Box]:
    """The boxes in topological order, else as given."""
    known = {b.name: b for b in boxes}
    readers: dict[str, list[str]] = {name: [] for name in known}
    missing = dict.fromkeys(known, 0)
    for a, b in edges:
        readers[a].append(b)
        missing[b] += 1
    ready = [name for name in known if not missing[name]]
    for name in ready:  # grows on the way
        for reader in readers[name]:
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    assert len(ready) == len(known), "groups make a cycle"
    return [known[name] for name in ready]


# --- for the page ---------------------------------------------------------------------------------
def _laid_out(boxes: Sequence[Box], edges: Edges) -> dict[str, Any]:
    layout = layered({b.name: b.size for b in boxes}, edges)
    drawn = []
    for box in boxes:
        x, y, width, height = layout.boxes[box.name]
        facts = dataclasses.asdict(box)
        drawn.append({**facts, "x": _round(x), "y": _round(y), "width": _round(width), "height": _round(height)})
    lines = [
        {"from": a, "to": b, "points": [_round(c) for point in points for c in point]}
        for (a, b), points in zip(edges, layout.edges, strict=True)
    ]
    return {
        "boxes": drawn,
        "lines": lines,
        "hulls": _hulls(drawn),
        "width": _round(layout.width),
        "height": _round(layout.height),
    }


def _hulls(boxes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rectangle around each region of several boxes, where no other box is in it."""
    found, all_boxes = [], list(boxes)
    inside = sorted((b for b in all_boxes if b["region"] is not None), key=lambda b: b["region"])
    for region, members in ((k, list(g)) for k, g in itertools.groupby(inside, key=lambda b: b["region"])):
        left, top = min(b["x"] for b in members), min(b["y"] for b in members)
        right = max(b["x"] + b["width"] for b in members)
        bottom = max(b["y"] + b["height"] for b in members)
        others = (b for b in all_boxes if b["region"] != region)
        apart = all(
            b["x"] > right or b["x"] + b["width"] < left or b["y"] > bottom or b["y"] + b["height"] < top
            for b in others
        )
        if len(members) > 1 and apart:
            found.append({"region": region, "x": left, "y": top, "width": right - left, "height": bottom - top})
    return found


def _round(number: float) -> float:
    return round(number, 1)
