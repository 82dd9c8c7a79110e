"""Which way a region runs in an eager call. Pure: from the region and the call's needs alone."""

from __future__ import annotations

import enum
import functools

from fxfuse.kernels.cost import MACHINES, estimate
from fxfuse.program import Program
from fxfuse.region import Region


class Path(enum.Enum):
    """How a region runs."""

    REWRITTEN = "rewritten"  #: the rewritten chain by torch's operators; nobody asks for gradients
    KERNEL = "kernel"  #: the rewritten chain, as far as that is worth it by kernels of ours
    ORIGINAL = "original"  #: the chain as the model wrote it, recorded by autograd
    RECOMPUTE = "recompute"  #: the rewritten chain forward; the original chain again, in the backward


#: with gradients, run the rewritten chain where it costs at most this part of the original
RECOMPUTE_BELOW = 0.1


@functools.lru_cache(maxsize=4096)
def choose(region: Region, device: str, gradients: bool) -> Path:
    """The path for a call on ``device`` ("cpu", "cuda") that does or does not ask for gradients.

    A backward needs the original chain's intermediates. Recomputing them costs a forward more than
    autograd's way, so the rewritten chain pays only where it is a small part of the original: then
    a call that is never differentiated gains it all, and one that is loses next to nothing.
    """
    if not gradients:
        return Path.REWRITTEN
    found = _seconds(region, device)
    return Path.RECOMPUTE if found is not None and found[1] <= RECOMPUTE_BELOW * found[0] else Path.ORIGINAL


@functools.lru_cache(maxsize=4096)
def by_torch(region: Region, device: str) -> Path:
    """The chain that torch's operators run in a call without gradients: the rewritten one only where it is faster.

    On small tensors calls are what counts, and arithmetic on weights may be more of them than the chain is.
    """
    found = _seconds(region, device)
    return Path.ORIGINAL if found is not None and found[0] <= found[1] else Path.REWRITTEN


def _seconds(region: Region, device: str) -> tuple[float, float] | None:
    """Of the original chain and of the rewritten one; None where they are the same, or their sizes not known."""
    before, after = estimate(region.original), estimate(region.rewritten)
    if region.rewritten == region.original or before is None or after is None:
        return None
    machine = MACHINES.get(device, MACHINES["cuda"])
    return before.one_by_one(machine), after.one_by_one(machine)


def chain_of(region: Region, path: Path) -> Program:
    """The chain that a path runs."""
    return region.original if path is Path.ORIGINAL else region.rewritten
