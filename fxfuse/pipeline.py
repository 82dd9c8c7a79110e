"""The compiler on one page: propagate -> partition -> rewrite -> lower."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxfuse.kernels import dump
from fxfuse.kernels.execute import dump_planned
from fxfuse.lower import lower, rewrite
from fxfuse.normalize import values_only
from fxfuse.ops import run_region
from fxfuse.order import Order
from fxfuse.partition import forward_inplace_results, partition
from fxfuse.patterns import DEFAULT_RULES, Legality, Rule, Settings, given_rules
from fxfuse.propagate import isolated, propagate
from fxfuse.report import Report, summarize
from fxfuse.sizes import sizes_as_numbers

log = logging.getLogger(__name__)

PRECISIONS = ("tf32", "ieee")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller may choose about the compilation. ``rules`` are applied in this order: the caller's own first."""

    precision: str | None = None
    allow: frozenset[Legality] = dataclasses.field(default_factory=lambda: Legality.parse(None))
    rules: tuple[Rule, ...] = DEFAULT_RULES
    kernels: bool = True
    tune: bool = False

    @staticmethod
    def make(
        precision: str | None,
        allow: Collection[str | Legality] | None,
        kernels: bool = True,
        tune: bool = False,
        *,
        rules: Sequence[Rule] | None = None,
    ) -> Options:
        """Check what a caller gave; ValueError or TypeError names the value and what is accepted."""
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(
                f"precision={precision!r} is not one of {', '.join(map(repr, PRECISIONS))} or None (torch's settings)"
            )
        for name, value in (("kernels", kernels), ("tune", tune)):
            if type(value) is not bool:
                raise ValueError(f"{name}={value!r} is not True or False")
        if tune and not kernels:
            raise ValueError("tune=True measures kernels against torch, and kernels=False leaves them out: choose one")
        chosen = (*given_rules(rules, DEFAULT_RULES), *DEFAULT_RULES)
        return Options(precision, Legality.parse(allow), chosen, kernels, tune)


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
    settings.warn_of_unknown(options.rules)
    with isolated():
        values_only(graph)
        propagate(graph, modules, inputs)  # shapes, effects, and each node's meaning in the vocabulary
        sizes_as_numbers(graph)
        forward_inplace_results(graph)
        order = Order(graph)
        drafts = partition(graph, order)  # one draft per anchor
        regions = [  # the algebra
            rewrite(d, options.rules, settings, precision=options.precision, kernels=options.kernels, tune=options.tune)
            for d in drafts
        ]
        report = summarize(graph, regions, before)
        lower(graph, order, regions, target)  # one node per region
    report.graph_after = graph
    if dump.wanted() and not any(isinstance(t, Tensor) and t.is_cuda for t in inputs):  # there it is written as it runs
        for rewritten in regions:
            dump_planned(rewritten.region)
    log.info("%s", report.headline)
    return report
