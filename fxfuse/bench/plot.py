"""Results as a picture: one group of bars per model, in SVG, without any library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fxfuse.bench.measure import Row

_WIDTH, _LABEL, _BAR, _GAP = 860, 230, 20, 34
_OURS, _PEER, _FLOOR, _TEXT, _QUIET = "#0b7285", "#adb5bd", "#c92a2a", "#212529", "#495057"
#: where the longest bar ends: the number behind it needs the rest
_END = _WIDTH - 150


def to_svg(rows: Sequence[Row], title: str) -> str:
    """A bar per way to run each of ``rows``, to scale within a model; a red line marks the least time."""
    parts: list[str] = []
    y = 66
    for row in rows:
        parts += _group(row, y)
        y += _GAP + _BAR * (len(row.ms) + len(row.failed)) + 16
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{_TEXT}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{y}" fill="#ffffff"/>',
        _text(16, 28, title, size=16, weight=600),
        _text(16, 48, "milliseconds of a call; a red line: the least time of memory traffic or arithmetic", _QUIET),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _group(row: Row, y: int) -> list[str]:
    shapes = ", ".join("x".join(map(str, s)) for s in row.shapes)
    parts = [_text(16, y + 16, f"{row.model}, {row.mode}, {row.dtype}, {shapes}", weight=600)]
    scale = (_END - _LABEL) / max([*row.ms.values(), row.floor, 1e-9])
    top = y + _GAP - 8
    for number, (label, ms) in enumerate(sorted(row.ms.items(), key=lambda item: -item[1])):
        at, length = top + number * _BAR, max(1.0, ms * scale)
        ratio = f"{ms:.3f} ms"
        if row.ours is not None and label != row.ours:
            ratio += f", {ms / row.ms[row.ours]:.2f}x"
        colour = _OURS if label.startswith("fxfuse") else _PEER
        parts += [
            _text(_LABEL - 8, at + 14, label, anchor="end"),
            f'<rect x="{_LABEL}" y="{at + 2}" width="{length:.1f}" height="{_BAR - 5}" rx="2" fill="{colour}"/>',
            _text(_LABEL + length + 6, at + 14, ratio),
        ]
    for number, label in enumerate(row.failed, len(row.ms)):
        at = top + number * _BAR
        why = "not right, not timed" if label in row.wrong else "does not run"
        parts += [_text(_LABEL - 8, at + 14, label, anchor="end"), _text(_LABEL + 6, at + 14, why, _FLOOR)]
    if row.floor > 0 and row.ms:
        x, end = _LABEL + row.floor * scale, top + len(row.ms) * _BAR
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{end}" stroke="{_FLOOR}" stroke-width="1.5"/>')
    return parts


def _text(
    x: float, y: float, text: str, fill: str = _TEXT, *, size: int = 13, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )
