"""Results that are kept row by row, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxfuse.bench import RowFile, rowfile

MACHINE = {"device": "a GPU", "torch": "2.13.0"}
KEY = ("model", "dtype")


def row(model: str, ms: float = 1.0) -> dict[str, Any]:
    return {"model": model, "dtype": "float32", "ms": ms}


def opened(path: Path | None, *, resume: bool = True, **machine: str) -> RowFile:
    return RowFile(path, {**MACHINE, **machine}, KEY, resume=resume)


def test_every_row_is_on_disk_when_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results = opened(path)
    assert not path.exists()
    for number, name in enumerate("ab", 1):
        results.add(row(name))
        data = json.loads(path.read_text())
        assert data["machine"] == MACHINE and len(data["rows"]) == number
        assert data["rows"][-1] == {**row(name), "build": results.build}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]  # no drafts


def test_a_row_replaces_the_one_of_its_key(tmp_path: Path) -> None:
    results = opened(tmp_path / "x.json")
    for one in (row("a"), row("b"), row("a", 2.0)):
        results.add(one)
    assert [(r["model"], r["ms"]) for r in results.rows] == [("a", 2.0), ("b", 1.0)]


def test_resuming_keeps_what_this_build_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    monkeypatch.setattr(rowfile, "build", lambda: "old")
    opened(path).add(row("a"))
    monkeypatch.setattr(rowfile, "build", lambda: "new")
    again = opened(path)
    assert again.find(row("a")) is None and [r["build"] for r in again.rows] == ["old"]
    again.add(row("b"))
    assert opened(path).find(row("b", 7.0)) == {**row("b"), "build": "new"}
    assert [r["build"] for r in json.loads(path.read_text())["rows"]] == ["old", "new"]
    assert not opened(path, resume=False).rows


def test_rows_without_a_build_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"machine": MACHINE, "rows": [row("a")]}))
    assert not opened(path).rows


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (json.dumps({"machine": {**MACHINE, "torch": "2.11.0"}, "rows": []}), "was measured with torch 2.11.0, here"),
        (json.dumps({"machine": {"device": "a GPU"}, "rows": []}), "was measured with torch None, here it is 2.13.0"),
        ("[1, 2]", "holds no results that could be resumed"),
        ('{"machine": {', "holds no results that could be resumed"),
        (json.dumps({"machine": MACHINE, "rows": [{"build": "x"}]}), "holds no results that could be resumed"),
    ],
)
def test_what_cannot_be_resumed(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        opened(path)
    assert "name another file" in str(caught.value) and path.read_text() == text


def test_a_write_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    results = opened(path)
    results.add(row("a"))
    before = path.read_text()

    def full(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        results.add(row("b"))
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_device_is_written_to_as_it_is() -> None:
    opened(Path("/dev/null"), resume=False).add(row("a"))
    assert Path("/dev/null").is_char_device()


def test_without_a_file_rows_are_kept() -> None:
    results = opened(None)
    results.add(row("a"))
    assert results.find(row("a")) is not None
