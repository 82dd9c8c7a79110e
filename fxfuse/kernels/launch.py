"""Compiled kernels on a GPU: modules, launches on torch's current stream, memory, tensor maps.

Needs ``fxfuse[cuda]``. What is here is on the way of every call: nothing is made anew that can be kept.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def _allocator() -> Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]:
    """What Inductor's code allocates with: torch.empty_strided on the current GPU, past the dispatcher."""
    guards = getattr(torch._C._dynamo, "guards", None)
    found = getattr(guards, "_empty_strided_cuda", None)
    return found or functools.partial(_empty_strided)


def _empty_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


#: a tensor (shape, strides, dtype) on the current GPU, for its current stream; shape and strides are plain tuples
empty = _allocator()


def stream_of(device: int) -> int:
    """torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device)


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


class CudaError(RuntimeError):
    """A call of the CUDA driver failed; the message names it and the driver's reason."""


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        _, text = _driver().cuGetErrorString(status)
        raise CudaError(f"{call}: {(text or b'unknown error').decode()}")
    return values[0] if values else None


class Module:
    """A loaded cubin on the current device; ``kernels`` by name."""

    def __init__(self, cubin: bytes, names: Sequence[str]) -> None:
        torch.cuda.current_stream()  # torch makes the context
        driver = _driver()
        self._module = _checked("cuModuleLoadData", driver.cuModuleLoadData(cubin))
        self.kernels = {
            name: Kernel(_checked("cuModuleGetFunction", driver.cuModuleGetFunction(self._module, name.encode())))
            for name in names
        }


class Kernel:
    """A kernel of a loaded module."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._shared = 0
        self._lock = threading.Lock()

    def allow_shared(self, size: int) -> None:
        """Let launches have ``size`` bytes of dynamic shared memory."""
        with self._lock:
            if size > self._shared:
                attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked("cuFuncSetAttribute", _driver().cuFuncSetAttribute(self.function, attribute, size))
                self._shared = size


class Launch:
    """A kernel with its grid and arguments: call it with a stream. Arguments may be changed in place between calls.

    ``arguments``: ctypes values, which the launch reads where they lie. Not for several threads at a time.
    """

    def __init__(
        self, kernel: Kernel, grid: int | tuple[int, int, int], block: int, arguments: Sequence[Any], shared: int = 0
    ) -> None:
        kernel.allow_shared(shared)
        self._arguments = list(arguments)
        self._pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._address = ctypes.addressof(self._pointers)
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        # what does not change from call to call is bound once: spelt out, it takes a quarter of the time of a launch
        launch = _driver().cuLaunchKernel
        self._launch = functools.partial(launch, kernel.function, x, y, z, block, 1, 1, shared)

    def __call__(self, stream: int) -> None:
        queue((self,), stream)


def queue(launches: Iterable[Launch], stream: int) -> None:
    """Launch these one behind the other."""
    for launch in launches:
        (status,) = launch._launch(stream, launch._address, 0)
        if status:
            _checked("cuLaunchKernel", (status,))


class Packed:
    """A kernel with its grid and the forms of its parameters: call it with a stream and values. For any thread.

    ``parameters``: one format of :mod:`struct` for each, without a mark of byte order.
    """

    def __init__(
        self, kernel: Kernel, grid: int | tuple[int, int, int], block: int, *parameters: str, shared: int = 0
    ) -> None:
        self._made, self._shared = (kernel, grid, block), shared
        formats = [f"={p}" for p in parameters]
        sizes = [-(-struct.calcsize(f) // 8) * 8 for f in formats]
        self._offsets = [0, *itertools.accumulate(sizes)]
        padded = (f"{p}{size - struct.calcsize(f)}x" for p, f, size in zip(parameters, formats, sizes, strict=True))
        self._struct = struct.Struct("=" + "".join(padded))
        self._free: list[tuple[Any, Launch]] = []  # buffers that no call is filling

    def __call__(self, stream: int, *values: float | bytes) -> None:
        try:
            made = self._free.pop()
        except IndexError:
            made = self._make()
        self._struct.pack_into(made[0], 0, *values)
        queue(made[1:], stream)  # which reads the values
        self._free.append(made)

    def _make(self) -> tuple[Any, Launch]:
        buffer = ctypes.create_string_buffer(self._offsets[-1])
        places = [ctypes.c_char.from_buffer(buffer, offset) for offset in self._offsets[:-1]]
        return buffer, Launch(*self._made, places, self._shared)


@functools.lru_cache(maxsize=4096)
def rows_map(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    bfloat: bool,
    box: tuple[int, int, int],
    channels: int,
) -> bytes:
    """The CUtensorMap that copies boxes (d, h, w) of rows with ``channels`` of (N, D, H, W, C) 16-bit numbers.

    ``strides`` in elements; that of C is 1. The swizzle is as wide as a row in shared memory.
    """
    driver = _driver()
    kind = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        16: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[channels]
    made = _checked(
        "cuTensorMapEncodeTiled",
        driver.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            5,
            pointer,
            [driver.cuuint64_t(s) for s in reversed(shape)],
            [driver.cuuint64_t(s * 2) for s in reversed(strides[:4])],
            [driver.cuuint32_t(s) for s in (channels, *reversed(box), 1)],
            [driver.cuuint32_t(1)] * 5,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    return ctypes.string_at(made.getPtr(), 128)
