"""What the command line says where a user has to change something, and its exit codes."""

from __future__ import annotations

import argparse
import enum
import sys
from typing import NoReturn


class Exit(enum.IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1  #: it ran, and the answer is no: a result is wrong
    USAGE = 2  #: wrong arguments, a model that does not load or run, a folder that cannot be written
    INTERRUPTED = 130


class UserError(Exception):
    """A sentence for stderr: what was given, why it does not do, and what would."""


class Parser(argparse.ArgumentParser):
    """A parser that says one sentence where arguments are wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog.removeprefix('python -m ')}: {message}; `{self.prog} --help` has examples", file=sys.stderr)
        raise SystemExit(Exit.USAGE)


def first_line(error: BaseException) -> str:
    """An exception in one line: its class and the first line of its message."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
