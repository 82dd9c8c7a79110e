"""One model, all ways to run it: verified, timed, and set against the least time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.bench.peers import OURS, Peer, layout_of
from fxfuse.bench.roofline import Machine, Work, work
from fxfuse.capture import CallForm
from fxfuse.kernels.plan import Path
from fxfuse.ops import Run, watch
from fxfuse.report import Report
from fxfuse.state import State
from fxfuse.timing import in_turns, once, queued
from fxfuse.verification.comparison import Kind
from fxfuse.verification.outcome import Way, behind
from fxfuse.verification.verifier import Verifier

#: bytes of inputs to rotate through on a GPU: more than any L2
ROTATION = 200e6
#: how it is timed, per type of device: a sentence to keep beside the results
PROTOCOL = {
    "cuda": "no_grad, CUDA events around 20 queued calls, rotated inputs, median of 7, cudnn.benchmark",
    "cpu": "no_grad, in turns, median of at most 15",
}


@dataclasses.dataclass
class Row:
    """The results of one model in one mode, by the label of each way to run it.

    ``ms`` milliseconds of a call, ``first`` seconds of the first one, compilation included, ``peak`` bytes of GPU
    memory that a call takes, ``error`` against the truth. ``failed`` says why a way was not timed: it does not run,
    or its results are wrong. ``plan`` tells what runs the regions.
    """

    model: str
    mode: str
    dtype: str
    shapes: list[list[int]]
    work: Work | None = None
    floor: float = 0.0
    ms: dict[str, float] = dataclasses.field(default_factory=dict)
    first: dict[str, float] = dataclasses.field(default_factory=dict)
    peak: dict[str, int] = dataclasses.field(default_factory=dict)
    error: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)  #: labels of those that failed to verify
    plan: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> str | None:
        """The label of the faster one of fxfuse's ways; None where none was timed."""
        return min((k for k in self.ms if k.startswith("fxfuse")), key=self.ms.__getitem__, default=None)

    @property
    def best(self) -> str | None:
        """The label of the fastest peer; None where none was timed."""
        return min((k for k in self.ms if not k.startswith("fxfuse")), key=self.ms.__getitem__, default=None)

    def to_json(self) -> dict[str, Any]:
        """The row as ``benchmarks/results`` keeps it."""
        rounded = {k: round(v, 4) for k, v in self.ms.items()}
        row = {
            "model": self.model,
            "mode": self.mode,
            "dtype": self.dtype,
            "shapes": self.shapes,
            "ms": rounded,
            "floor": round(self.floor, 4),
            "error": self.error,
            "first_s": {k: round(v, 3) for k, v in self.first.items()},
            "peak_bytes": self.peak,
            "plan": self.plan,
            "failed": self.failed,
        }
        return {k: v for k, v in row.items() if v or k in ("ms", "floor", "error")}


@dataclasses.dataclass
class _Runner:
    """A peer that is ready to be timed."""

    peer: Peer
    call: Any
    turns: list[list[Tensor]]

    def __call__(self, turn: list[Tensor]) -> Any:
        return self.call(*turn)


def measure(
    name: str,
    model: nn.Module,
    shapes: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[Peer],
    machine: Machine,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Row:
    """Measure ``model``, as it is, on random inputs of these ``shapes``, with ``peers`` and fxfuse.

    ``model`` is on ``device`` already and is left as it is. ``seconds`` bounds the timing on a CPU. Nothing is
    timed that :class:`Verifier` does not find right: ``Row.failed`` says why.
    """
    row = Row(name, "train" if model.training else "eval", str(dtype).removeprefix("torch."), [list(s) for s in shapes])
    turns = _inputs(shapes, dtype, device)
    layout = layout_of(turns[0])
    with torch.no_grad():
        progress("eager mode and float64")
        form, tensors = CallForm.of(turns[0], {})
        verifier = Verifier(Way(lambda args, kwargs: model(*args, **kwargs), model), form, tensors)
        runners: dict[str, _Runner] = {}
        for peer in (*peers, *OURS):
            if peer.channels_last and layout is None:
                continue
            progress(f"{peer.label}: first call, verification")
            runner = _prepare(peer, model, turns, layout or torch.contiguous_format, verifier, row)
            if runner is not None:
                runners[peer.label] = runner
        if "fxfuse" in runners:
            row.work = work(runners["fxfuse"].call, turns[0])
            row.floor = 1e3 * row.work.seconds(machine)
        progress("timing")
        row.ms = {k: 1e3 * v for k, v in _times(runners, device, seconds).items()}
    return row


def _inputs(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Sets of inputs to take in turns: one on a CPU, on a GPU so many that no cache holds them."""
    size = sum(torch.Size(s).numel() for s in shapes) * dtype.itemsize
    count = min(8, int(ROTATION // max(size, 1)) + 2) if device.type == "cuda" else 1
    return [[torch.randn(*s, device=device, dtype=dtype) for s in shapes] for _ in range(count)]


def _prepare(
    peer: Peer,
    model: nn.Module,
    turns: list[list[Tensor]],
    layout: torch.memory_format,
    verifier: Verifier,
    row: Row,
) -> _Runner | None:
    """Make a peer, call it for the first time and verify it; None, and a line in ``row``, where it is not right."""
    own = [[peer.lay_out(x, layout) for x in turn] for turn in turns]
    made: list[Any] = []
    try:
        taken = once(lambda: made.append(peer.make(model, layout)))
        module = made[0]
        way = Way(lambda args, _: module(*[peer.lay_out(x, layout) for x in args]), behind(module))
        with State(way.module, own[0]).kept():
            taken += once(lambda: module(*own[0]))
        with watch() as runs:
            found = verifier.check(way)
    except torch.OutOfMemoryError as error:
        row.failed[peer.label] = f"out of memory: {str(error).splitlines()[0]}"
        return None
    except Exception as error:  # noqa: BLE001 - a compiler that fails is a result
        line = (str(error).strip().splitlines() or [""])[0]
        row.failed[peer.label] = f"it does not run: {type(error).__name__}: {line}"
        return None
    row.first[peer.label] = taken
    outputs = [c for c in found.comparisons if c.kind is Kind.OUTPUT]
    row.error[peer.label] = max((c.error for c in outputs), default=0.0)
    if peer.ours:
        row.plan[peer.label] = _plan(module.fxfuse_report, runs)
    if not found.ok:
        row.failed[peer.label] = f"it is not right: {'; '.join(found.failures)}"
        row.wrong.append(peer.label)
        return None
    if turns[0][0].is_cuda:
        row.peak[peer.label] = _peak(lambda: module(*own[0]))
    return _Runner(peer, module, own)


def _plan(report: Report, runs: Sequence[Run]) -> str:
    """What ran the regions of a model."""
    if not report.regions:
        return "nothing is fused"
    kernels = {r.region for r in runs if r.path is Path.KERNEL}
    return " | ".join(r.plan if r.region in kernels else "torch's operators" for r in report.regions)


def _peak(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _times(runners: dict[str, _Runner], device: torch.device, seconds: float | None) -> dict[str, float]:
    if device.type == "cuda":
        return {name: queued(runner, runner.turns) for name, runner in runners.items()}
    ways = {name: (lambda runner=runner: runner(runner.turns[0])) for name, runner in runners.items()}
    return in_turns(ways, rounds=15, seconds=seconds) if ways else {}
