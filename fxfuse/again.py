"""The short way of a call of a model that is like the one before: as :mod:`fxfuse.kernels.recent` has it for a region.

What :mod:`fxfuse.runtime` asks of the call's tensors and the model's one by one is compared at once, by the guards
that torch.compile puts in front of its code. They do not hold where a tensor comes twice either, nor under
torch.func's transforms and torch.jit.trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fxfuse.capture import Capture
from fxfuse.guards import Guards
from fxfuse.kernels.recent import guards_of

# asked on every call
_default_dtype = torch.get_default_dtype
_grad_enabled = torch.is_grad_enabled


class Again(NamedTuple):
    """Tells calls that are like a given one: of tensors alone, by position, and no two of them the same."""

    inputs: int
    guards: Guards  #: of the model
    lifted: tuple[tuple[dict[str, Any], str], ...]  #: where the tensors are that the capture lifted
    kept: tuple[int, ...]  #: those of them that the graph takes
    check: Callable[..., bool]  #: of torch's guards, of the call's tensors and of these
    grad: bool | None  #: whether gradients are on; None where it is of no consequence
    dtype: torch.dtype  #: torch's default

    @staticmethod
    def of(
        capture: Capture, guards: Guards, kept: tuple[int, ...], tensors: Sequence[Tensor], lifted: Sequence[Tensor]
    ) -> Again | None:
        """Of a call with ``tensors`` that ``capture`` serves, without autocast; None where torch has no such guards, or
        none that would hold: a tensor comes twice."""
        given = [*tensors, *lifted]
        made = guards_of(given) if len({*map(id, given)}) == len(given) else None
        if made is None:
            return None
        places = tuple((t.holder, t.name) for t in capture.lifted)
        grad = _grad_enabled() if capture.asks_grad else None
        return Again(len(tensors), guards, places, kept, made.check, grad, _default_dtype())

    def given(self, args: Sequence[Any]) -> list[Tensor] | None:
        """What the graph takes for a call with ``args``; None where it is not like the one before."""
        inputs, guards, places, kept, check, grad, dtype = self
        if len(args) != inputs or not guards.hold():
            return None
        lifted = []
        for holder, name in places:
            tensor = holder.get(name)
            if tensor is None:
                return None
            lifted.append(tensor)
        if (
            not check(*args, *lifted)
            or (grad is not None and grad is not _grad_enabled())
            or dtype is not _default_dtype()
            or forward_ad._current_level >= 0
            or _has_any_global_hook()
        ):
            return None
        return [*args, *[lifted[i] for i in kept]]
