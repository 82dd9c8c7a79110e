"""Compiled kernels on a GPU: modules, launches on torch's current stream, tensor maps.

Needs ``fxfuse[cuda]``. What is here is on the way of every call: nothing is made anew that can be kept.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch

#: torch's current stream on a device, by its index
stream_of: Callable[[int | None], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


#: blocks of a grid, along its first dim
MOST_BLOCKS = 2**31 - 1


class CudaError(RuntimeError):
    """A call of the CUDA driver failed; the message names it and the driver's reason."""


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        _, text = _driver().cuGetErrorString(status)
        raise CudaError(f"{call}: {(text or b'unknown error').decode()}")
    return values[0] if values else None


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which one, and room for the value of any."""

    _fields_ = [("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("_room", ctypes.c_int * 15)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


#: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the kernel may begin before the one in front of it has ended.
#: Of value 0 no kernel does, from the next launch on: for comparisons, and for profiles, where waiting counts as time.
#: Graphs keep what was there when they were captured.
OVERLAP = _Attribute(id=6, value=1)


@functools.cache
def function(name: str) -> Callable[..., int]:
    """The driver's, by ctypes: of arguments that are C's already, a call takes half of the binding's time."""
    driver = _driver()
    streams = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_LEGACY_STREAM  # stream 0 is torch's default one
    found = driver.cuGetProcAddress(name.encode(), 12000, streams)
    address = _checked("cuGetProcAddress", found)
    if not address:
        raise CudaError(f"the driver has no {name}: it is older than CUDA 12.0")
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)


def _launcher() -> Callable[..., int]:
    return function("cuLaunchKernelEx")


def pointer(handle: int) -> Any:
    """A handle of the driver's, as ctypes passes it on; None for 0.

    It is the address of what lies there, which nothing reads: of a c_void_p ctypes looks for a converter in every call.
    """
    return ctypes.byref(ctypes.c_char.from_address(handle)) if handle else None


#: the driver's status where a thread has no context, which CUDA's runtime makes at a thread's first call of it
NO_CONTEXT = 201


def bind_context() -> None:
    """Let the calling thread use the context that torch has on its current device."""
    _checked("cuCtxSetCurrent", _driver().cuCtxSetCurrent(_context(torch.cuda.current_device())))


@functools.cache
def _context(device: int) -> Any:
    return _checked("cuDevicePrimaryCtxRetain", _driver().cuDevicePrimaryCtxRetain(device))


class Module:
    """A loaded cubin on the current device; ``kernels`` by name."""

    def __init__(self, cubin: bytes, names: Sequence[str]) -> None:
        bind_context()
        torch.cuda.current_stream()  # torch makes the context
        self._module = _checked("cuModuleLoadData", _driver().cuModuleLoadData(cubin))
        overlaps = torch.cuda.get_device_capability() == (9, 0)
        self.kernels = {name: self._kernel(name, overlaps) for name in names}

    def _kernel(self, name: str, overlaps: bool) -> Kernel:
        found = _checked("cuModuleGetFunction", _driver().cuModuleGetFunction(self._module, name.encode()))
        handle = int(found)
        return Kernel(pointer(handle), overlaps, handle)


class Kernel:
    """A kernel of a loaded module. ``overlaps``: a launch may begin before the kernel in front of it has ended.

    All kernels are emitted for that (see ``cuh/dependent.cuh``); Hopper GPUs are where they have run so. ``function``:
    the driver's ``handle``, as ctypes passes it on.
    """

    def __init__(self, function: Any, overlaps: bool = False, handle: int = 0) -> None:
        self.function, self._handle = function, handle
        self.overlaps = overlaps
        self._shared = 0
        self._lock = threading.Lock()

    def allow_shared(self, size: int) -> None:
        """Let launches have ``size`` bytes of dynamic shared memory."""
        with self._lock:
            if size > self._shared:
                attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked("cuFuncSetAttribute", _driver().cuFuncSetAttribute(self._handle, attribute, size))
                self._shared = size


class Launch:
    """A kernel with its grid and arguments, to be put into a :class:`Chain`.

    ``arguments``: ctypes values, which a launch reads where they lie: they may be changed in place between launches.
    """

    def __init__(
        self, kernel: Kernel, grid: int | tuple[int, int, int], block: int, arguments: Sequence[Any], shared: int = 0
    ) -> None:
        kernel.allow_shared(shared)
        self.kernel, self._arguments = kernel, list(arguments)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        grid = (grid, 1, 1) if isinstance(grid, int) else grid
        if max(grid) > MOST_BLOCKS:  # which ctypes would cut off
            raise CudaError(f"a grid of {grid} blocks: a GPU counts {MOST_BLOCKS} at most")
        self.config = _Config(grid, (block, 1, 1), shared)
        self.config.attributes = ctypes.pointer(OVERLAP)
        #: launches once more, and returns the driver's status; what does not change from call to call is bound here
        self.start = functools.partial(
            _launcher(), ctypes.byref(self.config), kernel.function, ctypes.byref(pointers), None
        )


class Chain:
    """Launches one behind the other: call it with a stream. Not for several threads at a time.

    Each may begin before the one in front of it has ended, where its kernel says so; the first one only if it
    ``follows`` another kernel of ours, of the same call. One of somebody else's may let the next one begin, and end,
    without having waited for those in front of it.
    """

    def __init__(self, launches: Sequence[Launch], *, follows: bool = False) -> None:
        self._launches = tuple(launches)
        self._starts = [launch.start for launch in launches]
        self._stream = 0
        for i, launch in enumerate(launches):
            launch.config.count = int(launch.kernel.overlaps and (follows or i > 0))

    def __call__(self, stream: int) -> None:
        if stream != self._stream:
            for launch in self._launches:
                launch.config.stream = stream
            self._stream = stream
        for start in self._starts:
            status = start()
            if status:
                again(start, status)


def again(start: Callable[[], int], status: int, call: str = "cuLaunchKernelEx") -> None:
    """Of a launch that failed: once more where it is this thread's first call of CUDA, else the error."""
    if status == NO_CONTEXT:
        bind_context()
        status = start()
    if status:
        _checked(call, (_driver().CUresult(status),))


#: launches a kernel: takes a stream and the values of its parameters that change
Send = Callable[..., None]
#: a part of a kernel's parameters: bytes that stay as they are, or a format of :mod:`struct` for values of a call,
#: without a mark of byte order
Part = str | bytes


def sender(
    kernel: Kernel,
    grid: int | tuple[int, int, int],
    block: int,
    *parameters: Part | tuple[Part, ...],
    shared: int = 0,
    follows: bool = False,
) -> Send:
    """What launches a kernel with this grid, for any thread.

    ``parameters``: of the kernel, one part each, or several without room between them. ``follows``: as of
    :class:`Chain`.
    """
    image, offsets, runs = bytearray(), list[int](), list[tuple[int, str]]()
    joins = False  # whether nothing but padding lies behind the last run of numbers of several sizes
    for parameter in parameters:
        offsets.append(len(image))
        for part in parameter if isinstance(parameter, tuple) else (parameter,):
            if isinstance(part, bytes):
                image += part
                joins = False
                continue
            words = {*part} == {"q"} and len(image) % 8 == 0
            if joins and not words:
                at, before = runs.pop()
                runs.append((at, f"{before}{len(image) - at - struct.calcsize(f'={before}')}x{part}"))
            else:
                runs.append((len(image), part))
            joins = not words
            image += bytes(struct.calcsize(f"={part}"))
        image += bytes(-len(image) % 8)
    lines, space = list[str](), dict[str, Any]()
    count = 0
    for at, form in runs:
        count += _fill(form, at, count, lines, space)

    def make() -> list[Any]:
        buffer = bytearray(image)
        places = [ctypes.c_char.from_buffer(buffer, offset) for offset in offsets]
        launch = Launch(kernel, grid, block, places, shared)
        launch.config.count = int(kernel.overlaps and follows)
        return [memoryview(buffer).cast("q"), buffer, launch.config, launch.start, 0]

    free: list[list[Any]] = []  # those that no call is filling
    space.update(make=make, pop=free.pop, append=free.append, again=again)
    values = "".join(f", v{i}" for i in range(count))
    exec(_compiled(_SEND.format(values=values, fill="\n    ".join(lines))), space)  # noqa: S102
    return space.pop("send")  # type: ignore[no-any-return]


#: Written out for its values, since it is on the way of every call: a function of any values takes 0.2 us more, which
#: is as much as ctypes takes. A call fills arguments that no other one has, and the driver reads them in ``start``.
_SEND = """
def send(stream{values}):
    try:
        made = pop()
    except IndexError:
        made = make()
    words, buffer, config, start, last = made
    {fill}
    if stream != last:
        config.stream = made[4] = stream
    status = start()
    if status:
        again(start, status)
    append(made)
"""


def _fill(form: str, at: int, first: int, lines: list[str], space: dict[str, Any]) -> int:
    """The statements that write values of a format to ``at``, the ``first`` value and those behind it; their count."""
    if at % 8 == 0 and {*form} == {"q"}:
        lines += [f"words[{at // 8 + i}] = v{first + i}" for i in range(len(form))]
        return len(form)
    packing = struct.Struct(f"={form}")
    count = len(packing.unpack(bytes(packing.size)))
    space[f"pack{first}"] = packing.pack_into
    lines.append(f"pack{first}(buffer, {at}, {', '.join(f'v{first + i}' for i in range(count))})")
    return count


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> CodeType:
    return compile(text, __file__, "exec")


@functools.lru_cache(maxsize=4096)
def rows_map(
    pointer: int,
    *,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    bfloat: bool,
    box: tuple[int, int, int, int],
    channels: int,
) -> bytes:
    """The CUtensorMap that copies boxes (n, d, h, w) of rows with ``channels`` of (N, D, H, W, C) 16-bit numbers.

    ``strides`` in elements; that of C is 1. The swizzle is as wide as a row in shared memory. Dims but that of C may
    be in any order, in which rows follow each other there.
    """
    kind = "BFLOAT16" if bfloat else "FLOAT16"
    swizzle = {16: "32B", 32: "64B", 64: "128B"}[channels]
    return _map(pointer, kind, 2, shape, strides, (*box, channels), swizzle)


@functools.lru_cache(maxsize=4096)
def planes_map(
    pointer: int,
    *,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> bytes:
    """The CUtensorMap that copies boxes (c, d, h, w) of (N, C, D, H, W). ``strides`` as of :func:`rows_map`."""
    kind = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}[dtype]
    return _map(pointer, kind, dtype.itemsize, shape, strides, (1, *box), "NONE")


def _map(
    pointer: int,
    kind: str,
    itemsize: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: str,
) -> bytes:
    """A CUtensorMap of five dims, the last of which has a stride of 1; ``kind``, ``swizzle``: the driver's names."""
    driver = _driver()
    made = _checked(
        "cuTensorMapEncodeTiled",
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"),
            5,
            pointer,
            [driver.cuuint64_t(s) for s in reversed(shape)],
            [driver.cuuint64_t(s * itemsize) for s in reversed(strides[:4])],
            [driver.cuuint32_t(s) for s in reversed(box)],
            [driver.cuuint32_t(1)] * 5,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    return ctypes.string_at(made.getPtr(), 128)
