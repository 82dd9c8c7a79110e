"""The report of a verification: a table for a terminal, and an error where something is off."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator

from fxfuse.verification.comparison import Comparison, Element, Kind, severity
from fxfuse.verification.regions import RegionCheck

_WIDTH = 120
#: comparisons of a kind that are listed one by one
_MOST = 12


class VerificationError(RuntimeError):
    """The optimised model computes something else than rounding explains. ``report`` tells all that was compared."""

    def __init__(self, message: str, report: VerifyReport | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclasses.dataclass
class VerifyReport:
    """What :func:`fxfuse.verify` found. ``str()`` is a table for a terminal.

    ``truth`` names what the results were compared with ("float64", or "eager mode" and why). ``comparisons`` are
    those of a call without gradients, then those of a call with gradients and of the gradients themselves;
    ``regions`` the fused regions by themselves. ``problems`` are sentences on what is no tensor: nesting,
    attributes of modules, random numbers. ``notes`` say what was not compared.
    """

    model: str
    truth: str
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    regions: list[RegionCheck] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything agrees as far as rounding permits."""
        return not self.problems and all(c.ok for c in self.comparisons) and all(r.ok for r in self.regions)

    @property
    def failures(self) -> list[str]:
        """What is off, as sentences; the regions at fault first."""
        regions = [r.reason for r in self.regions if r.reason is not None]
        found = [*self.problems, *(c.reason for c in self.comparisons if c.reason is not None)]
        if found and self.regions and not regions:
            found.append("the forward of every region is right by itself, so the fault lies around them")
        return [*regions, *found]

    def raise_for_failure(self) -> None:
        """Raise :class:`VerificationError` unless all is ok."""
        if not self.ok:
            raise VerificationError(f"{self.model}, compared with {self.truth}: {'; '.join(self.failures)}", self)

    def __str__(self) -> str:
        verdict = "verified" if self.ok else "NOT verified"
        lines = [f"{self.model}: {verdict} against {self.truth}"]
        for note in self.notes:
            lines += textwrap.wrap(f"  note: {note}", _WIDTH, subsequent_indent=" " * 8)
        lines += ["", *_table([_HEAD, *self._rows()])]
        for failure in self.failures:
            lines += ["", *textwrap.wrap(f"FAILED: {failure}", _WIDTH, subsequent_indent="    ")]
        for what, worst in self._worst():
            lines += ["", f"worst elements of {what}", *(f"    {element}" for element in worst)]
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for region in self.regions:
            path = "" if region.path is None else f" ({region.path.value})"
            yield (f"region {region.anchor}: {region.stages}{path}", *_cells(region.ran, region.ran.ok))
            if region.algebra is not None:
                yield ("    its rewrites, in float64", *_cells(region.algebra, region.algebra.ok))
        groups = itertools.groupby(self.comparisons, key=lambda c: (c.kind, c.what.endswith("with gradients")))
        for (kind, _), members in groups:
            yield from _group(kind, list(members))

    def _worst(self) -> Iterator[tuple[str, tuple[Element, ...]]]:
        for region in self.regions:
            if not region.ran.ok:
                yield f"region {region.anchor}, {region.ran.what}", region.ran.worst
        for comparison in self.comparisons:
            if comparison.worst:
                yield comparison.what, comparison.worst


def _group(kind: Kind, comparisons: list[Comparison]) -> Iterator[tuple[str, ...]]:
    """The rows of comparisons of one kind: of many, those that failed and the ones that are nearest to it."""
    shown = comparisons
    if len(comparisons) > _MOST:
        worst = sorted(comparisons, key=severity, reverse=True)
        count = max(_MOST // 2, sum(not c.ok for c in comparisons))
        shown = worst[:count]
    for comparison in shown:
        yield (comparison.what, *_cells(comparison, comparison.ok))
    if len(shown) < len(comparisons):
        yield (f"    {len(comparisons) - len(shown)} more of kind {kind.value!r}", "", "", "", "", "ok")


_HEAD = ("", "type", "error", "eager's", "limit", "")


def _cells(comparison: Comparison, ok: bool) -> tuple[str, ...]:
    verdict = ("ok" if comparison.own < 1 else "ok: it cancels to 0, in eager mode too") if ok else "FAILED"
    if comparison.problem is not None:
        return comparison.type, "-", "-", "-", verdict
    if comparison.mismatches and comparison.limit == 0:
        return comparison.type, f"{comparison.mismatches} differ", "", "exact", verdict
    if comparison.limit == 0:
        return comparison.type, "0", "", "exact", verdict
    return comparison.type, f"{comparison.error:.1e}", f"{comparison.own:.1e}", f"{comparison.limit:.1e}", verdict


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width: words to the left, numbers to the right. A long name has a line of its own."""
    most = _WIDTH - 58
    wide = [max((len(r[c]) for r in rows if c or len(r[0]) <= most), default=0) for c in range(len(_HEAD))]
    lines = []
    for row in rows:
        name = row[0]
        if len(name) > wide[0]:
            lines.append(f"  {name}")
            name = ""
        cells = [
            name.ljust(wide[0]),
            row[1].ljust(wide[1]),
            *(t.rjust(w) for t, w in zip(row[2:5], wide[2:5], strict=True)),
        ]
        lines.append(("  " + "  ".join([*cells, row[5]])).rstrip())
    return lines
