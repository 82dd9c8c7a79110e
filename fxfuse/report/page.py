"""The report as HTML: a page of its own, in one file, and a few lines for a notebook."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from fxfuse.report import text, words
from fxfuse.report.document import document
from fxfuse.report.drawing import drawings

if TYPE_CHECKING:
    from fxfuse.report.report import Report

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_STYLES = ("page.css", "panel.css")
_SCRIPTS = ("dom.js", "graph.js", "highlight.js", "roofline.js", "panel.js", "page.js")


def write(report: Report, path: pathlib.Path, registers: bool) -> pathlib.Path:
    """Write the page to ``path``, and return it."""
    path.write_text(html(report, registers), "utf-8")
    return path


def html(report: Report, registers: bool = False) -> str:
    """The page: styles, scripts and data are in it, and nothing is loaded."""
    from markupsafe import Markup  # of jinja2, which torch brings

    parts = {name: "\n".join(map(_read, names)) for name, names in (("styles", _STYLES), ("scripts", _SCRIPTS))}
    own = {name: Markup(content) for name, content in parts.items()}
    return _render("page.html", title=report.headline, plain=str(report), data=_data(report, registers), **own)


def _data(report: Report, registers: bool) -> dict[str, Any]:
    whole = document(report, registers)
    reports = {"": report, **report.parts}
    documents = {"": whole, **whole["parts"]}
    return {path: {**documents[path], "parts": [], "drawings": drawings(r)} for path, r in reports.items()}


def notebook(report: Report) -> str:
    """A summary without scripts, for the output of a notebook's cell."""
    return _render("notebook.html", report=report, words=words, text=text)


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")
