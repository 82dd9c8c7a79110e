"""Tests on a GPU, in two parts. The first shares the GPU between processes; the second needs it for itself:

    python -m pytest tests/gpu -m "not serial" -n 8 --dist worksteal
    python -m pytest tests/gpu -m serial -n 0

A failure is printed when it happens, not at the end: a run that is cut short has told what it found.
"""

from __future__ import annotations

import os

import pytest

#: lines of a failure that are printed at once; all of it follows at the end
LINES = 40


def pytest_configure(config: pytest.Config) -> None:
    pytest.register_assert_rewrite("stages")
    config.addinivalue_line("markers", "serial: needs the GPU for itself: most of its memory, its time, all processes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        alone = pytest.mark.skip(reason="needs the GPU for itself: python -m pytest tests/gpu -m serial -n 0")
        for item in items:
            if item.get_closest_marker("serial") is not None:
                item.add_marker(alone, append=False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        last = report.longreprtext.splitlines()[-LINES:]
        print("\n".join(["", f"=== {report.nodeid} failed in its {report.when}", *last]), flush=True)
