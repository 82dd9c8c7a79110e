"""`env`: what fxfuse runs on, for a person and for a bug report."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable
from typing import Any

from fxfuse import environment
from fxfuse.cli.cache import summary
from fxfuse.cli.errors import Exit
from fxfuse.kernels.compilation import cache

EXAMPLES = """examples:
  python -m fxfuse env
  FXFUSE_KERNELS=0 python -m fxfuse env   # settings are shown, too"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "env",
        help="versions, devices, cache, settings, and what is missing",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    found = environment.versions()
    width = max(map(len, found))
    _section("versions", (f"{name:<{width}}  {version or 'not installed'}" for name, version in found.items()))
    _section("devices", environment.devices())
    _section("cache of compiled kernels", [_cache()])
    _section("settings", (f"{name}={value}" for name, value in environment.variables().items()))
    _section("missing", environment.missing())
    return Exit.OK


def _cache() -> str:
    try:
        kernels = cache.current()
        return "there is no home folder; set FXFUSE_CACHE_DIR" if kernels.root is None else summary(kernels)
    except (ValueError, OSError) as error:
        return str(error)


def _section(title: str, lines: Iterable[str]) -> None:
    print(title)
    for line in list(lines) or ["none"]:
        print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="      ", break_long_words=False))
