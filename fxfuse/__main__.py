"""The command line: `python -m fxfuse demo|cache`."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from fxfuse import demo
from fxfuse.kernels import cache, kept
from fxfuse.version import __version__


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fxfuse", description="Rewrite and fuse what follows ConvTranspose3d."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log what the compiler does; twice: every rewrite"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("demo", help="optimise, explain, check and time the five starting models")
    kept = commands.add_parser("cache", help="list the compiled kernels on disk, or remove them")
    kept.add_argument("--clear", action="store_true", help="remove them all")
    given = parser.parse_args(arguments)
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(level=levels.get(given.verbose, logging.DEBUG), format="%(name)s: %(message)s")
    if given.command == "cache":
        return _cache(given.clear)
    return demo.main()


def _cache(clear: bool) -> int:
    try:
        kernels = cache.current()
        if kernels.root is None:
            print("nothing is kept: there is no home folder; set FXFUSE_CACHE_DIR")
            return 0
        if clear:
            removed, choices = kernels.clear(), kept.clear()
            print(f"removed {removed}{_choices(' and', choices)} from {kernels.root}")
            return 0
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    entries = kernels.entries()
    for entry in entries:
        about = " ".join(entry.about.get(name, "") for name in ("arch", "kernels"))
        print(f"{entry.key[:12]}  {_bytes(entry.size):>10}  {_age(time.time() - entry.used):>8}  {about}"[:120])
    total = sum(e.size for e in entries)
    compiled = f"{len(entries)} compiled, {_bytes(total)} of at most {_bytes(kernels.limit)}"
    print(f"{kernels.root}: {compiled}{_choices(';', kept.count())}")
    return 0


def _choices(join: str, count: int) -> str:
    """What was measured, if anything was."""
    return f"{join} {count} measured choice{'' if count == 1 else 's'}" if count else ""


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


if __name__ == "__main__":
    sys.exit(main())
