"""`cache`: the compiled kernels and the measured choices on disk."""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from typing import Any

from fxfuse.cli.errors import Exit, UserError
from fxfuse.kernels.compilation import cache, kept

#: entries that are listed unless all are asked for
LISTED = 20
EXAMPLES = """examples:
  python -m fxfuse cache
  FXFUSE_CACHE_DIR=/tmp/kernels python -m fxfuse cache --clear"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "cache",
        help="list the compiled kernels on disk, or remove them",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clear", action="store_true", help="remove them all")
    parser.add_argument("--all", action="store_true", help=f"list all (default: the {LISTED} used last)")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    try:
        print(cleared() if given.clear else listed(everything=given.all))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return Exit.OK


def cleared() -> str:
    kernels = cache.current()
    if kernels.root is None:
        return _NOWHERE
    removed, choices = kernels.clear(), kept.clear()
    return f"removed {removed}{_choices(' and', choices)} from {kernels.root}"


def listed(*, everything: bool = False) -> str:
    """A line per entry, those that were used last first, and the total."""
    kernels = cache.current()
    if kernels.root is None:
        return _NOWHERE
    entries, lines = kernels.entries(), []
    for entry in entries if everything else entries[:LISTED]:
        about = " ".join(entry.about.get(name, "") for name in ("arch", "kernels"))
        lines.append(f"{entry.key[:12]}  {_bytes(entry.size):>10}  {_age(time.time() - entry.used):>8}  {about}"[:120])
    if len(lines) < len(entries):
        lines.append(f"... and {len(entries) - len(lines)} more; --all lists them")
    return "\n".join([*lines, summary(kernels)])


def summary(kernels: cache.Cache) -> str:
    """Where the cache is, and how full."""
    entries = kernels.entries()
    size = _bytes(sum(e.size for e in entries))
    compiled = f"{len(entries)} compiled, {size} of at most {_bytes(kernels.limit)}"
    return f"{kernels.root}: {compiled}{_choices(';', kept.count())}{_unwritable(kernels.root)}"


def _unwritable(root: pathlib.Path | None) -> str:
    """What to do about a folder that cannot be written; the nearest one that is there decides."""
    nearest = next((p for p in (root, *root.parents) if p.exists()), None) if root is not None else None
    if nearest is None or (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return ""
    return "; it cannot be written, and kernels are compiled anew in every process: set FXFUSE_CACHE_DIR"


def _choices(join: str, count: int) -> str:
    """What was measured, if anything was."""
    return f"{join} {count} measured choice{'' if count == 1 else 's'}" if count else ""


_NOWHERE = "nothing is kept: there is no home folder; set FXFUSE_CACHE_DIR"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
