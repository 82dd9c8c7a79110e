"""A capture of a model that does what the model did: a graph may look right and be wrong."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from fxfuse import capture as capturing
from fxfuse.capture import CallForm, Capture
from fxfuse.compare import disagreement, edges, fresh, gradient_disagreement
from fxfuse.state import State

log = logging.getLogger(__name__)


def find(
    model: nn.Module, form: CallForm, inputs: list[Tensor], expected: Any, before: State, after: State, notes: list[str]
) -> Capture | None:
    """What the first way to capture gives whose graph does the same; None where none does. ``notes``: what was tried.

    ``inputs``: the call's tensors as they were; ``expected``: its result, its tensors afterwards, and their gradient
    edges; ``before``, ``after``: the model's state before the call, to which it is put back, and behind it.
    """

    def trace() -> Capture:
        return capturing.symbolic_trace(model, form)

    def export() -> Capture:
        return capturing.export(model, form, fresh(inputs))

    for name, attempt in (("torch.fx.symbolic_trace", trace), ("torch.export", export)):
        before.restore()
        try:
            candidate = attempt()
            before.restore()
            reason = _difference(candidate, fresh(inputs), expected) or after.differs()
        except capturing.CaptureError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - a graph that cannot run is not a capture
            reason = f"its graph fails with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason is None:
            notes.append(f"captured with {name}; its result was compared with the model's")
            return candidate
        log.info("%s does not capture %s: %s", name, type(model).__name__, reason)
        notes.append(f"{name} refused: {reason}")
    notes.append("left alone: the model runs as it is; submodules=[...] can optimise parts of it")
    return None


def _difference(candidate: Capture, inputs: list[Tensor], expected: Any) -> str | None:
    """Why a run of ``candidate`` differs from the model's: (result, inputs afterwards, their gradient edges)."""
    result, tensors, came_from = expected
    started = edges(inputs)
    got = candidate.run(inputs)
    reason = disagreement((got, inputs), (result, list(tensors)))
    return reason or gradient_disagreement((got, inputs), (result, list(tensors)), started, came_from)
