"""The short way of a call that is like the last one of its region: the same forms of inputs, the same settings.

All that the long way asks of the inputs one by one is compared at once, by the guards that torch.compile puts in front
of its code: in one call of C++ types, dtypes, devices, sizes, strides and dispatch keys, among which are autocast,
views that negate, and torch.func's transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.kernels.codegen.formulas import COPIES
from fxfuse.kernels.compilation.switches import encoded, environment
from fxfuse.kernels.runtime.prepared import Prepared
from fxfuse.program import Program
from fxfuse.tolerance import tf32_allowed
from fxfuse.vocabulary import Kind

#: regions of which the last call is known; beyond it all are forgotten
MOST_RECENT = 1024


class ByTorch:
    """Torch's operators in place of kernels: what they ask of settings, they ask themselves."""

    def __init__(self, program: Program) -> None:
        self.run = functools.partial(program.run, reuse=True)
        made = {out: vocabulary.lookup(i.op) for i in program.body for out in i.outs}
        outputs = program.outputs
        #: every output has memory of its own
        self.apart = len({*outputs}) == len(outputs) and all(n in made and computes(made[n]) for n in outputs)


def computes(op: vocabulary.Op) -> bool:
    """Whether the results of an operator are never its operands, nor views of them."""
    return op.name not in COPIES and op.kind in (Kind.ANCHOR, Kind.POINTWISE, Kind.POOL, Kind.NORM, Kind.REDUCTION)


class Call(NamedTuple):
    """A call, and what ran it."""

    runs: Prepared | ByTorch
    inputs: int
    check: Callable[..., bool]  #: of torch's guards of the inputs
    requires_grad: bool  #: one of the inputs does
    tf32: bool | None  #: torch's setting; None where it is of no consequence


_recent: dict[str, Call] = {}
#: regions whose last call torch's operators ran as the model wrote it, while gradients were on (True) or off
_as_written: set[tuple[str, bool]] = set()


def _known_guards() -> Any:
    """torch's class, where it is there and takes what is given to it here: it is none of the public ones."""
    found: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    probe = torch.empty(2, 1, device="cpu")
    try:
        made = found(probe, dynamic_dims_sizes=[[2, 1]], dynamic_dims_strides=[[1, 1]])
        works = made.check(probe) and not made.check(probe.t()) and not made.check(probe.double())
    except Exception:  # noqa: BLE001 - the long way does without
        return None
    return found if works else None


_guards = _known_guards()
# asked on every call
_grad_enabled = torch.is_grad_enabled
_modes = torch._C._len_torch_dispatch_stack
_KERNELS, _OFF = encoded("FXFUSE_KERNELS", "0")


def guards_of(inputs: Sequence[Tensor]) -> Any:
    """What has ``check(*tensors)``, True for tensors like these; None where torch has no such guards."""
    if _guards is None:
        return None
    sizes, strides = [list(t.shape) for t in inputs], [list(t.stride()) for t in inputs]
    return _guards(*inputs, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def switched_off() -> bool:
    """Whether FXFUSE_KERNELS leaves kernels out."""
    return bool(environment.get(_KERNELS) == _OFF)


def find(text: str, inputs: Sequence[Tensor]) -> Prepared | ByTorch | None:
    """What ran the last call of the region, if ``inputs`` may go the same way now."""
    call = _recent.get(text)
    if call is None or len(inputs) != call.inputs or not call.check(*inputs) or not holds(text, call):
        return None
    return call.runs


def last(text: str) -> Call | None:
    """The last call of the region."""
    return _recent.get(text)


def like(text: str, inputs: Sequence[Tensor]) -> Call | None:
    """The last call of the region, if it was of inputs like these."""
    call = _recent.get(text)
    return call if call is not None and len(inputs) == call.inputs and call.check(*inputs) else None


def holds(text: str, call: Call) -> bool:
    """Whether ``call`` is still the last one of the region, and another one with such inputs may go its way now."""
    _, _, _, requires_grad, tf32 = call
    return (
        call is _recent.get(text)
        and not (requires_grad and _grad_enabled())
        and (tf32 is None or tf32 is tf32_allowed())
        and not _modes()
        and environment.get(_KERNELS) != _OFF
    )


def remember(text: str, inputs: Sequence[Tensor], runs: Prepared | ByTorch) -> None:
    """Let calls like this one, which ``runs`` has run, go the short way: without autocast, as kernels and torch's
    operators want it, or where it is of no consequence to them."""
    guards = guards_of(inputs)
    if guards is None:
        return
    if len(_recent) >= MOST_RECENT:
        forget()
    tf32 = tf32_allowed() if any(t.dtype is torch.float32 for t in inputs) else None
    requires_grad = any(t.requires_grad for t in inputs)
    _recent[text] = Call(runs, len(inputs), guards.check, requires_grad, tf32)


def note(text: str, *, as_written: bool) -> None:
    """Whether torch's operators run calls of the region like this one for good, as the model wrote it."""
    (_as_written.add if as_written else _as_written.discard)((text, _grad_enabled()))


def as_written(texts: Sequence[str], unless: Sequence[object]) -> Callable[[], bool] | None:
    """A function that tells whether calls like the last ones of all of these regions are still as the model wrote them;
    None where those were not. Nor are they where ``unless`` holds anything."""
    gradients = _grad_enabled()
    if not texts or not all((t, gradients) in _as_written for t in texts):
        return None
    times = _forgotten[0]
    tf32 = tf32_allowed() if torch.cuda.is_initialized() else None  # of no consequence on a CPU

    def still() -> bool:
        return (
            times == _forgotten[0]
            and not unless
            and _grad_enabled() is gradients
            and (tf32 is None or tf32 is tf32_allowed())
            and not _modes()
        )

    return still


#: how often everything was forgotten
_forgotten = [0]


def forget() -> None:
    """Let the next call of every region go the long way."""
    _forgotten[0] += 1
    _recent.clear()
    _as_written.clear()
