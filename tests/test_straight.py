"""Graphs that are one region: what they are, and what they take; calls are in ``kernels/test_recent.py``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxfuse.ops import run_region
from fxfuse.straight import Straight


def graph(results: Callable[..., Any]) -> fx.Graph:
    """Of three inputs and one region; ``results`` are made of the graph, the inputs and the first two outputs."""
    made = fx.Graph()
    given = [made.placeholder(name) for name in "abc"]
    region = made.call_function(run_region, ([given[2], given[0]], "text"))
    made.output(results(made, given, lambda i: made.call_function(operator.getitem, (region, i))))
    return made


@pytest.mark.parametrize("output", [0, 1])
def test_one_region(output: int) -> None:
    made = Straight.of(graph(lambda g, given, item: [item(output)]))
    assert made == Straight("text", (2, 0), output)


@pytest.mark.parametrize(
    "results",
    [
        lambda g, given, item: [item(0), item(1)],
        lambda g, given, item: [item(0), 1],
        lambda g, given, item: [given[0]],
        lambda g, given, item: [g.call_function(torch.relu, (item(0),))],
        lambda g, given, item: [g.call_function(torch.relu, (given[1],)), item(0)][1:],
        lambda g, given, item: [item(0), item(0)],
        lambda g, given, item: [g.call_function(operator.getitem, (given[0], 0))],
    ],
    ids=["two", "a number", "an input", "an operator behind", "another", "twice", "of an input"],
)
def test_more_than_that(results: Callable[..., Any]) -> None:
    assert Straight.of(graph(results)) is None


def test_a_region_of_what_was_computed() -> None:
    made = fx.Graph()
    x = made.call_function(torch.relu, (made.placeholder("x"),))
    made.output([made.call_function(operator.getitem, (made.call_function(run_region, ([x], "text")), 0))])
    assert Straight.of(made) is None
