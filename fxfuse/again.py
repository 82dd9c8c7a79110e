"""The short way of a call of a model that is like the one before: as :mod:`fxfuse.kernels.recent` has it for a region.

What :mod:`fxfuse.runtime` asks of the call's tensors and the model's one by one is compared at once, by the guards
that torch.compile puts in front of its code. They do not hold where a tensor comes twice either, nor under
torch.func's transforms and torch.jit.trace.
"""

from __future__ import annotations

import operator
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
_get = dict.get
_default_dtype = torch.get_default_dtype
_grad_enabled = torch.is_grad_enabled


class Again(NamedTuple):
    """Tells calls that are like a given one: of tensors alone, by position, and no two of them the same."""

    inputs: int
    hold: Callable[[], bool]  #: of the guards of the model
    holders: tuple[dict[str, Any], ...]  #: where the tensors are that the capture lifted
    names: tuple[str, ...]
    check: Callable[..., bool]  #: of torch's guards, of the call's tensors and of these
    take: Callable[[Sequence[Tensor]], Sequence[Tensor]]  #: what is wanted of all of them
    grad: bool | None  #: whether gradients are on; None where it is of no consequence
    dtype: torch.dtype  #: torch's default

    @staticmethod
    def of(
        capture: Capture, guards: Guards, taken: Sequence[int], tensors: Sequence[Tensor], lifted: Sequence[Tensor]
    ) -> Again | None:
        """Of a call with ``tensors`` that ``capture`` serves, without autocast; None where torch has no such guards, or
        none that would hold: a tensor comes twice. ``taken``: positions among the call's tensors and the lifted ones.
        """
        given = [*tensors, *lifted]
        made = guards_of(given) if len({*map(id, given)}) == len(given) else None
        if made is None:
            return None
        holders, names = tuple(t.holder for t in capture.lifted), tuple(t.name for t in capture.lifted)
        grad = _grad_enabled() if capture.asks_grad else None
        return Again(len(tensors), guards.hold, holders, names, made.check, _taker(taken), grad, _default_dtype())

    def given(self, args: Sequence[Any]) -> Sequence[Tensor] | None:
        """What is taken of a call with ``args``; None where it is not like the one before."""
        inputs, hold, holders, names, check, take, grad, dtype = self
        if len(args) != inputs or not hold():
            return None
        given = (*args, *map(_get, holders, names))  # None for a tensor that is gone, which is like no tensor
        if (
            not check(*given)
            or (grad is not None and grad is not _grad_enabled())
            or dtype is not _default_dtype()
            or forward_ad._current_level >= 0
            or _has_any_global_hook()
        ):
            return None
        return take(given)


def _taker(positions: Sequence[int]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """A function that takes what is at ``positions``."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda given: [given[i] for i in positions]
