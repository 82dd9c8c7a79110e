"""A report as plain data: what the page shows, and what ``Report.to_json`` writes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fxfuse.kernels.account import Account, Part
from fxfuse.kernels.compilation.jit import Cubin, compile_cubin, compiled
from fxfuse.kernels.planning import estimate as rates
from fxfuse.report import text, words
from fxfuse.report.nodes import fused_nodes
from fxfuse.version import __version__

if TYPE_CHECKING:
    from fxfuse.report.report import RegionReport, Report

#: version of the document: raised when a key changes its meaning or goes
SCHEMA = 1


def document(report: Report, registers: bool = False) -> dict[str, Any]:
    """The report as dicts, lists, strings and numbers. Bytes, seconds and multiply-adds are plain numbers.

    Keys: "schema", "fxfuse" (versions); "model", "headline", "notes"; "regions", each with its anchor, operators,
    programs, rules, ends, sentence and "account" (None where sizes are not known); "rules" with identities and where
    they fired; "near_misses"; "staying"; "nodes" before and after; "code" before and after; "machine": the rates that
    estimates assume; "parts": the same for parts of a model, by path.
    """
    regions = [r.region for r in report.regions]
    after = fused_nodes(report.graph_after, report.nodes, regions) if report.graph_after is not None else ()
    return {
        "schema": SCHEMA,
        "fxfuse": __version__,
        "model": report.model,
        "headline": report.headline,
        "captured": report.graph_before is not None,
        "notes": list(report.notes),
        "regions": [_region(r, registers) for r in report.regions],
        "rules": [
            {"rule": rule, "identity": identity, "nodes": [r.node for r in report.rules if r.rule == rule]}
            for rule, identity in text.identities(report)
        ],
        "near_misses": [{"rule": rule, "node": node, "reason": why} for rule, node, why in text.misses(report)],
        "staying": dict(sorted(report.staying.items(), key=lambda item: (-item[1], item[0]))),
        "nodes": {
            "before": [dataclasses.asdict(n) for n in report.nodes],
            "after": [dataclasses.asdict(n) for n in after],
        },
        "code": {"before": report.code_before, "after": report.code_after},
        "machine": {
            "name": "H100",
            "bandwidth": rates.BANDWIDTH,
            "half_rate": rates.HALF_RATE,
            "tf32_rate": rates.TF32_RATE,
        },
        "parts": {path: document(part, registers) for path, part in report.parts.items()},
    }


def _region(region: RegionReport, registers: bool) -> dict[str, Any]:
    known = region.account
    return {
        "anchor": region.anchor,
        "operators": list(region.operators),
        "chain": list(region.chain),
        "stages": list(region.visible_stages),
        "rules": text.rule_counts(region),
        "ended": [{"node": node, "reason": reason} for node, reason in region.ended],
        "sentence": region.sentence,
        "summary": words.sentence(known),
        "refusal": words.refusal(known),
        "plan": region.plan,
        "programs": {"original": region.region.original.text("original"), "rewritten": _rewritten(region)},
        "account": _account(known, registers) if known is not None else None,
    }


def _rewritten(region: RegionReport) -> str:
    """The rewritten program; "" where it is the original one."""
    pair = region.region
    return pair.rewritten.text("rewritten") if pair.rewritten != pair.original else ""


def _account(known: Account, registers: bool) -> dict[str, Any]:
    return {
        "before": _part(known.before, False),
        "parts": [_part(p, registers) for p in known.parts],
        "kernels": known.kernels,
        "launches": known.launches,
        "given": known.given,
        "made": known.made,
        "bytes": known.bytes,
        "macs": known.macs,
        "saved": known.saved,
        "unwritten": known.unwritten,
        "seconds": known.seconds,
        "floor": known.floor,
    }


def _part(part: Part, registers: bool) -> dict[str, Any]:
    facts = {**dataclasses.asdict(part), "facts": [{"name": n, "value": v} for n, v in part.facts]}
    return {**facts, "resources": _resources(part.source, registers)}


def _resources(source: str, compile_it: bool) -> dict[str, Any]:
    """What each kernel of a source takes, as far as it is compiled, or is to be."""
    if not source:
        return {}
    cubin: Cubin | None = compile_cubin(source) if compile_it else compiled(source)
    return {name: dataclasses.asdict(r) for name, r in cubin.kernels.items()} if cubin is not None else {}
