"""Graphs that are one region and nothing else: calls of the model go straight to what runs the region.

Torch's guards have compared all of such a call's tensors (:mod:`fxfuse.again`): the region need not compare its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
        regions = [n for n in graph.nodes if n.target is run_region]
        others = {*graph.nodes} - {*placeholders, *regions, graph.output_node()}
        results = graph.output_node().args[0]
        if len(regions) != 1 or {*results} != others or len(others) != 1:
            return None
        (result,) = others
        inputs, text = regions[0].args
        if result.target is not operator.getitem or not {*inputs} <= {*placeholders}:
            return None
        return Straight(text, tuple(map(placeholders.index, inputs)), result.args[1])  # type: ignore[arg-type]

    def way(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """A function of what the region takes, for calls that torch's guards do not tell apart."""
        output, run = self.output, repeated(self.text)
        return lambda inputs: run(inputs)[output]
