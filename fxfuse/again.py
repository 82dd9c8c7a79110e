"""The short way of a call of a model that is like the one before.

As :mod:`fxfuse.kernels.runtime.recent` has it for a region.

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
from fxfuse.kernels.runtime.recent import guards_of

# asked on every call
_default_dtype = torch.get_default_dtype
_grad_enabled = torch.is_grad_enabled


class Again(NamedTuple):
    """Tells calls that are like a given one: of tensors alone, by position, and no two of them the same."""

    #: what is taken of a call with some arguments; None where it is not like the one before
    given: Callable[[Sequence[Any]], Sequence[Tensor] | None]

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
        space: dict[str, Any] = {
            "hold": guards.hold,
            "check": made.check,
            "forward_ad": forward_ad,
            "hooked": _has_any_global_hook,
            "grad_enabled": _grad_enabled,
            "default_dtype": _default_dtype,
            "dtype": _default_dtype(),
        }
        names = [f"t{i}" for i in range(len(given))]
        inputs, others = names[: len(tensors)], names[len(tensors) :]
        fetched = []
        for name, tensor in zip(others, capture.lifted, strict=True):
            space[f"of_{name}"] = tensor.holder
            fetched.append(f"{name} = of_{name}.get({tensor.name!r})")  # None where it is gone, which is like no tensor
        text = _GIVEN.format(
            count=len(tensors),
            inputs=f"{', '.join(inputs)}{',' * bool(inputs)}" or "()",
            fetched="\n    ".join(fetched),
            tensors=", ".join(names),
            grad=_grad_enabled(),
            taken="".join(f"{names[i]}, " for i in taken),
        )
        exec(text, space)  # noqa: S102 - written below
        return Again(space.pop("given"))  # not among its own globals, a cycle


#: Written out for a call's tensors: what takes any costs half a microsecond more.
_GIVEN = """
def given(args):
    if len(args) != {count} or not hold():
        return None
    {inputs} = args
    {fetched}
    if (
        not check({tensors})
        or grad_enabled() is not {grad}
        or default_dtype() is not dtype
        or forward_ad._current_level >= 0
        or hooked()
    ):
        return None
    return ({taken})
"""
