"""The compiler on one page: propagate -> partition -> rewrite -> lower."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx, nn

from fxfuse.lower import lower, rewrite
from fxfuse.normalize import values_only
from fxfuse.ops import run_region
from fxfuse.partition import Order, forward_inplace_results, partition
from fxfuse.patterns import DEFAULT_RULES, Legality, Rule, Settings, given_rules
from fxfuse.propagate import isolated, propagate
from fxfuse.report import Report, summarize

log = logging.getLogger(__name__)

PRECISIONS = ("tf32", "ieee")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller may choose about the compilation. ``rules`` are applied in this order: the caller's own first."""

    precision: str | None = None
    allow: frozenset[Legality] = dataclasses.field(default_factory=lambda: Legality.parse(None))
    rules: tuple[Rule, ...] = DEFAULT_RULES

    @staticmethod
    def make(
        precision: str | None, allow: Collection[str | Legality] | None, *, rules: Sequence[Rule] | None = None
    ) -> Options:
        """Check what a caller gave; ValueError or TypeError names the value and what is accepted."""
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(
                f"precision={precision!r} is not one of {', '.join(map(repr, PRECISIONS))} or None (torch's settings)"
            )
        return Options(precision, Legality.parse(allow), (*given_rules(rules, DEFAULT_RULES), *DEFAULT_RULES))


def fuse(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    inputs: Sequence[Any],
    options: Options,
    target: Callable[..., Any] = run_region,
) -> Report:
    """Find, rewrite and replace the regions of ``graph``, in place; tell what happened.

    ``modules`` are the live modules of its ``call_module`` nodes; ``inputs`` hold one fake tensor (or
    other value) per placeholder; ``target`` is what a fused node calls, ``(tensors, region text)``.
    """
    before = copy.deepcopy(graph)
    settings = Settings.from_environment(options.allow)
    with isolated():
        values_only(graph)
        propagate(graph, modules, inputs)  # shapes, effects, and each node's meaning in the vocabulary
        forward_inplace_results(graph)
        order = Order(graph)
        drafts = partition(graph, order)  # one draft per anchor
        regions = [rewrite(d, options.rules, settings, options.precision) for d in drafts]  # the algebra
        report = summarize(graph, regions, before)
        lower(graph, order, regions, target)  # one node per region
    report.graph_after = graph
    log.info("%s", report.headline)
    return report
