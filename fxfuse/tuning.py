"""The public function tune: measure the ways to run every region of a model, and keep the fastest."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fxfuse.capture import CallForm
from fxfuse.compare import fresh
from fxfuse.kernels import execute
from fxfuse.kernels.measure import Measured, Timer
from fxfuse.module import OptimizedModule, View
from fxfuse.ops import watch
from fxfuse.pipeline import Options
from fxfuse.replica import unwrapped
from fxfuse.state import State
from fxfuse.timing import queued_in_turns


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What :func:`tune` measured. ``str()`` is a table for a terminal.

    ``regions``: one entry per region and forms of its inputs. ``runs``: how many regions ran at all.
    """

    model: str
    regions: tuple[Measured, ...]
    runs: int

    @property
    def headline(self) -> str:
        """The first line: how much was measured, or why nothing was."""
        if not self.runs:
            return f"{self.model}: nothing was measured: no region of it ran; its report says why"
        if not self.regions:
            return f"{self.model}: nothing was measured: no region ran on a GPU by kernels"
        differ = sum(r.differs for r in self.regions)
        regions = f"{len(self.regions)} region{'' if len(self.regions) == 1 else 's'}"
        return f"{self.model}: {regions} measured, {differ or 'none'} chosen otherwise than by the estimate"

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"\n[{i}] {region}" for i, region in enumerate(self.regions, 1))])


def tune(model: nn.Module, *example_inputs: Any, **kwargs: Any) -> Tuning:
    """Measure, on the GPU, the ways to run every region of ``model`` for these inputs; later calls run the fastest.

    The choice is kept on disk beside the compiled kernels (``FXFUSE_CACHE_DIR``), for these shapes, strides and
    dtypes, this GPU and these versions of fxfuse, torch and cuDNN: calls of other processes read it, and never
    measure. Without one the plan's estimate chooses. The model, its buffers, the inputs and random generators are
    left as they are. Calls with gradients run other operators, and are not measured.

    Args:
        model: what :func:`fxfuse.optimize` or ``torch.compile(backend="fxfuse")`` returned, a model with such
            parts, or a plain module, which is optimised for the measurement as ``optimize(model)`` does.
        example_inputs, kwargs: the arguments of a call, on the GPU, in the memory format and with the autocast of
            the calls that are to be fast.

    Returns:
        The ways of every region, each with its seconds per call, and which was chosen; without regions where
        nothing runs on a GPU. ``str()`` is a table.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune() takes an nn.Module, not {type(model).__name__}; wrap a function in a module")
    return measured(model, example_inputs, kwargs)


def measured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], timer: Timer = queued_in_turns) -> Tuning:
    """:func:`tune` with a ``timer``: median seconds of a call of every way that it is given, by name."""
    compiled = hasattr(model, "_orig_mod")  # by torch.compile
    runs_regions = compiled or any(isinstance(m, View) for m in model.modules())
    runnable = model if runs_regions else OptimizedModule(model, Options())
    original = unwrapped(model)
    form, tensors = CallForm.of(args, kwargs)
    with torch.no_grad(), State(original, tensors).kept():
        again, named = form.arguments(fresh(tensors))
        runnable(*again, **named)  # captures, where that is still to do
        with execute.measuring(timer) as session, watch() as runs:
            again, named = form.arguments(fresh(tensors))
            runnable(*again, **named)
    return Tuning(type(original).__name__, tuple(session.measured), len(runs))
