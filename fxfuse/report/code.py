"""Graphs as Python that a person reads: one line per node, with the types of what it makes."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.graph import magic_methods
from torch.fx.node import _get_qualified_name

from fxfuse.report.nodes import region_of

if TYPE_CHECKING:
    from fxfuse.report.report import Report


def of_graph(report: Report, graph: fx.Graph | None) -> str:
    """The graph as a function, behind the programs of the regions that it calls; "" where there is none."""
    return "" if graph is None else _Writer(report, graph).text()


class _Writer:
    def __init__(self, report: Report, graph: fx.Graph) -> None:
        self.graph = graph
        self.known = {n.name: n for n in report.nodes}
        self.regions = [r.region for r in report.regions]
        self.region = {n: i for n in graph.nodes if (i := region_of(n, self.regions)) is not None}
        self.names: dict[fx.Node, str] = {}
        taken: set[str] = set()
        for node in graph.nodes:
            wanted = name = self._wanted(node)
            count = 1
            while name in taken:
                name, count = f"{wanted}_{count}", count + 1
            taken.add(name)
            self.names[node] = name

    def text(self) -> str:
        called = sorted(self.region.values())
        programs = [self.regions[i].rewritten.text(f"region_{i + 1}") + "\n" for i in called]
        read = [n for n in self.graph.nodes if n.op == "placeholder" and (n.users or not self._is_weight(n))]
        given = [f"{self.names[n]}{self._type(n, ': ')}" for n in read]
        short = ", ".join(["self", *given])
        head = short if len(short) < 80 else "\n" + "".join(f"    {g},\n" for g in ["self", *given])
        lines = [f"def forward({head}):"]
        for node in self.graph.nodes:
            line = self._line(node)
            if line:
                lines.append(f"    {line}{self._type(node, '  # ') if node.op != 'output' else ''}")
        return "\n".join([*programs, *lines]) + "\n"

    def _wanted(self, node: fx.Node) -> str:
        """The end of a module's path says enough in a line that names it all; a region's results have its number."""
        if node.op == "call_module":
            parts = str(node.target).split(".")
            last = next((i for i in reversed(range(len(parts))) if parts[i].isidentifier()), None)
            return node.name if last is None else "_".join(parts[last:])
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in self.region:
            return f"y{self.region[source] + 1}" + (f"_{node.args[1]}" if node.args[1] else "")
        return node.name

    def _is_weight(self, node: fx.Node) -> bool:
        known = self.known.get(node.name)
        return known is not None and known.kind == "weight"

    def _type(self, node: fx.Node, before: str) -> str:
        known = self.known.get(node.name)
        return f"{before}{known.value}" if known is not None and known.value else ""

    def _line(self, node: fx.Node) -> str:
        """The statement of a node; "" for one that needs none."""
        if node.op == "placeholder" or (node.target is operator.getitem and node.args[0] in self.region):
            return ""
        if node.op == "output":
            return f"return {self._show(node.args[0])}"
        if node in self.region:
            outs: dict[Any, str] = {u.args[1]: self.names[u] for u in node.users}
            names = [outs.get(i, "_") for i in range(1 + max(outs, default=0))]
            return f"{', '.join(names)} = region_{self.region[node] + 1}({self._all(node.args[0])})"
        return f"{self.names[node]} = {self._call(node)}"

    def _call(self, node: fx.Node) -> str:
        arguments = [self._show(a) for a in node.args]
        named = [f"{k}={self._show(v)}" for k, v in node.kwargs.items()]
        if node.op == "get_attr":
            return f"self.{node.target}"
        if node.op == "call_module":
            return f"self.{node.target}({', '.join([*arguments, *named])})"
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join([*arguments[1:], *named])})"
        if node.target is operator.getitem:
            return f"{arguments[0]}[{arguments[1]}]"
        name = getattr(node.target, "__name__", "")
        if getattr(node.target, "__module__", "") == "_operator" and name in magic_methods and not named:
            return str(magic_methods[name].format(*arguments))
        assert callable(node.target)
        return f"{_get_qualified_name(node.target)}({', '.join([*arguments, *named])})"

    def _all(self, values: Any) -> str:
        return ", ".join(map(self._show, values))

    def _show(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, tuple):
            return f"({self._all(value)}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{self._all(value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k!r}: {self._show(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({self._all([value.start, value.stop, value.step])})"
        return repr(value)
