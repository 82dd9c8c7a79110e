"""The cache on disk, without a compiler: entries, damage, eviction, folders that cannot be written, `cache`."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

import filelock
import pytest

from fxfuse.__main__ import main
from fxfuse.cli.cache import LISTED
from fxfuse.kernels.compilation import cache
from fxfuse.kernels.compilation.cache import Cache, Stored


def stored(text: str = "kernel", size: int = 1000) -> Stored:
    return Stored(os.urandom(size), f"// {text}\r\n// ü", f"log of {text}", {"arch": "sm_90a", "kernels": text})


def fail() -> Stored:
    raise AssertionError("made what the cache holds")


def age(kernels: Cache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(kernels.folder / key, (then, then))


def test_what_was_made_is_read_back(tmp_path: Path) -> None:
    made = stored()
    assert Cache(tmp_path).load("a") is None
    assert Cache(tmp_path).get("a", lambda: made) == (made, False)
    assert Cache(tmp_path).get("a", fail) == (made, True)
    assert Cache(tmp_path).load("b") is None
    assert (tmp_path / "v1" / "a" / "kernel.cubin").read_bytes() == made.code
    assert (tmp_path / "v1" / "a" / "kernel.cu").read_bytes() == made.source.encode()


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Cache(tmp_path).get("a", fail)
    assert Cache(tmp_path).entries() == []
    assert Cache(tmp_path).get("a", stored)[1] is False


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["kernel.cubin", "kernel.cu", "entry.json"])
def test_damage_is_made_anew(tmp_path: Path, name: str, damage: object) -> None:
    kernels, first, second = Cache(tmp_path), stored(), stored()
    kernels.get("a", lambda: first)
    damage(kernels.folder / "a" / name)
    if (damage, name) == (_truncate, "entry.json"):
        assert kernels.load("a") is None  # the closing brace
    assert kernels.get("a", lambda: second) == (second, False)
    assert Cache(tmp_path).get("a", fail) == (second, True)
    assert [p.name for p in kernels.folder.iterdir()] == ["a"]


@pytest.mark.parametrize("text", ["[]", "{}", "7", '{"checksum": "", "log": "", "about": {}}'])
def test_facts_of_another_form_are_damage(tmp_path: Path, text: str) -> None:
    kernels = Cache(tmp_path)
    kernels.get("a", stored)
    (kernels.folder / "a" / "entry.json").write_text(text)
    assert kernels.load("a") is None
    assert len(kernels.entries()) == 1
    assert kernels.get("a", stored)[1] is False


def test_every_part_counts_in_the_checksum(tmp_path: Path) -> None:
    kernels = Cache(tmp_path)
    kernels.get("a", stored)
    file = kernels.folder / "a" / "entry.json"
    facts = json.loads(file.read_text())
    for name, value in {"log": "other", "about": {"arch": "other"}}.items():
        file.write_text(json.dumps({**facts, name: value}))
        assert kernels.load("a") is None, name
    file.write_text(json.dumps(facts))
    assert kernels.load("a") is not None
    (kernels.folder / "a").rename(kernels.folder / "b")
    assert kernels.load("b") is None


def test_threads_make_an_entry_once(tmp_path: Path) -> None:
    made, start, answers = [], threading.Barrier(8), []

    def make() -> Stored:
        made.append(1)
        time.sleep(0.05)
        return stored()

    def work() -> None:
        start.wait()
        answers.append(Cache(tmp_path).get("a", make)[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(answers) == 8
    assert len({a.code for a in answers}) == 1


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    kernels = Cache(tmp_path, limit=10_000)
    for n in range(8):
        kernels.get(f"k{n}", stored)
        age(kernels, f"k{n}", 1000 - n)
    assert len(kernels.entries()) == 8  # some 1.2 kB each
    assert kernels.load("k0") is not None  # used again
    kernels.get("new", lambda: stored(size=3000))
    left = [e.key for e in kernels.entries()]
    assert {"new", "k0", "k7"} <= set(left)
    assert not {"k1", "k2"} & set(left)
    assert sum(e.size for e in kernels.entries()) <= 10_000


def test_an_entry_larger_than_the_limit_stays_alone(tmp_path: Path) -> None:
    kernels = Cache(tmp_path, limit=2000)
    kernels.get("a", stored)
    kernels.get("b", lambda: stored(size=5000))
    assert [e.key for e in kernels.entries()] == ["b"]


def test_a_limit_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    kernels = Cache(tmp_path / "none", limit=0)
    assert kernels.get("a", stored)[1] is False
    assert kernels.get("a", stored)[1] is False
    assert not (tmp_path / "none").exists()


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    kernels = Cache(tmp_path)
    for name in (".old-1", ".new-1"):
        (kernels.folder / name).mkdir(parents=True)
        (kernels.folder / name / "kernel.cubin").write_bytes(b"half")
    os.utime(kernels.folder / ".old-1", (0, 0))
    kernels.get("a", stored)
    assert sorted(p.name for p in kernels.folder.iterdir()) == [".new-1", "a"]
    assert [e.key for e in kernels.entries()] == ["a"]


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    kernels = Cache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        assert kernels.get("a", stored)[1] is False
        assert kernels.get("b", stored)[1] is False
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()
    assert "FXFUSE_CACHE_DIR" in record.getMessage()
    assert kernels.entries() == []
    assert kernels.clear() == 0


def test_a_disk_that_fills_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    kernels, made = Cache(tmp_path), stored()
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        assert kernels.get("a", lambda: made) == (made, False)
        assert kernels.get("a", lambda: made) == (made, False)
    assert len(caplog.records) == 1
    assert list(kernels.folder.iterdir()) == []


def test_a_folder_that_can_only_be_read_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    Cache(tmp_path).get("a", stored)
    for place, name in ((Path, "mkdir"), (Path, "write_bytes"), (os, "utime"), (filelock.FileLock, "acquire")):
        monkeypatch.setattr(place, name, denied)
    assert Cache(tmp_path).get("a", fail)[1]
    assert Cache(tmp_path).get("b", stored)[1] is False


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"FXFUSE_CACHE_DIR": "/named/here"}, "/named/here"),
        ({"FXFUSE_CACHE_DIR": "~/here"}, "/home/me/here"),
        ({"FXFUSE_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/fxfuse"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/fxfuse"),
        ({}, "/home/me/.cache/fxfuse"),
    ],
)
def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], root: str) -> None:
    for name in ("FXFUSE_CACHE_DIR", "XDG_CACHE_HOME", "FXFUSE_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.current().root == Path(root)
    assert cache.current().limit == 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("512M", 512 << 20), ("1.5 GiB", 3 << 29), ("2kb", 2048), ("1T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert cache.parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "-1", "G", "1 X", "nan", "inf"])
def test_no_sizes(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_SIZE", text)
    with pytest.raises(ValueError, match=rf'FXFUSE_CACHE_SIZE is "{text}": give bytes'):
        cache.current()
    assert main(["cache"]) == 2
    assert text in capsys.readouterr().err


def test_the_command_lists_and_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FXFUSE_CACHE_SIZE", "3M")
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 0 compiled, 0 B of at most 3.0 MiB\n"
    kernels = cache.current()
    kernels.get("0123456789abcdef", lambda: stored("first", size=4096))
    kernels.get("fedcba9876543210", lambda: stored("second"))
    age(kernels, "0123456789abcdef", 7200)
    assert main(["cache"]) == 0
    newer, older, total = capsys.readouterr().out.splitlines()
    assert newer.split() == ["fedcba987654", "1.2", "KiB", "0", "s", "sm_90a", "second"]
    assert older.split() == ["0123456789ab", "4.2", "KiB", "2", "h", "sm_90a", "first"]
    assert total == f"{tmp_path}: 2 compiled, 5.3 KiB of at most 3.0 MiB"
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 2 from {tmp_path}\n"
    assert kernels.entries() == []


def test_the_command_without_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cache, "current", lambda: Cache(None))
    assert main(["cache"]) == 0
    assert "FXFUSE_CACHE_DIR" in capsys.readouterr().out
    assert Cache(None).get("a", stored)[1] is False


def test_the_command_lists_some_unless_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    for number in range(LISTED + 2):
        Cache(tmp_path).get(f"{number:016x}", stored)
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == LISTED + 2 and lines[LISTED] == "... and 2 more; --all lists them"
    assert main(["cache", "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == LISTED + 2 + 1
