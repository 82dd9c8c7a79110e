"""What the documentation says of the code and of measurements: generated, and committed as generated."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reports import without_estimates
from torch import nn

import fxfuse
from fxfuse import patterns, vocabulary
from fxfuse.bench.chains import CHAINS
from fxfuse.models import CASES
from fxfuse.patterns import DEFAULT_RULES

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def generate() -> Iterator[Any]:
    """The module docs/generate/<name>.py, by name."""
    sys.path.insert(0, str(ROOT / "docs" / "generate"))
    yield importlib.import_module
    sys.path.pop(0)


def words(text: str) -> list[str]:
    """Without estimates, whose digits also decide where lines end: a page may be older than the cost model."""
    return without_estimates(text).split()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_generated_parts_are_up_to_date(page: pathlib.Path, generate: Any) -> None:
    """Where this fails: python docs/generate/pages.py"""
    pages = generate("pages")
    assert page in pages.PAGES
    assert words(pages.expanded(page)) == words(page.read_text())
    assert page.read_text().count("<!-- end -->") == len(pages.parts(page))


def test_every_part_is_somewhere(generate: Any) -> None:
    pages = generate("pages")
    assert sorted(name for page in pages.PAGES for name in pages.parts(page)) == sorted(pages.GENERATED)


def test_rules_and_operators_are_all_there(generate: Any) -> None:
    pages = generate("pages")
    rules, operators = pages.GENERATED["rules"](), pages.GENERATED["operators"]()
    for rule in DEFAULT_RULES:
        assert f"### {rule.name}\n\n```text\n{rule.identity}\n```\n\n*{rule.legality.value}*" in rules
    for name in vocabulary.names():
        assert re.search(rf"^\| `{name}` \| \S+", operators, re.MULTILINE), name
    spelled = pages.GENERATED["spellings"]()
    for name in ("`nn.ConvTranspose3d`", "`F.relu`", "`torch.logsumexp`", "`operator.iadd`", "`view_as`", "`var.dim`"):
        assert name in spelled
    assert "`nn.Upsample`" in pages.GENERATED["outside"]() and "`nn.ReLU`" not in pages.GENERATED["outside"]()
    assert "* a max pool that returns indices" in pages.GENERATED["reasons"]()


@pytest.mark.parametrize("name", ["gains", "pipeline", "chain", "residues"])
def test_pictures_are_those_that_are_drawn(name: str, generate: Any) -> None:
    """Where this fails: python docs/generate/pages.py"""
    pictures = generate("pictures")
    assert set(pictures.PICTURES) == {"gains", "pipeline", "chain", "residues"}
    assert (ROOT / "docs" / "images" / f"{name}.svg").read_text() == pictures.PICTURES[name]()


def test_counters_are_divided_by_what_the_convolution_puts_out(generate: Any) -> None:
    results = generate("results")
    rows = json.loads((results.RESULTS / "h100_counters.json").read_text())["rows"]
    cases = {case.name: case for case in (*CASES, *CHAINS)}
    for row in rows:
        case = cases[row["model"]]
        up = next(m for m in case.make().to("meta").modules() if isinstance(m, nn.ConvTranspose3d))
        assert row["outputs"] == up(torch.empty(case.shape, device="meta")).numel(), row["model"]
    first = max(rows, key=lambda r: r["us"])
    title, kernel, us, outputs, each, *_ = results.counters().splitlines()[2].strip("| ").split(" | ")
    assert (title, kernel, us) == (results.TITLES[first["model"]], "convolution", f"{first['us']:.0f}")
    assert int(each) == round(32 * first["instructions"] / first["outputs"]) and outputs.endswith(" M")
    assert "| statistics from products |" in results.counters()


def visible(page: pathlib.Path) -> str:
    """The text of a page without its comments."""
    return re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_files_that_are_named_exist(page: pathlib.Path) -> None:
    text = visible(page)
    linked = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not t.startswith("http")]
    named = re.findall(r"`((?:fxfuse|examples|benchmarks|tests)/[\w./]+)`", text)
    for target in linked:
        assert (page.parent / target).exists(), target
    for target in named:
        assert (ROOT / target).exists(), target


def test_the_api_page_names_what_is_public() -> None:
    api = visible(ROOT / "docs" / "api.md")
    for name in set(fxfuse.__all__) - {"__version__"}:
        assert re.search(rf"^::: fxfuse\.(\w+\.)?{name}$", api, re.MULTILINE), name
    for path in re.findall(r"^::: (\S+)$", api, re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert (getattr(importlib.import_module(module), name).__doc__ or "").strip(), path
    documented = (patterns.__doc__ or "") + api
    for name in ("Rule", "Legality", "Reject", "P", "X", "Pat", "Match", "Builder", "op_name", "operands", "sizes"):
        assert name in documented and name in patterns.__all__
    assert "attributes" in patterns.__all__ and "dtype" in patterns.__all__
