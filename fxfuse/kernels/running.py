"""BatchNorm's buffers moved in place, by one kernel in the place of seven of torch's operators."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fxfuse.instr import DTYPE_NAMES
from fxfuse.kernels import execute
from fxfuse.kernels.codegen.arithmetic import FLOATS
from fxfuse.kernels.convolution.entries import TYPES
from fxfuse.kernels.runtime import prepared, recent, tail_engine
from fxfuse.kernels.runtime.launch import Send, sender

log = logging.getLogger(__name__)

BLOCK = 256
#: parameters of the entry ``running``: addresses, channels, the parts of the batch and of what was there, cumulative
PARAMETERS = "qqqqqiffi"


class Call(NamedTuple):
    """A call, and what ran it."""

    guards: Any
    launch: Send
    device: torch.device


_launches: dict[tuple[torch.dtype, torch.dtype, torch.device], Send | None] = {}  # None where that failed
_calls: dict[tuple[int, bool, bool], Call] = {}  # that others may be like, by channels, a count, gradients


def source(buffers: torch.dtype, batch: torch.dtype) -> str:
    """CUDA C++ of the entry ``running``, for buffers and statistics of these dtypes."""
    t, b = (TYPES[DTYPE_NAMES[dtype]] for dtype in (buffers, batch))
    return f"""// NVRTC: --fmad=false
#include "running.cuh"
extern "C" __global__ void __launch_bounds__(fxfuse::kRunningThreads)
running({t}* mean, {t}* var, int64_t* count, const {b}* batch_mean, const {b}* batch_var, int channels, float factor,
        float rest, int cumulative) {{
  fxfuse::move_running(mean, var, count, batch_mean, batch_var, channels, factor, rest, cumulative);
}}
"""


def move(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor | None,
) -> bool:
    """Queue what :func:`fxfuse.ops.update_running_statistics` does to the buffers, bit by bit, of plain tensors.

    False, and nothing is done, where torch's operators have to: on devices without kernels, for other dtypes, buffers
    with holes or of several devices, a momentum that is a tensor, and before a kernel is loaded in a stream's capture.
    """
    if isinstance(momentum, Tensor) or (momentum is None and count is None) or recent.switched_off():
        return False
    buffers = (running_mean, running_var) if count is None else (running_mean, running_var, count)
    tensors = (*buffers, mean, var)
    like = running_mean.numel(), count is None, mean.requires_grad
    call = _calls.get(like)
    if call is None or not call.guards.check(*tensors):
        call = _prepared(tensors)
        if call is None:
            return False
        if call.guards is not None:
            _calls[like] = call
    factor = 0.0 if momentum is None else momentum
    counted = 0 if count is None else count.data_ptr()
    addresses = running_mean.data_ptr(), running_var.data_ptr(), counted, mean.data_ptr(), var.data_ptr()
    values = *addresses, like[0], factor, 1 - factor, momentum is None
    if prepared.current_device() == call.device.index:
        call.launch(tail_engine.stream_of(call.device.index), *values)
    else:
        with torch.cuda.device(call.device):
            call.launch(tail_engine.stream_of(call.device.index), *values)
    increment_version(buffers)
    return True


def _prepared(tensors: Sequence[Tensor]) -> Call | None:
    """The kernel for such tensors, loaded; None where torch's operators shall run."""
    running_mean, running_var, *numbers, mean, var = tensors
    device, vectors = running_mean.device, (running_mean, running_var, mean, var)
    kinds = running_mean.dtype, mean.dtype
    fits = (
        execute._usable(device)
        and all(t.shape == running_mean.shape and t.is_contiguous() and not t.is_neg() for t in vectors)
        and all(t.device == device for t in tensors)
        and (running_var.dtype, var.dtype) == kinds
        and all(kind in FLOATS for kind in kinds)
        and all(t.dtype is torch.int64 and t.numel() == 1 for t in numbers)
        and not (running_mean.requires_grad or running_var.requires_grad)
        and running_mean.numel() > 0
    )
    key = *kinds, device
    if not fits or (key not in _launches and torch.cuda.is_current_stream_capturing()):
        return None
    if key not in _launches:
        _launches[key] = _loaded(*key)
    launch = _launches[key]
    return None if launch is None else Call(recent.guards_of(tensors), launch, device)


def _loaded(buffers: torch.dtype, batch: torch.dtype, device: torch.device) -> Send | None:
    """The kernel on ``device``; None, with a warning, where that fails."""
    try:
        with torch.cuda.device(device):
            kernel = tail_engine.load(source(buffers, batch), ("running",), device)["running"]
        return sender(kernel, 1, BLOCK, *PARAMETERS)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - torch's operators do the same
        log.warning("a kernel for running statistics could not be loaded; torch's operators move them: %s", error)
        return None
