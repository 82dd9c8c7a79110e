"""`bench`: peers side by side, each verified before it is timed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxfuse import bench, environment
from fxfuse.bench.measure import Row
from fxfuse.bench.plot import to_svg
from fxfuse.cli.arguments import add_model, default_device, output_path
from fxfuse.cli.errors import Exit, UserError
from fxfuse.cli.target import check_environment, prepared

EXAMPLES = """examples:
  python -m fxfuse bench                                     # the five models of the demo
  python -m fxfuse bench --cases chains --dtype float16 --peers eager,channels_last,compile --json chains.json
  python -m fxfuse bench decoder.py:Decoder --shape 2x16x8x16x16 --plot decoder.svg

exit code 0: what fxfuse does is right, and was timed; 1: it is not, and was not; 2: wrong arguments.
A peer that does not run, or is not right, is listed with the reason."""


#: name, model, shapes of its inputs
_Job = tuple[str, nn.Module, list[tuple[int, ...]]]


def peers(text: str) -> list[str]:
    """Names of peers with commas between them."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in bench.PEERS]
    if unknown or not names:
        given = ", ".join(map(repr, unknown)) or "nothing"
        raise argparse.ArgumentTypeError(f"{given} is none of {', '.join(bench.PEERS)}")
    return list(dict.fromkeys(names))


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "bench",
        help="time a model, or sets of them, beside eager mode and torch.compile",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, optional=True)
    parser.add_argument("--cases", choices=sorted(bench.SETS), help="a set of models instead of one (default: seeds)")
    parser.add_argument(
        "--peers",
        type=peers,
        default=["eager", "channels_last"],
        help=f"out of {', '.join(bench.PEERS)}, with commas between them (default: eager,channels_last)",
    )
    parser.add_argument("--ieee", action="store_true", help="float32 convolutions on a GPU without TF32")
    parser.add_argument(
        "--seconds", type=seconds, default=5.0, help="to spend on timing each model on a CPU (default: 5)"
    )
    parser.add_argument("--json", type=output_path, help="write the results there, after every model")
    parser.add_argument("--plot", type=output_path, help="write a picture (SVG) there")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    if given.model and given.cases:
        raise UserError("give either module:factory or --cases, not both")
    if given.model and not given.shape:
        raise UserError(f"{given.model} needs --shape, once per input: --shape 2x16x8x16x16")
    if given.shape and not given.model:
        raise UserError("--shape goes with module:factory; the cases have shapes of their own")
    if given.train and not given.model:
        raise UserError("--train goes with module:factory; the cases have modes of their own")
    device = given.device or default_device()
    check_environment()
    rest = _jobs(given, device)
    jobs = itertools.chain([next(rest)], rest)  # a model that does not load is said before anything is measured
    machine = bench.Machine.of(device)
    print(f"{environment.described(device)['device']}: {_rates(machine)}\n")
    rows = []
    kept = bench.RowFile(given.json, _facts(given, device), ("model", "mode", "dtype"))
    progress = _Progress()
    with _settings(given.ieee):
        for number, (name, model, shapes) in enumerate(jobs, 1):
            torch.manual_seed(0)
            torch._dynamo.reset()  # or it gives up compiling after a few models of the same class
            title = f"[{number}] {name}, {'train' if model.training else 'eval'}"
            row = bench.measure(
                name,
                model,
                shapes,
                dtype=given.dtype,
                device=device,
                peers=[bench.PEERS[p] for p in given.peers],
                machine=machine,
                seconds=given.seconds,
                progress=functools.partial(progress.show, title),
            )
            progress.clear()
            print("\n".join(described(row, machine)), "\n", flush=True)
            rows.append(row)
            with _writing(given.json):
                kept.add(row.to_json())  # now: what follows may be interrupted
    if given.json is not None:
        print(f"wrote {given.json}", file=sys.stderr)
    if given.plot is not None:
        _plot(given.plot, environment.described(device), rows)
    return Exit.FAILED if any(label.startswith("fxfuse") for row in rows for label in row.failed) else Exit.OK


def _jobs(given: argparse.Namespace, device: torch.device) -> Iterator[_Job]:
    """Name, model and shapes of what is to be measured, made when its turn comes."""
    if given.model:
        given.device = device
        model, _ = prepared(given)
        yield given.model, model, given.shape
        return
    for case in bench.SETS[given.cases or "seeds"]:
        for mode in bench.modes(case):
            torch.manual_seed(0)
            model = case.make().to(device, given.dtype).train(mode == "train")
            yield case.name, model, [case.shape if device.type == "cuda" else case.small]


@contextlib.contextmanager
def _settings(ieee: bool) -> Iterator[None]:
    """cuDNN's settings for a benchmark."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=not ieee):
        yield


def _facts(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the results were measured with."""
    precision = {"precision": "ieee" if given.ieee else "tf32 allowed"} if device.type == "cuda" else {}
    return {**environment.described(device), **precision, "protocol": bench.PROTOCOL[device.type]}


def _plot(path: pathlib.Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    with _writing(path):
        path.write_text(to_svg(rows, f"fxfuse {facts['fxfuse']} on {facts['device']}, torch {facts['torch']}"))
    print(f"wrote {path}", file=sys.stderr)


@contextlib.contextmanager
def _writing(path: pathlib.Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# --- text -----------------------------------------------------------------------------------------
def _rates(machine: bench.Machine) -> str:
    return f"{machine.bandwidth / 1e9:.3g} GB/s, {machine.flops / 1e12:.3g} TFLOP/s ({machine.source})"


def described(row: Row, machine: bench.Machine) -> list[str]:
    """A row for a terminal: a line per way to run it, the slowest first."""
    shapes = ", ".join("x".join(map(str, s)) for s in row.shapes)
    lines = [f"{row.model}, {row.mode}, {row.dtype}, {shapes}"]
    if row.ms:
        peak = f"{'memory':>14}" if row.peak else ""
        lines.append(f"  {'':<26}{'time':>13}{'/ fxfuse':>9}{peak}   {'error':<13}   first call")
    ours = row.ms[row.ours] if row.ours is not None else None
    for label, ms in sorted(row.ms.items(), key=lambda item: -item[1]):
        ratio = " " * 9 if ours is None else f"{ms / ours:8.2f}x"
        peak = f"{row.peak[label] / 2**20:10.0f} MiB" if label in row.peak else ""
        lines.append(f"  {label:<26}{ms:10.3f} ms{ratio}{peak}   {row.error[label]:<13.1e}   {row.first[label]:.1f} s")
    lines += [f"  {label:<26}not timed: {why}" for label, why in row.failed.items()]
    if ours is not None and row.work is not None:
        against = f"{row.ms[row.best] / ours:.2f} times as fast as {row.best}; " if row.best is not None else ""
        bound = row.work.bound(machine)
        lines.append(f"  fxfuse: {against}{ours / row.floor:.1f} times the least time, {row.floor:.3f} ms of {bound}")
    return lines


class _Progress:
    """What is being done, on stderr: one line that changes on a terminal, else a line each."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def show(self, title: str, what: str) -> None:
        line = f"{title}: {what}"
        if self._terminal:
            print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
