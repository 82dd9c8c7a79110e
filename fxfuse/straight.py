"""Graphs that are one region and nothing else: calls of the model go straight to what runs the region.

Torch's guards have compared all of such a call's tensors (:mod:`fxfuse.again`): the region need not compare its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from fxfuse.ops import repeated, run_region


class Straight(NamedTuple):
    """The text of the region, what it takes, by position among the graph's inputs, and which output is the result."""

    text: str
    takes: tuple[int, ...]
    output: int

    @staticmethod
    def of(graph: fx.Graph) -> Straight | None:
        """What ``graph`` is; None where there is more in it, or more than one result."""
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        nodes = [n for n in graph.nodes if n.op != "placeholder"]
        if [n.target for n in nodes] != [run_region, operator.getitem, "output"]:
            return None
        region, result, output = nodes
        inputs: Any
        inputs, text = region.args
        if output.args != ([result],) or result.args[0] is not region or not {*inputs} <= {*placeholders}:
            return None
        return Straight(text, tuple(map(placeholders.index, inputs)), result.args[1])

    def way(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """A function of what the region takes, for calls that torch's guards do not tell apart."""
        return repeated(self.text, self.output)
