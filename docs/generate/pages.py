"""Writes the generated parts of the pages, of the README, and the drawings: ``python docs/generate/pages.py``.

A part stands between ``<!-- generated: name -->`` and ``<!-- end -->``. tests/test_docs.py fails where one is stale.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import runpy
from collections.abc import Callable

import pictures
import results
import source


def code(example: str) -> str:
    """An example as it stands."""
    return f"```python\n{(results.ROOT / 'examples' / f'{example}.py').read_text()}```"


def first_report() -> str:
    """The report that the first example prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(results.ROOT / "examples" / "one_call.py"))
    report = printed.getvalue().partition("\n\nlargest")[0]
    return f"```text\n{report}\n```"


GENERATED: dict[str, Callable[[], str]] = {
    "ahead": results.ahead,
    "windows": results.windows,
    "calls": results.calls,
    "clocks": results.clocks,
    "counters": results.counters,
    "layers": results.layers,
    "fronts": results.fronts,
    "last": results.last,
    "left_out": results.left_out,
    "orientation": results.orientation,
    "small": results.small,
    "steps": results.steps,
    "cpu": results.cpu,
    "errors": results.errors,
    "first_report": first_report,
    "legality": source.legality,
    "operators": source.operators,
    "outside": source.outside,
    "own_rule": lambda: code("own_rule"),
    "times_idioms": lambda: results.times("h100_idioms"),
    "times_idioms_float16": lambda: results.times("h100_idioms_float16"),
    "random_chains": lambda: results.random_chains("h100_random"),
    "random_chains_float16": lambda: results.random_chains("h100_random_float16"),
    "readme_times": results.readme_times,
    "reasons": source.reasons,
    "rules": source.rules,
    "spellings": source.spellings,
    "times_chains": lambda: results.times("h100_chains"),
    "times_chains_ieee": lambda: results.times("h100_chains_ieee"),
    "times_chains_float16": lambda: results.times("h100_chains_float16"),
    "times_float16": lambda: results.times("h100_float16"),
    "times_float32": lambda: results.times("h100_float32"),
    "times_ieee": lambda: results.times("h100_ieee"),
}

PAGES = [results.ROOT / "README.md", *sorted((results.ROOT / "docs").glob("*.md"))]
PART = re.compile(r"<!-- generated: (\w+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


def parts(page: pathlib.Path) -> list[str]:
    """The names of the generated parts of a page."""
    return PART.findall(page.read_text())


def expanded(page: pathlib.Path) -> str:
    """The page as it should be; KeyError names a part that has no generator."""
    return PART.sub(lambda m: f"<!-- generated: {m[1]} -->\n\n{GENERATED[m[1]]()}\n\n<!-- end -->", page.read_text())


def main() -> None:
    for page in PAGES:
        page.write_text(expanded(page))
    pictures.main()


if __name__ == "__main__":
    main()
