"""Check an optimised model against the original, with a float64 run as the truth."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.capture import Capture
from fxfuse.chain import no_autocast
from fxfuse.compare import fresh, relative_error, tensors_in
from fxfuse.state import State

log = logging.getLogger(__name__)

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
    Where float64 cannot be the truth, because the model casts or draws random numbers, eager mode is.
    The model and the random generators are left as they are.
    """
    state = State(model, tensors)
    with state.kept(), torch.no_grad():
        args, kwargs = capture.form.arguments(fresh(tensors))
        eager = tensors_in(model.forward(*args, **kwargs))
        left, random = State(model, tensors), state.draws()
        state.restore()
        got = tensors_in(optimised(*fresh(tensors), *lifted))
        reason = left.differs()
        state.restore()
        exact = None if random else _in_float64(model, capture, tensors)
    name = type(model).__name__
    if reason is not None:
        raise VerificationError(f"after a call of {name}, {reason}")
    truth, source = (eager, "eager mode") if exact is None else (exact, "the float64 truth")
    errors = []
    for number, (a, b, t) in enumerate(zip(got, eager, truth, strict=True)):
        if not t.is_floating_point():
            continue
        error, own = relative_error(a, t), relative_error(b, t)
        limit = max(2 * own, ROUNDING.get(b.dtype, 0.1))
        if not error <= limit:
            raise VerificationError(
                f"output {number} of {name} is {error:.2e} from {source}, eager mode {own:.2e}; "
                f"at most {limit:.2e} is expected. FXFUSE_DISABLE and FXFUSE_FUEL find the rule; please report it"
            )
        errors.append(error)
    return errors


def _in_float64(model: nn.Module, capture: Capture, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors of the result in float64; None where the model does not run in it."""
    try:
        truth = copy.deepcopy(model).double()
        wide = [t.double() if t.is_floating_point() else t.clone() for t in fresh(tensors)]
        args, kwargs = capture.form.arguments(wide)
        with no_autocast():
            return tensors_in(truth.forward(*args, **kwargs))
    except Exception as error:  # noqa: BLE001 - a model need not run in another dtype than its own
        log.info("%s does not run in float64: %s", type(model).__name__, error)
        return None
