"""The CUDA C++ of what runs around a convolution's kernel: which of the emitters a step asks. Pure."""

from __future__ import annotations

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels.stages.collapsed import Sums
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.emit_collapsed import emit_contraction, emit_sums
from fxfuse.kernels.stages.emit_tail import (
    emit_fold,
    emit_map,
    emit_pool,
    emit_pool_fold,
    emit_rows,
    emit_rows_pool,
    emit_statistics,
)
from fxfuse.kernels.stages.steps import Bundle, Gather, Step, Torch


def source_of(step: Step) -> str:
    """The CUDA C++ of a step's kernels; empty for torch's."""
    if isinstance(step, Gather):
        return emit_statistics(DTYPE_NAMES[step.kind.dtype], step.layout, step.gathers)
    if isinstance(step, Torch):
        return ""
    if isinstance(step, Bundle):
        return step.made.text
    if isinstance(step, Sums):
        return emit_sums(DTYPE_NAMES[step.given.dtype], step.count, keeps=step.keeps)
    if isinstance(step, Contraction):
        dtypes = DTYPE_NAMES[step.weights.dtype], DTYPE_NAMES[step.kind.dtype]
        return emit_contraction(*dtypes, step.after, rows=step.rows, across=step.across, taps=len(step.table))
    dtype, output = DTYPE_NAMES[step.given.dtype], DTYPE_NAMES[step.kind.dtype]
    if step.rows is not None and step.window is not None:
        return emit_rows_pool(dtype, output, step.before, step.rows, step.after, step.window, step.behind)
    if step.window is not None and step.fold is not None:
        return emit_pool_fold(dtype, output, step.before, step.window, step.after, step.fold, step.behind)
    if step.window is not None:
        return emit_pool(dtype, output, step.layouts, step.before, step.window, step.after)
    if step.fold is not None:
        return emit_fold(dtype, output, step.layouts, step.before, step.fold, step.after)
    if step.rows is not None:
        return emit_rows(dtype, output, step.before, step.rows, step.after)
    return emit_map(dtype, output, step.layouts[0], step.before)


def kind_of(step: Step) -> str:
    """What a step's kernels are about, in a word."""
    if isinstance(step, Gather):
        return "statistics"
    if isinstance(step, Torch):
        return "torch"
    if isinstance(step, Bundle):
        return "bundle"
    if isinstance(step, (Sums, Contraction)):
        return "sums" if isinstance(step, Sums) else "contraction"
    kinds = {"pool": step.window, "fold": step.fold, "rows": step.rows}
    return next((kind for kind, how in kinds.items() if how is not None), "map")
