"""The two parts of the GPU's tests: what needs the GPU for itself does not run beside others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"


@pytest.fixture
def plugin() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_conftest", CONFTEST)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.serial
def needs_the_gpu() -> None: ...


@pytest.mark.parametrize("worker", [False, True])
def test_serial_tests_are_skipped_in_workers(
    plugin: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, worker: bool
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    made = {
        name: pytest.Function.from_parent(request.node.parent, name=name, callobj=function)
        for name, function in (("alone", needs_the_gpu), ("beside", plugin.pytest_configure))
    }
    plugin.pytest_collection_modifyitems(list(made.values()))
    skips = {name: item.get_closest_marker("skip") for name, item in made.items()}
    assert skips["beside"] is None and (skips["alone"] is not None) == worker
    if skips["alone"] is not None:
        assert "python -m pytest tests/gpu -m serial -n 0" in skips["alone"].kwargs["reason"]


def test_a_failure_is_printed_at_once(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = pytest.TestReport("a.py::b", ("a.py", 0, "b"), {}, "failed", "first\n" * 50 + "last", "call")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    plugin.pytest_runtest_logreport(report)
    assert capsys.readouterr().out == ""  # the process that started the workers prints it
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    plugin.pytest_runtest_logreport(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["=== a.py::b failed in its call", "first"] and lines[-1] == "last"
    assert len(lines) == 2 + plugin.LINES
    report.outcome = "passed"
    plugin.pytest_runtest_logreport(report)
    assert capsys.readouterr().out == ""


def test_the_commands_are_documented() -> None:
    said = (CONFTEST.parents[2] / "docs" / "extending.md").read_text()
    for command in ('python -m pytest tests/gpu -m "not serial" -n 8 --dist worksteal', "-m serial -n 0"):
        assert command in CONFTEST.read_text() and command in said
