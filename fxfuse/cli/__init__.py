"""The command line: `python -m fxfuse <command>`."""

from fxfuse.cli.main import main

__all__ = ["main"]
