"""The least time that a machine needs: for moving what must be moved, or for computing what must be computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.kernels.cost import estimate
from fxfuse.region import Region
from fxfuse.timing import once, queued


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of a device: ``bandwidth`` in bytes copied per second, ``flops`` of matrix products per second."""

    bandwidth: float
    flops: float
    source: str

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The rates of ``device``: as measured once for a GPU that is known, else measured now (a second or so)."""
        return _rates(device.type, device.index)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call cannot do without, however it is done: ``bytes`` of inputs, parameters and outputs; ``flops`` of
    convolutions and matrix products, after the rewrites."""

    bytes: int
    flops: int

    def seconds(self, machine: Machine) -> float:
        """The longer one of the two times."""
        return max(self.bytes / machine.bandwidth, self.flops / machine.flops)

    def bound(self, machine: Machine) -> str:
        """Which of the two it is: "memory" or "arithmetic"."""
        return "memory" if self.bytes / machine.bandwidth >= self.flops / machine.flops else "arithmetic"


def work(optimised: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """The work of a call of an optimised model, which has been called with such inputs before."""
    call = _without_hooks(optimised, inputs)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.fxfuse.region: _region_flops}) as counter:
        result = call()
    outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    moved = [*inputs, *optimised.parameters(), *outputs]
    return Work(sum(t.numel() * t.element_size() for t in moved), int(counter.get_total_flops()))


def _without_hooks(optimised: Any, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """A call past the module's own: the counter puts hooks on all modules, under which the original would run."""
    served = optimised._fxfuse_runtime.serving(tuple(inputs), {})
    if served is None:
        return lambda: optimised(*inputs)
    special, lifted = served
    return lambda: special.run(*inputs, *lifted)


def _region_flops(_shapes: Any, text: str, **_: Any) -> int:
    """Operations of a region, for the counter: two per multiply-add of its rewritten chain."""
    cost = estimate(Region.parse(text).rewritten)
    return 0 if cost is None else 2 * cost.macs


@functools.cache
def _rates(kind: str, index: int | None) -> Machine:
    device = torch.device(kind if index is None else f"{kind}:{index}")
    if kind == "cuda" and "H100" in torch.cuda.get_device_name(device):
        # an SXM one; other results were compared with these rates, and are to be comparable
        return Machine(2.98e12, 751e12, "an H100: copies, 16-bit matrix products")
    gpu = kind == "cuda"
    size, dtype = (8192, torch.float16) if gpu else (1024, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    from_, to = (torch.ones(2**28 if gpu else 2**25, device=device, dtype=torch.uint8) for _ in range(2))
    moved, computed = _seconds(lambda: to.copy_(from_), gpu), _seconds(lambda: a @ a, gpu)
    what = f"measured here: copies, {'16' if gpu else '32'}-bit matrix products"
    return Machine(2 * from_.numel() / moved, 2 * size**3 / computed, what)


def _seconds(call: Callable[[], Any], gpu: bool) -> float:
    if gpu:
        return queued(lambda _: call(), [None])
    return min(once(call) for _ in range(7))
