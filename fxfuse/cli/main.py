"""The parser of the command line, and what becomes of errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from fxfuse import demo
from fxfuse.cli import bench, cache, env, models
from fxfuse.cli.errors import Exit, Parser, UserError
from fxfuse.version import __version__

EPILOG = """examples:
  python -m fxfuse demo                                             # five models, explained, checked and timed
  python -m fxfuse explain decoder.py:Decoder --shape 2x16x8x16x16
  python -m fxfuse verify decoder.py:Decoder --shape 2x16x8x16x16   # for CI: exit code 0 or 1
  python -m fxfuse bench decoder.py:Decoder --shape 2x16x8x16x16 --peers eager,compile
  python -m fxfuse env

exit codes: 0 all is well; 1 it ran, and a result is wrong; 2 wrong arguments, or a model that does not load or run;
130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. What a user has to change is a sentence on stderr."""
    try:
        given = _parser().parse_args(arguments)
    except SystemExit as finished:  # argparse has said why, or has printed its help
        return int(finished.code or 0)
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(level=levels.get(given.verbose, logging.DEBUG), format="%(name)s: %(message)s")
    try:
        code = int(given.run(given))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fxfuse {given.command}: {error}", file=sys.stderr)
        return Exit.USAGE
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fxfuse",
        description="Rewrite and fuse what follows transposed convolutions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log what the compiler does; twice: every rewrite"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    models.add(commands)
    bench.add(commands)
    _add_demo(commands)
    env.add(commands)
    cache.add(commands)
    return parser


DEMO = """examples:
  python -m fxfuse demo

exit code 0: every result is as close to float64 as rounding permits; 1: one is not"""


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="optimise, explain, check and time the five starting models",
        epilog=DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda _: demo.main())
