"""Hundreds of random chains (tests/drawn.py) on a GPU, on many processes, against float64 and eager mode.

    python tests/many_chains.py [--count 320] [--processes 16] [--first 0] [--device cuda|emulated|cpu]
    python tests/many_chains.py --seed 17      # one of them, in this process

Every chain runs on three shapes, of which one has the other memory format, and some more times on each, in the end as
a CUDA graph: the bits must be the same. Kernels run whether they are the faster or not. An emulated GPU runs them on
the CPU, thread by thread. On a CPU the chains run through torch, and the steps that are counted are those of the
schedule that a Hopper GPU would have.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from drawn import Drawn, draw
from emulator.device import emulated
from emulator.graphs import graphs_of
from orientation import pingpong_always, sets_always
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

import fxfuse
from fxfuse import ops, vocabulary
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.convolution import adapted
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.plan import Path
from fxfuse.kernels.planning import estimate, schedule
from fxfuse.kernels.planning.candidate import Candidate
from fxfuse.kernels.stages import tail
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.sources import kind_of
from fxfuse.kernels.stages.steps import Bundle, Gather, Schedule, Torch
from fxfuse.region import Region
from fxfuse.vocabulary import Kind

#: relative L2 error against float64 that the class's rounding explains; and in how many such steps as a chain has
LIMIT = {"tf32": 1e-3, "ieee": 5e-7, "float16": 2e-3, "bfloat16": 1.6e-2}
SLACK = 3
#: relative steps of the input and the parameters that show how far a chain carries rounding
ROUNDING = {"tf32": 2**-11, "ieee": 2**-23, "float16": 2**-10, "bfloat16": 2**-8}
#: an error that is let pass beyond this says nothing
NOISY = 0.1
#: seconds that one chain may take
PATIENCE = 120.0
#: calls with the same tensors until one is replayed: it is measured, known, and captured
AGAIN = 3


@dataclasses.dataclass
class Outcome:
    """What became of a chain: how often a region ran as kernels, by torch, as a graph; which steps; what is wrong."""

    seed: int
    failure: str | None = None
    refused: str | None = None  # by eager mode
    kernels: int = 0
    by_torch: int = 0
    replayed: int = 0
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    noisy: int = 0
    seconds: float = 0.0
    ends: bool = False  # the process can do no more


class _Refused(Exception):  # noqa: N818 - eager mode's affair
    pass


# --- one chain ------------------------------------------------------------------------------------
def run(seed: int, device: str) -> Outcome:
    """Check the chain of ``seed``."""
    outcome, began, drawn = Outcome(seed), time.monotonic(), draw(seed)
    heard = _Heard()
    try:
        gpu = _emulated(seed) if device == "emulated" else contextlib.nullcontext()
        with heard, gpu, _kernels(drawn, seed), _precision(drawn):
            _check(drawn, device, outcome)
        if heard.messages:
            raise AssertionError(heard.messages[0])
    except _Refused as refusal:
        outcome.refused = str(refusal)
    except Exception as error:  # noqa: BLE001 - all of them are shown with the chain
        short = "".join(traceback.format_exception(error, limit=-3))
        outcome.failure = f"{drawn}\n{short}"
        outcome.ends = device == "cuda" and _lost()
    outcome.seconds = time.monotonic() - began
    return outcome


def _kernels(drawn: Drawn, seed: int) -> contextlib.AbstractContextManager[None]:
    each = seed % 8
    return kernels_always(
        drawn.anchored,
        twice=each % 2 == 1,
        spread=seed % 3 == 1,
        sets=each in (2, 6),
        pingpong=each in (3, 4),
        gathered=each in (1, 2, 3, 6),
    )


@contextlib.contextmanager
def _emulated(seed: int) -> Iterator[None]:
    with emulated(seed) as machine, graphs_of(machine):
        yield


def _lost() -> bool:
    """Whether an error has taken the GPU from this process for good."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _check(drawn: Drawn, device: str, outcome: Outcome) -> None:
    place = "cpu" if device == "emulated" else device
    eager = drawn.model(place)
    truth, model = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    fast = fxfuse.optimize(model)
    kinds: collections.Counter[str] = collections.Counter()
    execute.forget()
    with torch.no_grad():
        for i, x in enumerate(drawn.inputs(place)):
            if i == 0:  # the first call is the model's own: captured, and compared
                try:
                    eager(x)
                except NotImplementedError as error:
                    raise _Refused(str(error)) from None
                fast(x), truth(x.double())
            with ops.watch() as runs, _plans(drawn, device) as plans:
                kept = [b.clone() for b in model.buffers()]
                got = fast(x).clone()  # where others will lie
                outcome.kernels += sum(r.path is Path.KERNEL for r in runs)
                outcome.by_torch += sum(r.path is not Path.KERNEL for r in runs)
            made = [p.schedule for p in execute._prepared.values() if p is not None] if device != "cpu" else plans
            execute.forget()
            outcome.kernels += len(plans)
            for each in made:
                kinds.update(kinds_of(each))
            for turn in range(AGAIN if device != "cpu" else 1):
                for buffer, before in zip(model.buffers(), kept, strict=True):
                    buffer.copy_(before)
                again = fast(x)
                if made and all(each.kernel is not None for each in made):  # cuDNN's own promise nothing
                    assert _same_bits(got, again), f"other bits in run {turn + 2}: {_difference(got, again)}"
                del again  # the next one shall lie there
            found = [p.replays for p in execute._prepared.values() if p is not None]
            outcome.replayed += sum(r is not None and r.captured > 0 for r in found)
            outcome.noisy += _compare(drawn, eager, truth, x, got)
        _compare_buffers(model, eager, truth)
    outcome.kinds = dict(kinds)


def _compare(drawn: Drawn, eager: nn.Module, truth: nn.Module, x: Tensor, got: Tensor) -> bool:
    """Assert that a result is right; whether that says little, since the chain makes noise of rounding."""
    others = [_off(eager, x, ROUNDING[drawn.numerics], i) for i in range(3)]  # before eager's buffers move on
    expected, exact = eager(x), truth(x.double())
    if x.device.type == "cpu" and exact.isfinite().all() and not expected.isfinite().all():
        raise _Refused("torch's bfloat16 convolutions on a CPU read memory that nobody wrote")
    for name in ("shape", "dtype"):
        assert getattr(got, name) == getattr(expected, name), (name, getattr(got, name), getattr(expected, name))
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (got, expected)]
    assert strides[0] == strides[1], ("strides", got.stride(), expected.stride())
    found, own = errors(got, exact), errors(expected, exact)
    limits = [SLACK * max(e, n * LIMIT[drawn.numerics]) for n, e in enumerate(own, 1)]
    if all(e <= most for e, most in zip(found, limits, strict=True)):
        return False
    noise = [errors(model(y), exact) for model, y in others]
    limits = [max(most, 10 * max(n[i] for n in noise)) for i, most in enumerate(limits)]
    text = ", ".join(f"{e:.2e} (at most {most:.2e})" for e, most in zip(found, limits, strict=True))
    right = all(e <= most for e, most in zip(found, limits, strict=True))
    assert right, f"x {tuple(x.shape)} {x.stride()}: errors of {text}"
    return max(limits) > NOISY


def errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """The relative error in the L2 norm; and the largest one of an element, relative to the largest value."""
    whole, finite = relative_error(value, truth), truth.isfinite()
    off = (value.double() - truth)[finite].abs()
    largest = float(truth[finite].abs().max()) if off.numel() else 0.0
    return whole, float(off.max()) / largest if largest > 0 else whole


def _off(model: nn.Module, x: Tensor, step: float, number: int) -> tuple[nn.Module, Tensor]:
    """The model and the input with all their numbers a little off."""
    generator = torch.Generator(x.device).manual_seed(number)
    other = copy.deepcopy(model)

    def off(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator, device=t.device)
        return (t * (1 + step * noise)).to(t.dtype)

    for p in other.parameters():
        p.copy_(off(p))
    return other, off(x)


def _compare_buffers(model: nn.Module, eager: nn.Module, truth: nn.Module) -> None:
    for (name, a), b, c in zip(model.named_buffers(), eager.buffers(), truth.buffers(), strict=True):
        assert a.dtype is b.dtype, name
        error, own = relative_error(a, c), relative_error(b, c)
        assert error <= max(SLACK * own, 3e-3 if a.dtype is torch.float32 else 3e-2), (name, error, own)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    number = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(number), b.contiguous().view(number))


def _difference(a: Tensor, b: Tensor) -> str:
    """Where two results of a size differ, and how much."""
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(math.inf)
    return f"{int((~same).sum())} of {a.numel()} elements of {tuple(a.shape)}, by {float(off.max()):.1e} at most"


# --- which steps ----------------------------------------------------------------------------------
def kinds_of(made: Schedule) -> Iterator[str]:
    """The kernels of a schedule, by algorithm."""
    kernel = made.kernel
    if kernel is not None:
        yield f"convolution, {kernel.combine.lower() or 'stored'}, {kernel.layout}"
        if kernel.fold is not None:
            yield f"convolution that folds {kernel.fold.combine}"
        if kernel.gathers:
            yield f"convolution that gathers{'' if kernel.keeps else ' and keeps nothing'}"
    if made.measuring is not None:
        yield "statistics from products" if made.measuring.correlates else "convolution run twice"
    for step in (*made.between, *made.steps):
        if isinstance(step, Gather):
            yield from (f"{kind}, {step.layout or 'gathered'}" for kind in step.gathers)
        elif isinstance(step, Torch):
            others = {i.op for i in step.program.body if vocabulary.lookup(i.op).kind is not Kind.SHAPE}
            yield from (f"torch, {op}" for op in sorted(others))
        elif isinstance(step, (Bundle, Sums, Contraction)):
            yield kind_of(step)
        elif step.window is not None:
            yield f"{'adaptive ' if step.window.adaptive else ''}pool, {' to '.join(step.layouts)}"
        elif step.fold is not None:
            yield f"fold {step.fold.combine}, {step.layouts[0]}"
        elif step.rows is not None:
            yield f"rows {step.rows.combine}"
        else:
            yield f"map, {step.layouts[0]}"


def plan(region: Region, inputs: Sequence[Tensor], *, exact: bool) -> Candidate:
    """What a Hopper GPU would run."""
    with mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _as_cudnn):
        return next(execute.candidates(region.rewritten, inputs, exact=exact, hopper=True))


def _as_cudnn(x: Tensor, weight: Tensor, _backend: object) -> torch.memory_format:
    """The memory format of its convolutions' outputs."""
    formats = {suggest_memory_format(t) for t in (x, weight)}
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim(), torch.contiguous_format)
    return last if last in formats else torch.contiguous_format


@contextlib.contextmanager
def _plans(drawn: Drawn, device: str) -> Iterator[list[Schedule]]:
    """The schedules of the regions that run inside the block on a CPU."""
    found: list[Schedule] = []

    def spy(region: Region, inputs: Sequence[Tensor], _key: object) -> None:
        made = plan(region, inputs, exact=not drawn.allow_tf32).schedule
        found.extend([] if made is None else [made])

    with mock.patch("fxfuse.kernels.execute.run", spy) if device == "cpu" else contextlib.nullcontext():
        yield found


# --- switches -------------------------------------------------------------------------------------
@contextlib.contextmanager
def kernels_always(
    anchored: bool = True,
    *,
    twice: bool = False,
    any_size: bool = True,
    spread: bool = False,
    sets: bool = False,
    pingpong: bool = False,
    gathered: bool = False,
) -> Iterator[None]:
    """Kernels run whether they are the faster or not; the convolution's only where ``anchored``, and ``twice``, or once
    behind statistics from products of its input where there are such. ``any_size``: behind it, on the smallest values.
    ``spread``: small layers have tiles for all of a GPU, and not those of large layers. ``sets``: samples lie side by
    side wherever they may; ``pingpong``: and each warpgroup has tiles of its own. ``gathered``: so are maxima and sums
    of exponentials over all of space, wherever they may be.
    """
    slower = (lambda *_: None) if anchored else (lambda *_: "it is torch's turn")
    with contextlib.ExitStack() as stack:
        for module in (tail, schedule) if any_size else ():
            stack.enter_context(mock.patch.object(module, "LEAST_ELEMENTS", 1))
        if any_size:
            stack.enter_context(mock.patch.object(tail, "ENOUGH_THREADS", 1))
        stack.enter_context(mock.patch.object(execute, "slower", slower))
        if not spread:
            stack.enter_context(mock.patch.object(adapted, "ENOUGH_TILES", 0))
        Convolution.of.cache_clear()
        stack.callback(Convolution.of.cache_clear)
        if sets:
            stack.enter_context(sets_always())
        if pingpong:
            stack.enter_context(pingpong_always())
        for part in ("WORTH_TWICE", "HOPELESS") if twice else ():
            stack.enter_context(mock.patch.object(execute, part, math.inf))
        if twice:
            stack.enter_context(mock.patch.object(estimate, "SQUARED", -1.0))
        if gathered:
            stack.enter_context(mock.patch.object(execute, "WORTH_GATHERING", math.inf))
        yield


@contextlib.contextmanager
def _precision(drawn: Drawn) -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=drawn.allow_tf32):
        yield


class _Heard(logging.Handler):
    """What the compiler swallows and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "please report" in record.getMessage() or "is defective" in record.getMessage():
            self.messages.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("fxfuse").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fxfuse").removeHandler(self)


# --- many of them ---------------------------------------------------------------------------------
def serve(device: str) -> None:
    """Check the seeds that standard input names, a line each; outcomes go to standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints
    torch.set_num_threads(1)
    for line in sys.stdin:
        outcome = run(int(line), device)
        answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        if outcome.ends:
            return


def search(seeds: Sequence[int], device: str, processes: int) -> list[Outcome]:
    """Check all seeds on so many processes. One that dies or hangs is another's failure only: the next goes on."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        waiting.put(seed)
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=_work, args=(waiting, outcomes, device)) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(outcomes, key=lambda o: o.seed)


def _work(waiting: queue.SimpleQueue[int], outcomes: list[Outcome], device: str) -> None:
    worker: subprocess.Popen[str] | None = None
    while True:
        try:
            seed = waiting.get_nowait()
        except queue.Empty:
            break
        if worker is None:
            command = [sys.executable, __file__, "--serve", "--device", device]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        outcome = _ask(worker, seed)
        outcomes.append(outcome)
        if outcome.ends:
            worker.wait()
            worker = None
    if worker is not None:
        worker.communicate()


def _ask(worker: subprocess.Popen[str], seed: int) -> Outcome:
    assert worker.stdin is not None and worker.stdout is not None
    timer = threading.Timer(PATIENCE, worker.kill)
    timer.start()
    try:
        worker.stdin.write(f"{seed}\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except OSError:
        answer = ""
    finally:
        timer.cancel()
    if answer:
        return Outcome(**json.loads(answer))
    why = f"the process ended with {worker.wait()}, of a crash or after {PATIENCE:.0f} s"
    return Outcome(seed, f"{draw(seed)}\n{why}", ends=True)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts: of chains; of failures; of chains that ran as kernels, or say little; of kinds of steps."""
    kinds: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        kinds.update(outcome.kinds)
    return {
        "chains": len(outcomes),
        "failures": sum(o.failure is not None for o in outcomes),
        "refused by eager mode": sum(o.refused is not None for o in outcomes),
        "fused": sum(o.kernels > 0 for o in outcomes),
        "replayed": sum(o.replayed > 0 for o in outcomes),
        "noisy": sum(o.noisy > 0 for o in outcomes),
        "kinds": dict(sorted(kinds.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", choices=("cuda", "emulated", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, help="check this one alone")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.device)
        return
    began = time.monotonic()
    if given.seed is not None:
        outcomes = [run(given.seed, given.device)]
        print(draw(given.seed))
    else:
        outcomes = search(range(given.first, given.first + given.count), given.device, given.processes)
    for outcome in outcomes:
        if outcome.failure is not None:
            print(f"\n=== seed {outcome.seed}\n{outcome.failure}")
    print(json.dumps(summary(outcomes), indent=1))
    slowest = ", ".join(f"{o.seed}: {o.seconds:.1f}" for o in sorted(outcomes, key=lambda o: -o.seconds)[:5])
    print(f"{time.monotonic() - began:.0f} s; the slowest seeds: {slowest}")
    sys.exit(any(o.failure is not None for o in outcomes))


if __name__ == "__main__":
    main()
