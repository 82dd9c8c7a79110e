"""Compiled kernels on a GPU: modules, launches on torch's current stream, tensor maps. Needs ``fxfuse[cuda]``."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
        torch.cuda.synchronize() if not torch.cuda.is_initialized() else None
        driver = _driver()
        self._module = _checked("cuModuleLoadData", driver.cuModuleLoadData(cubin))
        self.kernels = {
            name: Kernel(_checked("cuModuleGetFunction", driver.cuModuleGetFunction(self._module, name.encode())))
            for name in names
        }


class Kernel:
    """A kernel of a loaded module."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._shared = 0
        self._lock = threading.Lock()

    def launch(
        self, grid: tuple[int, int, int], block: int, arguments: Sequence[Any], stream: int, shared: int = 0
    ) -> None:
        """Queue the kernel on ``stream``. ``arguments``: ctypes values, in order; ``shared``: dynamic bytes."""
        driver = _driver()
        if shared > self._shared:
            with self._lock:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked("cuFuncSetAttribute", driver.cuFuncSetAttribute(self._function, attribute, shared))
                self._shared = shared
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        _checked(
            "cuLaunchKernel",
            driver.cuLaunchKernel(self._function, *grid, block, 1, 1, shared, stream, ctypes.addressof(pointers), 0),
        )


class TensorMap(ctypes.Structure):
    """A CUtensorMap, 64-byte aligned storage by :func:`rows_map`."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


@functools.lru_cache(maxsize=4096)
def _encode(
    pointer: int, bfloat: bool, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    driver = _driver()
    kind = driver.CUtensorMapDataType
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[box[0] * 2]
    made = _checked(
        "cuTensorMapEncodeTiled",
        driver.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            5,
            pointer,
            [driver.cuuint64_t(s) for s in sizes],
            [driver.cuuint64_t(s) for s in strides],
            [driver.cuuint32_t(s) for s in box],
            [driver.cuuint32_t(1)] * 5,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    found = TensorMap()
    ctypes.memmove(ctypes.addressof(found), made.getPtr(), ctypes.sizeof(found))
    return found


def rows_map(rows: Tensor, box: tuple[int, int, int], channels: int) -> TensorMap:
    """The map that copies boxes of ``rows`` (N, D, H, W, C; 16-bit; C contiguous) with ``channels`` of them."""
    n, d, h, w, c = rows.shape
    sizes = (c, w, h, d, n)
    strides = tuple(rows.stride(i) * rows.element_size() for i in (3, 2, 1, 0))
    return _encode(
        rows.data_ptr(), rows.dtype is torch.bfloat16, sizes, strides, (channels, box[2], box[1], box[0], 1)
    )
