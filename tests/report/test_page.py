"""The page as a file: complete in itself, and safe whatever names a model has. What it does is tested in a browser."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
from typing import Any

import pytest
import torch
from reports import explained
from torch import nn

import fxfuse
from fxfuse.models import CASES
from fxfuse.report import Report, page

HOSTILE = 'a<b>&"</script><!--<img src=x onerror=alert(1)>'


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of every script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def hostile() -> Report:
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.ConvTranspose3d(1, 1, 2))
    model.add_module("last", nn.Conv3d(1, 1, 1))
    report = explained(model, (1, 1, 2, 2, 2))
    report.model = HOSTILE
    report.notes = [f"captured {HOSTILE}"]
    return report


def embedded(text: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Elements(text).scripts[0])
    return data


def test_one_file(tmp_path: pathlib.Path) -> None:
    path = explained(CASES[0].make().eval(), CASES[0].shape).to_html(tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    text = path.read_text("utf-8")
    tags = Elements(text).tags
    loaded = [a for _, attributes in tags for k, a in attributes.items() if k in ("src", "href", "srcset", "data")]
    assert loaded == ["data:,"]
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "@import" not in text and "url(" not in re.sub(r"url\(#", "", text)
    (policy,) = [a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none';")
    assert len(text) < 150_000


def test_the_data_of_the_page() -> None:
    report = explained(CASES[0].make().eval(), CASES[0].shape)
    data = embedded(page.html(report))
    assert list(data) == [""]
    own = data[""]
    drawn = own.pop("drawings")
    expected = json.loads(report.to_json())
    expected["parts"] = own["parts"] = []
    assert own == expected
    assert set(drawn) == {"before", "after"} and set(drawn["after"]) == {"whole", "collapsed"}


def test_names_cannot_leave_their_place() -> None:
    text = page.html(hostile())
    elements = Elements(text)
    assert len(elements.scripts) == 2 and text.count("</script>") == 2
    assert not any(tag == "img" for tag, _ in elements.tags)
    data = embedded(text)[""]
    assert data["model"] == HOSTILE and data["regions"][0]["anchor"] == HOSTILE
    assert "<title>a&lt;b&gt;&amp;" in text


def test_a_notebook_shows_a_summary() -> None:
    report = explained(CASES[0].make().eval(), CASES[0].shape)
    shown = report._repr_html_()
    for words in ("MaxMaxSum", "2 kernels (6 launches)", "ComposeMaxPools", "1.01 GB"):
        assert words in shown
    assert "<script" not in shown and len(shown) < 5000
    assert "&lt;img src=x" in hostile()._repr_html_() and "<img" not in hostile()._repr_html_()
    assert "Conv3d" in hostile()._repr_html_()


@pytest.mark.parametrize("captured", [False, True], ids=["no capture", "no regions"])
def test_nothing_to_show(captured: bool, tmp_path: pathlib.Path) -> None:
    report = explained(nn.Conv3d(1, 1, 1), (1, 1, 2, 2, 2)) if captured else Report("Decides", ["left alone"])
    data = embedded(report.to_html(tmp_path / "page.html").read_text("utf-8"))[""]
    assert data["captured"] is captured and data["regions"] == []
    assert bool(data["drawings"]) is captured
    assert report._repr_html_() and report.to_dot().startswith("digraph") and json.loads(report.to_json())
    assert bool(report.code_before) is bool(report.code_after) is captured


def test_parts_are_on_one_page() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ConvTranspose3d(2, 2, 2))
    optimized: Any = fxfuse.optimize(model, torch.ones(1, 2, 4, 4, 4), submodules=["0", "1"])
    data = embedded(page.html(optimized.fxfuse_report))
    assert list(data) == ["", "0", "1"]
    assert not data[""]["drawings"] and data["0"]["drawings"] and len(data[""]["regions"]) == 2


def test_templates_are_packaged() -> None:
    import tomllib

    pyproject = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["fxfuse"]
    root = pathlib.Path(fxfuse.__file__).parent
    packaged = {p for pattern in patterns for p in root.glob(pattern)}
    assert {*(root / "report" / "templates").iterdir()} <= packaged


def test_a_folder_that_is_missing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        Report().to_html(tmp_path / "missing" / "page.html")
