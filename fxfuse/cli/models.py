"""`explain` and `verify`: what is done to a model, and whether it is right."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from fxfuse.api import explain, optimize, verify
from fxfuse.cli.arguments import add_model, output_path
from fxfuse.cli.errors import Exit, UserError
from fxfuse.cli.target import prepared
from fxfuse.pipeline import PRECISIONS

EXPLAIN = """examples:
  python -m fxfuse explain torch_models.decoder:make --shape 2x16x8x16x16
  python -m fxfuse explain decoder.py:Decoder --shape 1x32x16x16x16 --train --html decoder.html"""

VERIFY = """examples:
  python -m fxfuse verify decoder.py:Decoder --shape 2x16x8x16x16
  python -m fxfuse verify decoder.py:Decoder --shape 2x16x8x16x16 --dtype float16 --device cuda --no-gradients

exit code 0: all agrees with float64 as far as rounding permits; 1: it does not; 2: the model does not load or run"""


def add(commands: Any) -> None:
    """Register both commands."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "explain", help="what fxfuse does to a model, and what it leaves and why", epilog=EXPLAIN, formatter_class=plain
    )
    add_model(parser)
    parser.add_argument("--html", type=output_path, help="write a page with the graphs and kernels there as well")
    parser.add_argument("--json", type=output_path, help="write what the page shows there, for other tools")
    parser.add_argument("--dot", type=output_path, help="write both graphs there, for Graphviz")
    parser.set_defaults(run=run_explain)
    parser = commands.add_parser(
        "verify", help="compare an optimised model with float64", epilog=VERIFY, formatter_class=plain
    )
    add_model(parser)
    parser.add_argument("--no-gradients", action="store_true", help="compare the forward alone")
    parser.add_argument("--precision", choices=PRECISIONS, help="float32 convolutions on a GPU (default: torch's)")
    parser.set_defaults(run=run_verify)


def run_explain(given: argparse.Namespace) -> int:
    model, inputs = prepared(given)
    report = explain(model, *inputs)
    report.show()
    _write(given.html, report.to_html)
    _write(given.json, lambda path: path.write_text(f"{report.to_json()}\n"))
    _write(given.dot, lambda path: path.write_text(report.to_dot()))
    return Exit.OK


def _write(path: pathlib.Path | None, write: Callable[[pathlib.Path], object]) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}", file=sys.stderr)


def run_verify(given: argparse.Namespace) -> int:
    model, inputs = prepared(given)
    optimised = optimize(model, tuple(inputs), precision=given.precision)
    with torch.set_grad_enabled(not given.no_gradients):
        found = verify(None, optimised, *inputs)
    print(found)
    return Exit.OK if found.ok else Exit.FAILED
