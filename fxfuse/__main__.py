"""The command line: `python -m fxfuse demo`."""

from __future__ import annotations

import argparse
import logging
import sys

from fxfuse import demo
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
    given = parser.parse_args(arguments)
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(level=levels.get(given.verbose, logging.DEBUG), format="%(name)s: %(message)s")
    return demo.main()


if __name__ == "__main__":
    sys.exit(main())
