"""Check an optimised model against the original, with a float64 run as the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.capture import Capture
from fxfuse.chain import no_autocast
from fxfuse.compare import fresh, relative_error
from fxfuse.state import State

#: relative L2 error against float64 that rounding alone explains, per dtype of the result
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class VerificationError(RuntimeError):
    """The optimised model is further from the float64 truth than rounding explains."""


def check(
    model: nn.Module,
    capture: Capture,
    optimised: Callable[..., Any],
    lifted: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> list[float]:
    """Errors of the optimised graph's outputs; VerificationError where one exceeds eager's own by far.

    An output may err by twice eager's own error, or by the rounding of its dtype, whichever is more.
    Buffers and random generators are left as they are.
    """
    state = State(model, tensors)
    with state.kept(), torch.no_grad():
        args, kwargs = capture.form.arguments(fresh(tensors))
        eager = pytree.tree_leaves(model.forward(*args, **kwargs))
        left = State(model, tensors)
        state.restore()
        got = pytree.tree_leaves(optimised(*fresh(tensors), *lifted))
        reason = left.differs()
        state.restore()
        truth = pytree.tree_leaves(_in_float64(model, capture, tensors))
    if reason is not None:
        raise VerificationError(f"after a call of {type(model).__name__}, {reason}")
    errors = []
    for number, (a, b, t) in enumerate(zip(got, eager, truth, strict=True)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            continue
        error, own = relative_error(a, t), relative_error(b, t)
        limit = max(2 * own, ROUNDING.get(b.dtype, 0.1))
        if not error <= limit:
            raise VerificationError(
                f"output {number} of {type(model).__name__} is {error:.2e} from the float64 truth, "
                f"eager mode {own:.2e}; at most {limit:.2e} is expected. "
                "FXFUSE_DISABLE and FXFUSE_FUEL find the rule; please report it"
            )
        errors.append(error)
    return errors


def _in_float64(model: nn.Module, capture: Capture, tensors: Sequence[Tensor]) -> Any:
    truth = copy.deepcopy(model).double()
    args, kwargs = capture.form.arguments([t.double() if t.is_floating_point() else t.clone() for t in fresh(tensors)])
    with no_autocast():
        return truth.forward(*args, **kwargs)
