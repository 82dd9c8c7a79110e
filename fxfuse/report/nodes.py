"""What a report keeps of the captured graph's nodes: plain text and numbers, no tensors."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.instr import DTYPE_NAMES
from fxfuse.propagate import UNKNOWN, facts, label
from fxfuse.region import Region


@dataclasses.dataclass(frozen=True)
class NodeReport:
    """One node of a graph, by its ``name`` in it.

    ``kind``: "input", "weight" (a parameter, buffer or constant), "operator", "output", or "region" (all operators
    of a region as one, with what reads its results). ``label``: a module's path,
    or the node's name; ``spelling``: a module's class, or a function's name. ``value``: dtype and shape of what it
    returns, "" where that is not a tensor; ``bytes`` of it, None where a size is not known. ``weights``: name and
    type of the parameters and buffers of a module's node. ``region``: position of its region in the report, None
    outside; ``reason``: why it is outside, "" for what is no operator on tensors.
    """

    name: str
    kind: str
    label: str
    spelling: str
    value: str
    bytes: int | None
    reads: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()
    region: int | None = None
    reason: str = ""


def node_reports(
    graph: fx.Graph, before: fx.Graph, members: Sequence[frozenset[str]], ended: Mapping[str, str]
) -> tuple[NodeReport, ...]:
    """The nodes of ``before`` with what the propagated ``graph``, made of it, knows of them.

    ``members``: names of the nodes of each region; ``ended``: why nodes that follow a region are not in it.
    """
    known = {n.name: n for n in graph.nodes if "fxfuse" in n.meta}
    regions = {name: i for i, names in enumerate(members) for name in names}
    return tuple(_report(n, known.get(n.name), regions.get(n.name), ended.get(n.name, "")) for n in before.nodes)


def fused_nodes(graph: fx.Graph, nodes: Sequence[NodeReport], regions: Sequence[Region]) -> tuple[NodeReport, ...]:
    """The nodes of a lowered graph, by what is known of the captured ``nodes``; every region is one of them."""
    known = {n.name: n for n in nodes}
    stands_for: dict[str, str] = {}  # a region's outputs are the region
    found = []
    for node in graph.nodes:
        reads = tuple(dict.fromkeys(stands_for.get(n.name, n.name) for n in node.all_input_nodes))
        region = region_of(node, regions)
        if region is not None:
            found.append(NodeReport(node.name, "region", f"region {region + 1}", "", "", None, reads, region=region))
        elif node.target is operator.getitem and region_of(node.args[0], regions) is not None:
            stands_for[node.name] = node.args[0].name
        elif node.name in known and known[node.name].region is None:
            found.append(dataclasses.replace(known[node.name], reads=reads))
        else:  # added by the compiler: a copy, an update of running statistics
            found.append(NodeReport(node.name, "operator", node.name, spelling(node), "", None, reads))
    return tuple(found)


def region_of(node: fx.Node, regions: Sequence[Region]) -> int | None:
    """The position of the region that a node of a lowered graph calls; None for another node."""
    called = node.meta.get("fxfuse_region")
    if called is None:
        return None
    same = (i for i, region in enumerate(regions) if region is called)
    alike = (i for i, region in enumerate(regions) if region == called)  # a copy of a report has other objects
    return next(same, next(alike, None))


def _report(node: fx.Node, known: fx.Node | None, region: int | None, ended: str) -> NodeReport:
    val = facts(known).val if known is not None else UNKNOWN
    weights = {name: p for name, p in node.meta.get("fxfuse_params", {}).items() if "fxfuse" in p.meta}
    return NodeReport(
        name=node.name,
        kind=_kind(node, val),
        label=label(node),
        spelling=spelling(node, facts(known).spelling if known is not None else ""),
        value=describe(val),
        bytes=_bytes(val),
        reads=tuple(dict.fromkeys(n.name for n in node.all_input_nodes)),
        weights=tuple((name, describe(facts(p).val)) for name, p in weights.items()),
        region=region,
        reason="" if region is not None or known is None else ended or _reason(known, val),
    )


def _kind(node: fx.Node, val: Any) -> str:
    if node.op == "placeholder":
        buffer = node.name.startswith("l_") and "_buffers_" in node.name  # as Dynamo calls them
        return "weight" if "fxfuse_lifted" in node.meta or isinstance(val, nn.Parameter) or buffer else "input"
    if node.op == "get_attr":
        return "weight"
    return "output" if node.op == "output" else "operator"


def _reason(node: fx.Node, val: Any) -> str:
    if not node.op.startswith("call") or not any(isinstance(v, Tensor) for v in pytree.tree_leaves(val)):
        return ""
    return facts(node).refusal or "no transposed convolution is in front of it"


def spelling(node: fx.Node, known: str = "") -> str:
    """What a node calls, in one word: "ConvTranspose3d", "cat", "add"."""
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target)).partition(".")[0]  # without an overload's name
    if node.op == "call_method":
        return str(node.target)
    return known if node.op == "call_module" else node.op


def describe(val: Any) -> str:
    """ "f32[2, 64, s0, 8, 8]", several of them in brackets; "" for what holds no tensor."""
    if isinstance(val, Tensor):
        sizes = ", ".join(map(str, val.shape))
        return f"{DTYPE_NAMES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(val, (tuple, list)) and any(isinstance(v, Tensor) for v in val):
        return f"({', '.join(describe(v) or '...' for v in val)})"
    return ""


def _bytes(val: Any) -> int | None:
    tensors = [v for v in pytree.tree_leaves(val) if isinstance(v, Tensor)]
    if val is UNKNOWN or not all(isinstance(s, int) for t in tensors for s in t.shape):
        return None
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
