"""The fused graphs inside a model that `optimize` returned, each with the arguments that it meets in a call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.capture import CallForm
from fxfuse.compare import fresh
from fxfuse.replica import unwrapped
from fxfuse.state import State
from fxfuse.verification.regions import RegionCheck, check_regions


@dataclasses.dataclass(frozen=True)
class _Call:
    """The first call of an optimised part."""

    part: Any
    form: CallForm
    tensors: list[Tensor]


def is_optimised(module: nn.Module) -> bool:
    """Whether ``module`` is an optimised model or part: it has a runtime of its own."""
    return "_fxfuse_runtime" in module.__dict__


def check_parts(optimised: nn.Module, form: CallForm, tensors: Sequence[Tensor]) -> list[RegionCheck]:
    """Check the regions of every optimised part of ``optimised``, on what it is given in a call without gradients."""
    parts = {name: m for name, m in optimised.named_modules() if is_optimised(m)}
    model, checks = unwrapped(optimised), []
    with State(model, tensors).kept(), torch.no_grad(), _first_calls(list(parts.values())) as calls:
        args, kwargs = form.arguments(fresh(tensors))
        optimised(*args, **kwargs)
    for name, part in parts.items():
        call = next((c for c in calls if c.part is part), None)
        if call is not None:
            with State(model, tensors).kept(), torch.no_grad():
                checks += _check(call, f"{name}: " if name else "")
    return checks


def _check(call: _Call, where: str) -> list[RegionCheck]:
    runtime = call.part._fxfuse_runtime
    served = runtime.serving(*call.form.arguments(call.tensors))
    if served is None:
        return []
    special, lifted = served
    return check_regions(special.run.__self__, [*call.tensors, *lifted], special.report, runtime.options, where=where)


@contextlib.contextmanager
def _first_calls(parts: Sequence[nn.Module]) -> Iterator[list[_Call]]:
    """Note the arguments of the first call of each of ``parts`` inside the block."""
    calls: list[_Call] = []

    def recording(part: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if all(c.part is not part for c in calls):
                form, tensors = CallForm.of(args, kwargs)
                calls.append(_Call(part, form, fresh(tensors)))
            return type(part).forward(part, *args, **kwargs)

        return forward

    for part in parts:  # an attribute of a view is the original's: only its own dict is touched
        part.__dict__["forward"] = recording(part)
    try:
        yield calls
    finally:
        for part in parts:
            del part.__dict__["forward"]
