"""What a program costs: arithmetic and memory traffic, from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import vocabulary
from fxfuse.chain import no_autocast
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.program import Program
from fxfuse.vocabulary import Kind


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of a device, for comparing programs on it: multiply-adds and bytes per second, seconds of a call.

    ``cached``: bytes per second of what caches hold.
    """

    macs: float
    bandwidth: float
    cached: float
    call: float


#: two CPU cores; one H100 (TF32 matrix rate and copy bandwidth as measured there)
MACHINES = {
    "cpu": Machine(macs=5e10, bandwidth=1e10, cached=4e10, call=4e-6),
    "cuda": Machine(macs=2e14, bandwidth=3e12, cached=3e12, call=5e-6),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """``macs`` multiply-adds; ``bytes`` read and written when every operator runs by itself, in ``calls`` of torch."""

    macs: int
    bytes: int
    calls: int

    def seconds(self, machine: Machine) -> float:
        return self.macs / machine.macs + self.bytes / machine.bandwidth

    def one_by_one(self, machine: Machine) -> float:
        """Seconds of calls of small tensors, of which the calls themselves may be the most."""
        return self.macs / machine.macs + self.bytes / machine.cached + self.calls * machine.call


@dataclasses.dataclass(frozen=True)
class Operator:
    """One instruction run by itself: multiply-adds, bytes of its operands and of its results (0 of a view's)."""

    instr: Instr
    results: tuple[TensorType, ...]
    macs: int
    read: int
    written: int


def estimate(program: Program) -> Cost | None:
    """The cost of running ``program`` operator by operator; None where a size is not known."""
    found = operators(program)
    if found is None:
        return None
    calls = sum(_CALLS.get(vocabulary.lookup(o.instr.op).kind, 1) for o in found)
    return Cost(sum(o.macs for o in found), sum(o.read + o.written for o in found), calls)


#: calls of torch that operators of some kinds are; the others are one
_CALLS = {Kind.SHAPE: 0, Kind.DERIVED: 3}


@functools.lru_cache(maxsize=1024)
def operators(program: Program) -> tuple[Operator, ...] | None:
    """What every instruction of ``program`` costs by itself, in order; None where a size is not known."""
    if any(size is None for _, kind in program.inputs for size in kind.shape):
        return None
    found = []
    with FakeTensorMode(), torch.no_grad(), no_autocast():
        values: dict[str, Tensor] = {
            name: torch.empty([s or 0 for s in kind.shape], dtype=kind.dtype) for name, kind in program.inputs
        }
        for instr in program.body:
            operands = [values[o.name] if isinstance(o, Ref) else o for o in instr.operands]
            result = vocabulary.lookup(instr.op)(*operands, **dict(instr.attributes))
            results: Sequence[Tensor] = result if isinstance(result, tuple) else (result,)
            values.update(zip(instr.outs, results, strict=True))
            tensors = [o for o in operands if isinstance(o, Tensor)]
            moved = (0, 0) if vocabulary.lookup(instr.op).view else (_bytes(tensors), _bytes(results))
            types = tuple(TensorType(t.dtype, tuple(t.shape)) for t in results)
            found.append(Operator(instr, types, _macs(instr, tensors, results[0]), *moved))
    return tuple(found)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _macs(instr: Instr, operands: Sequence[Tensor], result: Tensor) -> int:
    if instr.op == "conv_transpose":
        x, weight = operands[0], operands[1]
        spatial = weight.dim() - 2
        positions = math.prod(result.shape[-spatial:]) // max(math.prod(dict(instr.attributes)["stride"]), 1)
        batch = x.shape[0] if x.dim() == spatial + 2 else 1
        return int(batch * positions * weight.numel())
    if instr.op == "contract_taps":
        positions = math.prod(result.shape[2:]) // max(math.prod(dict(instr.attributes)["stride"]), 1)
        return int(operands[0].shape[0] * positions * operands[1].numel())
    return 0
