"""Results as a file that grows row by row: what is interrupted is kept, and can be resumed."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fxfuse.environment import build


class RowFile:
    """The JSON file of one set of results, ``{"machine": {...}, "rows": [...]}``; it is replaced as a whole.

    ``machine`` holds what is the same for all rows: device, versions, precision, protocol. Every row says in
    "build" which source of fxfuse it measured. ``key`` names the entries that tell rows apart: a row takes the
    place of an older one with the same key. Without a ``path`` rows are kept in memory.

    Raises:
        ValueError: ``resume`` is asked for, and the file is of another machine or protocol, or is no such file.
        OSError: the file cannot be read, or (:meth:`add`) not be written.
    """

    def __init__(
        self, path: pathlib.Path | None, machine: Mapping[str, Any], key: Sequence[str], *, resume: bool = False
    ) -> None:
        self.path, self.machine, self.build = path, dict(machine), build()
        self._key = tuple(key)
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if resume and path is not None and path.exists():
            self._resume(path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, those that were resumed first."""
        return list(self._rows.values())

    def find(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row with the key of ``row`` that this build of fxfuse measured; None where there is none."""
        found = self._rows.get(self._name(row))
        return found if found is not None and found["build"] == self.build else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep ``row``; with a path the file holds it when this returns."""
        self._rows[self._name(row)] = {**row, "build": self.build}
        if self.path is not None:
            write_json(self.path, {"machine": self.machine, "rows": self.rows})

    def _name(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def _resume(self, path: pathlib.Path) -> None:
        remedy = "name another file, or do not resume it: then it is written anew"
        try:
            data = json.loads(path.read_text())
            machine, rows = dict(data["machine"]), [r for r in data["rows"] if "build" in r]
            self._rows = {self._name(row): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results that could be resumed; {remedy}") from error
        for name, value in self.machine.items():
            if machine.get(name) != value:
                raise ValueError(f"{path} was measured with {name} {machine.get(name)}, here it is {value}; {remedy}")


def write_json(path: pathlib.Path, data: Any) -> None:
    """Replace ``path`` as a whole: a process that is stopped leaves the file as it was, or as it is to be."""
    text = json.dumps(data, indent=1) + "\n"
    if path.exists() and not path.is_file():  # /dev/stdout and its like
        path.write_text(text)
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
