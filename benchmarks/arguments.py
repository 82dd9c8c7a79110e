"""What the benchmarks of a GPU have in common: the file of results, the time that a run may take, what it says."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fxfuse.bench import RowFile


def add_file(parser: argparse.ArgumentParser) -> None:
    """--json, --resume and --minutes."""
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results there, after every row")
    parser.add_argument("--resume", action="store_true", help="keep the rows of FILE that this build measured here")
    parser.add_argument("--minutes", type=float, metavar="N", help="start no row after so many (default: no limit)")


def opened(given: argparse.Namespace, machine: Mapping[str, Any], key: Sequence[str]) -> RowFile:
    """The file of results that the arguments name."""
    if given.resume and given.json is None:
        raise SystemExit("--resume needs --json FILE, the results to go on with")
    try:
        return RowFile(given.json, machine, key, resume=given.resume)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


class Budget:
    """The time of a run: which rows may still begin, and lines about them that are printed at once."""

    def __init__(self, minutes: float | None, rows: int) -> None:
        self._minutes, self._rows = minutes, rows
        self._number = self._measured = self._kept = 0
        self._began = self._row_began = time.monotonic()

    def begins(self, title: str, *, done: bool = False) -> bool:
        """Whether the next row is to be measured: not where it is ``done`` already, nor when the time is over."""
        self._number += 1
        passed = time.monotonic() - self._began
        if done:
            self._kept += 1
        elif self._minutes is None or passed < 60 * self._minutes:
            self._measured += 1
            self._row_began = time.monotonic()
            print(f"[{self._number}/{self._rows}] {title} (at {passed:.0f} s)", flush=True)
            return True
        return False

    def say(self, what: str) -> None:
        """What is being done, and when in the row."""
        print(f"   {time.monotonic() - self._row_began:5.1f} s  {what}", flush=True)

    def ends(self) -> None:
        """How many rows there are, and how to go on."""
        left = self._rows - self._measured - self._kept
        parts = [f"{self._measured} rows measured in {time.monotonic() - self._began:.0f} s"]
        if self._kept:
            parts.append(f"{self._kept} kept")
        if left:
            parts.append(f"{left} left: --resume goes on with them")
        print("; ".join(parts), flush=True)
