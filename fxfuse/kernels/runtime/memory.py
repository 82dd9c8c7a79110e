"""Memory of a call's kernels: of torch's allocator, or of what stands in for it, parts of memory that stays.

Needs a GPU. The engines look :data:`empty` up on every call, since :func:`instead` changes it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: makes a tensor (shape, strides, dtype); shape and strides are plain tuples
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]

#: bytes to a multiple of which a part of a room begins, as torch's allocator has it
ALIGNMENT = 512


def _allocator() -> Empty:
    """What Inductor's code allocates with: torch.empty_strided on the current GPU, past the dispatcher."""
    guards = getattr(torch._C._dynamo, "guards", None)
    found = getattr(guards, "_empty_strided_cuda", None)
    return found or functools.partial(_empty_strided)


def _empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


#: of torch, on the current GPU, for its current stream
allocate = _allocator()
#: what kernels are given memory by
empty = allocate


@contextlib.contextmanager
def instead(take: Empty) -> Iterator[None]:
    """Inside, ``take`` stands in for :func:`allocate` in this thread, past torch's modes. For one thread at a time."""
    global empty
    thread, before = threading.get_ident(), empty

    def chosen(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if threading.get_ident() != thread:
            return before(shape, strides, dtype)
        with _disable_current_modes():
            return take(shape, strides, dtype)

    empty = chosen
    try:
        yield
    finally:
        empty = before


class Counted:
    """Allocates, and counts the ``size`` in bytes of a room that :class:`Parts` of the same forms would fit into."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.size += _aligned(_elements(shape, strides) * dtype.itemsize)
        return allocate(shape, strides, dtype)


class Parts:
    """Tensors that lie side by side in a room of bytes. Raises MemoryError where it is full."""

    def __init__(self, room: Tensor) -> None:
        self.room, self.end = room, 0

    def __call__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        begin, size = self.end, _elements(shape, strides) * dtype.itemsize
        self.end += _aligned(size)
        if self.end > self.room.numel():
            raise MemoryError(f"{self.room.numel()} bytes are not enough")
        return self.room[begin : begin + size].view(dtype).as_strided(shape, strides)


def _elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    """From the first one to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
