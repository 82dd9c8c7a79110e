"""CUDA graphs on the emulated GPU: launches that are kept with their arguments as they lie, and run again."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulator.device import Device
from torch import Tensor

from fxfuse.kernels.runtime import graphs, launch, memory, prepared, replays
from fxfuse.kernels.runtime.launch import Launch


class Graphs:
    """What was captured on a device: how often, how often it ran, and what its kernels have for themselves."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.captures = self.runs = 0
        self.rooms: list[Tensor] = []
        self.arguments: dict[int, list[Any]] = {}  # of launches, by where the pointers to them lie
        self._made: dict[Any, list[tuple[Tensor, int]]] = {}  # with how many have it where nobody else has

    def allocate(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of NaN, where there was some before that nobody has any more."""
        found = self._made.setdefault((shape, strides, dtype), [])
        made = next((tensor for tensor, least in found if _users(tensor) == least), None)
        if made is None:
            made = self.device.empty(shape, strides, dtype)
            found.append((made, _users(made)))
        return _poisoned(made.view_as(made))

    def capture(self, queue: Callable[[], object], device: Any, stream: int, room: Tensor) -> SimpleNamespace:
        kept: list[Callable[[], int]] = []

        def keep(config: Any, function: Any, pointers: Any) -> int:
            told = config._obj
            same = SimpleNamespace(grid=[*told.grid], block=[*told.block], shared=told.shared, count=told.count)
            copies = [*map(ctypes.create_string_buffer, self._copied(pointers._obj))]
            array = (ctypes.c_void_p * len(copies))(*map(ctypes.addressof, copies))
            array.copies = copies  # as long as it
            kept.append(lambda: self.device.start(SimpleNamespace(_obj=same), function, array, None))
            return 0

        class Copies(graphs.Copies):
            def copy(self, to: Tensor, given: Tensor, non_blocking: bool = False) -> Tensor:
                kept.append(lambda: to.copy_(given).numel() * 0)
                return to

        def start() -> int:
            self.runs += 1
            _poisoned(room)
            return sum(queued() for queued in kept)

        self.captures += 1
        self.rooms.append(room)
        self.device.keep = keep
        try:
            with Copies():
                queue()
        finally:
            self.device.keep = None
        return SimpleNamespace(start=start)

    def _copied(self, pointers: Any) -> list[bytes]:
        """The arguments of a launch, as they lie now."""
        found = []
        for argument in self.arguments[ctypes.addressof(pointers)]:
            at, size = ctypes.addressof(argument), ctypes.sizeof(argument)
            if isinstance(argument, ctypes.c_char):  # where one begins in a buffer, to whose end it reaches at most
                buffer = argument._objects.obj
                size = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + len(buffer) - at
            found.append(ctypes.string_at(at, size))
        return found


def _users(tensor: Tensor) -> int:
    """How many have its memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _poisoned(tensor: Tensor) -> Tensor:
    """``tensor``, of NaN wherever it has elements."""
    tensor.fill_(0xFF if tensor.dtype is torch.uint8 else float("nan"))
    return tensor


@contextlib.contextmanager
def graphs_of(device: Device) -> Iterator[Graphs]:
    """Inside, regions that are prepared have their calls replayed, as on a GPU."""
    made, started = Graphs(device), Launch.__init__

    def make(self: Launch, kernel: Any, grid: Any, block: int, arguments: Any, shared: int = 0) -> None:
        started(self, kernel, grid, block, arguments, shared)
        made.arguments[ctypes.addressof(self.start.args[2]._obj)] = self._arguments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__init__", make)
        patch.setattr(graphs, "capture", made.capture)
        patch.setattr(graphs, "relaxed", contextlib.nullcontext)
        patch.setattr(graphs, "elsewhere", lambda call: call())
        patch.setattr(memory, "allocate", made.allocate)
        patch.setattr(launch, "stream_of", lambda _: 0)
        patch.setattr(prepared, "wanted", lambda _: not replays._switched_off())
        patch.setattr(replays, "capturing", lambda: False)
        yield made
        replays.forget()
