"""CUDA graphs of kernels: what a stream is told is captured once, and queued again by one call of the driver.

torch.cuda.CUDAGraph captures torch's operators, whatever they do. For that it takes the device's random numbers and
memory from the whole process while a capture lasts: in another thread dropout fails then, or an allocation that others
have to be freed for. Kernels need neither. What is captured here is unseen by other threads, and by captures that are
going on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.kernels.runtime import launch, memory

#: CU_STREAM_NON_BLOCKING: the legacy default stream does not wait for it, nor it for that one
NON_BLOCKING = 1


class Graph:
    """Kernels that were captured: ``start`` queues them and returns the driver's status. For one thread at a time.

    ``room``: what the kernels have for themselves, and the graph keeps.
    """

    def __init__(self, executable: Any, stream: int, room: Tensor) -> None:
        self._executable, self._room = executable, room
        told = launch.pointer(int(executable)), launch.pointer(stream)
        self.start: Callable[[], int] = functools.partial(launch.function("cuGraphLaunch"), *told)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            launch._driver().cuGraphExecDestroy(self._executable)


class UncapturableError(Exception):
    """A call does more than to launch kernels and to copy."""


class Copies(TorchDispatchMode):
    """Torch's operators may look at tensors in other ways, and copy them, to memory for kernels (:mod:`memory`). What
    others make would not stay where it is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        told = kwargs or {}
        if func.is_view or told.get("device") == _META:
            return func(*args, **told)
        if func is _aten.copy_.default:
            return self.copy(*args)
        if func is _aten.empty_strided.default:
            return memory.empty(tuple(args[0]), tuple(args[1]), told["dtype"])
        if func is _aten.clone.default:
            (given,) = args
            strides = torch.empty_like(given, device="meta", **told).stride()
            return self.copy(memory.empty(tuple(given.shape), strides, given.dtype), given)
        raise UncapturableError(f"{func} runs")

    def copy(self, to: Tensor, given: Tensor, non_blocking: bool = False) -> Tensor:
        return to.copy_(given)


_aten, _META = torch.ops.aten, torch.device("meta")


class _Side(NamedTuple):
    """A stream that nobody else knows: what another thread queues on it would be captured, too."""

    handle: int
    stream: torch.cuda.Stream


@functools.cache
def _side(device: int, priority: int) -> _Side:
    made = launch._checked("cuStreamCreate", launch._driver().cuStreamCreateWithPriority(NON_BLOCKING, priority))
    return _Side(int(made), torch.cuda.ExternalStream(int(made), device=device))


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Inside, whatever this thread does breaks no capture of anybody's, neither its own nor another thread's."""
    driver = launch._driver()
    launch.bind_context()
    mode = launch._checked("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode(_relaxed()))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def elsewhere(call: Callable[[], Tensor]) -> Tensor:
    """What ``call`` allocates for the current stream, in a thread of its own: what stays must not be in a pool that
    allocations of this thread go to just now, be it the user's or one of torch.compile's CUDA graphs.
    """
    stream = torch.cuda.current_stream()

    def allocated() -> Tensor:
        with torch.cuda.stream(stream), relaxed():
            return call()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(allocated).result()


def _relaxed() -> Any:
    return launch._driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED


def capture(queue: Callable[[], object], device: int, stream: int, room: Tensor) -> Graph:
    """A graph of what ``queue`` puts on torch's current stream; nothing of it runs now. For one thread at a time.

    ``stream``: the handle of the one that the graph is for, on ``device``, the current one. ``room``: what the graph
    keeps. It is :func:`relaxed`. Raises what ``queue`` does, UncapturableError and CudaError.
    """
    driver, checked = launch._driver(), launch._checked
    priority = checked("cuStreamGetPriority", driver.cuStreamGetPriority(driver.CUstream(stream)))
    graph = _captured(queue, _side(device, priority))
    try:
        executable = checked("cuGraphInstantiate", driver.cuGraphInstantiate(graph, 0))
    finally:
        driver.cuGraphDestroy(graph)
    return Graph(executable, stream, room)


def _captured(queue: Callable[[], object], side: _Side) -> Any:
    driver, checked = launch._driver(), launch._checked
    handle = driver.CUstream(side.handle)
    with torch.cuda.stream(side.stream):
        checked("cuStreamBeginCapture", driver.cuStreamBeginCapture(handle, _relaxed()))
        try:
            with Copies():
                queue()
        except BaseException:
            status, graph = driver.cuStreamEndCapture(handle)
            if not int(status):
                driver.cuGraphDestroy(graph)
            raise
        return checked("cuStreamEndCapture", driver.cuStreamEndCapture(handle))
