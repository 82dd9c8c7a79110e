"""The report on a terminal: plain text, or in colour by way of rich."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from fxfuse.report import words

if TYPE_CHECKING:
    from fxfuse.report.report import RegionReport, Report

_WIDTH = 100
#: what the figures of regions hold for
LEGEND = "figures by estimate: contiguous inputs, a call without gradients"


# --- plain ----------------------------------------------------------------------------------------
def plain(report: Report) -> str:
    """The report in lines of at most 100 columns."""
    lines = [report.headline, *(line for n in report.notes for line in _wrap(f"  note: {n}", 8))]
    for number, region in enumerate(report.regions, 1):
        first, *rest = region_lines(region)
        lines += ["", *_wrap(f"[{number}] {first}", 4), *(line for r in rest for line in _wrap(f"    {r}", 6))]
    if report.rules:
        lines += ["", "rewrites"]
        lines += [line for rule, identity in identities(report) for line in _wrap(f"  {rule}: {identity}", 6)]
    if report.rejected:
        lines += ["", "near misses"]
        lines += [line for rule, node, why in misses(report) for line in _wrap(f"  {rule} at {node}: {why}", 6)]
    if report.staying:
        lines += ["", "stays in torch", *_wrap(f"  {counted(report.staying)}", 2)]
    if report.regions:
        lines += ["", f"({LEGEND})"]
    return "\n".join(lines)


def region_lines(region: RegionReport) -> list[str]:
    """The chain; what runs and what that saves; the rewritten chain; the rules; the ends."""
    before, after = " > ".join(region.chain), " > ".join(region.visible_stages)
    lines = [f"{region.anchor}: {before}", f"on an H100: {words.sentence(region.account)}"]
    lines += filter(None, [words.refusal(region.account)])
    if after != before:
        lines.append(f"rewritten: {after}")
    lines += rule_counts(region)
    lines += [f"ends at {node}: {reason}" for node, reason in region.ended]
    return lines


def rule_counts(region: RegionReport) -> list[str]:
    """The rules that fired, each once: "2x MoveAffineBehindMean"."""
    return [f"{n}x {rule}" if n > 1 else rule for rule, n in Counter(r.rule for r in region.rules).items()]


def identities(report: Report) -> list[tuple[str, str]]:
    """The rules that fired anywhere, each once, with their identities."""
    return list(dict.fromkeys((r.rule, r.identity) for r in report.rules))


def misses(report: Report) -> list[tuple[str, str, str]]:
    """Rule, node and reason of the near misses, each once."""
    return list(dict.fromkeys((r.rule, r.node, r.reason) for r in report.rejected))


def counted(spellings: Mapping[str, int]) -> str:
    """ "12 Conv3d, 3 cat", the commonest first."""
    return ", ".join(f"{n} {what}" for what, n in sorted(spellings.items(), key=lambda item: (-item[1], item[0])))


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False) or [text]


# --- rich -----------------------------------------------------------------------------------------
def show(report: Report, file: TextIO | None) -> None:
    """Print the report: by rich where that is installed and ``file`` is a terminal, else plain."""
    out = file if file is not None else sys.stdout
    if out.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        Console(file=out).print(rich(report))
    else:
        out.write(f"{report}\n")


def rich(report: Report) -> Any:
    """What rich prints for a report: a table of regions, and lists of what else there is to say."""
    from rich.console import Group
    from rich.text import Text

    name, _, rest = report.headline.partition(": ")
    parts: list[Any] = [Text.assemble((name, "bold"), ": ", rest)]
    parts += [Text(f"  {note}", "dim") for note in report.notes]
    if report.regions:
        parts.append(_regions(report))
    parts += _pairs("rewrites", "green", identities(report))
    parts += _pairs("near misses", "yellow", ((f"{rule} at {node}", why) for rule, node, why in misses(report)))
    if report.staying:
        parts += _pairs("stays in torch", "cyan", [(counted(report.staying), "")])
    if report.regions:
        parts.append(Text(f"\n({LEGEND})", "dim"))
    return Group(*parts)


def _regions(report: Report) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, title_justify="left", header_style="bold")
    for heading, style in (("", "bold magenta"), ("region", ""), ("what becomes of it", "")):
        table.add_column(heading, style=style, overflow="fold")
    table.add_column("never written", justify="right", style="green")
    for number, region in enumerate(report.regions, 1):
        anchor, *lines = region_lines(region)
        known = region.account
        saved = words.size(known.unwritten) if known is not None and known.unwritten else "-"
        table.add_row(str(number), Text(anchor), Text("\n".join(lines)), saved)
    return table


def _pairs(title: str, style: str, pairs: Iterable[tuple[str, str]]) -> Iterable[Any]:
    from rich.text import Text

    found = list(pairs)
    if found:
        yield Text(f"\n{title}", "bold")
    for name, words_ in found:
        yield Text.assemble("  ", (name, style), f": {words_}" if words_ else "")
