"""A GPU for tests, emulated on the CPU: what the engine launches runs, thread by thread, from the emitted CUDA C++.

A source becomes a library of the host's compiler, with CUDA's names from ``emulated.h``, those of ``ptx.cuh`` from the
file beside this one, and the machine itself in ``runtime.cpp``. :func:`emulated` puts it in the place of the driver:
tensors lie in the CPU's memory and pass for those of a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import math
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fxfuse.kernels import execute, running
from fxfuse.kernels.compilation import jit
from fxfuse.kernels.runtime import (
    collapsed_engine,
    convolution_engine,
    correlation_engine,
    launch,
    memory,
    prepared,
    recent,
    tail_engine,
)
from fxfuse.kernels.runtime.launch import Kernel

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler for the host")
FLAGS = (
    "-std=c++17", "-O1", "-march=native", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w",
    "-Wno-psabi", "-U_FORTIFY_SOURCE",
)  # fmt: skip

#: few enough that blocks take several tiles each
PROCESSORS = 3
#: bytes in front of and behind what is allocated, which nothing may touch
GUARD = 4096

#: threads of the host that compile or launch take turns: the emulated machine is one
_one_at_a_time = threading.RLock()


class EmulationError(RuntimeError):
    """A kernel did what it must not, or waits for what never comes."""


# --- sources ----------------------------------------------------------------------------------------
_MATRIX = re.compile(
    r"(void wgmma_(?:(new|more)_)?n(\d+)\(float \(&a\)\[size\], uint64_t x, uint64_t y\) \{)"
    r'\s*asm volatile\("[^"]*\.f32\.(f16|bf16)\..*?\n\}',
    re.DOTALL,
)
_ENTRY = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^\n]*\)\s+)?(\w+)\(')
_DYNAMIC = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
_STATIC = re.compile(r"__shared__ ([^;]+?) (\w+)((?:\[[^;]*\])?);")


def _matrix(found: re.Match[str]) -> str:
    head, name, columns, kind = found.groups()
    return f"{head}\n  emulated_wgmma(a + o, x, y, {columns}, {int(kind == 'bf16')}, {int(name == 'new')});\n}}"


def translated(text: str) -> str:
    """CUDA C++ as the host's compiler takes it: shared memory and matrix instructions by calls of the runtime."""
    text = _MATRIX.sub(_matrix, text)
    text = _DYNAMIC.sub(r"\1* const \2 = emulated_dynamic();", text)
    return _STATIC.sub(
        r"struct Shared_\2 { \1 \2\3; }; static char of_\2; "
        r"auto& \2 = ((Shared_\2*)emulated_static(&of_\2, sizeof(Shared_\2)))->\2;",
        text,
    )


@functools.cache
def _folder() -> Path:
    """The headers, translated, and the runtime, loaded; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="fxfuse-emulator-")
    _folders.append(folder)
    path = Path(folder.name)
    for header in jit.HEADERS.glob("*.cuh"):
        (path / header.name).write_text(translated(header.read_text("utf-8")), "utf-8")
    for own in ("ptx.cuh", "dependent.cuh", "emulated.h", "runtime.cpp"):
        shutil.copy(HERE / own, path / own)
    _compile(path / "runtime.cpp", path / "runtime.so", "-O2")
    return path


_folders: list[Any] = []


def _compile(source: Path, to: Path, *flags: str) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *FLAGS, *flags, str(source), "-o", str(to)], text=True, capture_output=True)
    if done.returncode:
        raise EmulationError(f"{source.name} does not compile for the host:\n{done.stderr[:4000]}")


@functools.cache
def runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(_folder() / "runtime.so"), mode=ctypes.RTLD_GLOBAL)


def library(source: str) -> ctypes.CDLL:
    """The kernels of a source: ``emulated_<name>(parameters, grid, block, shared)``."""
    with _one_at_a_time:
        return _library(source)


@functools.lru_cache(maxsize=4096)
def _library(source: str) -> ctypes.CDLL:
    runtime()
    folder, text = _folder(), translated(source)
    entries = "\n".join(
        f'extern "C" const char* emulated_{name}(void** given, const int* grid, int block, int shared) {{\n'
        f"  return emulated_run([](void** p) {{ emulated::call({name}, p); }}, given, grid, block, shared);\n}}"
        for name in _ENTRY.findall(source)
    )
    name = hashlib.sha256(text.encode()).hexdigest()[:20]
    path = folder / f"{name}.cpp"
    path.write_text(f"{text}\n{entries}\n", "utf-8")
    _compile(path, path.with_suffix(".so"), "-include", str(folder / "emulated.h"), "-I", str(folder))
    return ctypes.CDLL(str(path.with_suffix(".so")))


@contextlib.contextmanager
def broken(header: str, text: str, instead: str) -> Iterator[None]:
    """Inside, ``instead`` stands in a header where ``text`` does: what tests should see. It has to compile.

    A kernel that fails raises: nobody hands its call to torch's operators instead.
    """
    whole = (jit.HEADERS / header).read_text("utf-8")
    assert whole.count(text) == 1, text
    made: dict[str, ctypes.CDLL] = {}

    def anew(source: str) -> ctypes.CDLL:
        try:
            if source not in made:  # a library of its own, by its text
                made[source] = _library.__wrapped__(f"{source}\n// {header}: {text!r} is {instead!r}\n")
        except EmulationError as error:
            pytest.fail(str(error))  # seen by no test
        return made[source]

    file = _folder() / header
    kept = file.read_text("utf-8")
    file.write_text(translated(whole.replace(text, instead)), "utf-8")
    try:
        with mock.patch(f"{__name__}.library", anew), mock.patch.object(execute, "_warn", _fail):
            yield
    finally:
        file.write_text(kept, "utf-8")


def _fail(message: str) -> NoReturn:
    raise EmulationError(message)


# --- the device -------------------------------------------------------------------------------------
@dataclasses.dataclass
class Device:
    """What runs and what is allocated. ``launches``: the names of the kernels that ran; ``products``: matrix
    instructions of their warpgroups. ``keep``: what has the launches instead, while they are captured.
    """

    launches: list[str] = dataclasses.field(default_factory=list)
    products: int = 0
    memory: list[Tensor] = dataclasses.field(default_factory=list)
    keep: Callable[[Any, Any, Any], int] | None = None

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of NaN, between guards."""
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        room = -(-size * dtype.itemsize // 512) * 512
        memory = torch.full((room + 2 * GUARD + 512,), 0xFF, dtype=torch.uint8)
        skip = GUARD + -(memory.data_ptr() + GUARD) % 512
        kept = memory[skip - GUARD : skip + room + GUARD]
        self.memory.append(kept)
        return kept[GUARD : GUARD + size * dtype.itemsize].view(dtype).as_strided(shape, strides)

    def check(self, kernel: str) -> None:
        """Nothing was written in front of or behind what was allocated."""
        for kept in self.memory:
            for guard, where in ((kept[:GUARD], "in front of"), (kept[-GUARD:], "behind")):
                if not bool((guard == 0xFF).all()):
                    raise EmulationError(f"{kernel} wrote {where} {kept.numel() - 2 * GUARD} bytes that it was given")

    # --- the driver's function that a launch calls
    def start(self, config: Any, function: Any, pointers: Any, _: None) -> int:
        if self.keep is not None:
            return self.keep(config, function, pointers)
        told, (run, name) = config._obj, function
        with _one_at_a_time, _disable_current_modes():
            why = run(pointers, (ctypes.c_int * 3)(*told.grid), told.block[0], told.shared)
            if why:
                raise EmulationError(f"{name}: {why.decode()}")
            if told.count and runtime().emulated_left_early():
                raise EmulationError(f"{name}: a thread ends without begin_dependent(), and the launch overlaps others")
            self.launches.append(name)
            self.products += runtime().emulated_products()
            self.check(name)
        return 0


def _module(source: str, names: Sequence[str], *_: object) -> SimpleNamespace:
    made = {}
    for name in names:
        run = getattr(library(source), f"emulated_{name}")
        run.restype = ctypes.c_char_p
        made[name] = Kernel((run, name), overlaps=True)
    return SimpleNamespace(kernels=made)


def rows_map(
    pointer: int,
    *,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    bfloat: bool,
    box: tuple[int, int, int, int],
    channels: int,
) -> bytes:
    """``Map`` of runtime.cpp in the place of a CUtensorMap."""
    return _map(pointer, 2, shape, strides, (*box, channels))


def planes_map(
    pointer: int,
    *,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> bytes:
    """The same for planes."""
    assert box[-1] * dtype.itemsize % 16 == 0, box
    return _map(pointer, dtype.itemsize, shape, strides, (1, *box), planes=True)


def _map(
    pointer: int,
    itemsize: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    planes: bool = False,
) -> bytes:
    inner = [s * itemsize for s in reversed(strides[:4])]
    assert all(s % 16 == 0 for s in inner) and pointer % 16 == 0 and strides[4] == 1, (strides, pointer)
    sizes = *reversed(shape), *reversed(box), itemsize, planes
    return struct.pack("<Q4Q5I5I2I", pointer, *inner, *sizes).ljust(128, b"\0")


@contextlib.contextmanager
def emulated(seed: int = 0) -> Iterator[Device]:
    """CPU tensors pass for those of a Hopper GPU; ``seed`` of the order in which its threads and copies take turns."""
    device = Device()
    runtime().emulated_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("allocate", "empty"):
            patch.setattr(memory, name, device.empty)
        for where in (convolution_engine, correlation_engine, tail_engine):
            patch.setattr(where, "_module", functools.lru_cache(maxsize=None)(_module))
        for where in (collapsed_engine, convolution_engine, correlation_engine, tail_engine):
            patch.setattr(where, "stream_of", lambda _: 0)
        patch.setattr(tail_engine, "architecture", lambda _: "sm_90a")
        patch.setattr(convolution_engine, "_processors", lambda _: PROCESSORS)
        patch.setattr(convolution_engine, "rows_map", rows_map)
        patch.setattr(convolution_engine, "planes_map", planes_map)
        patch.setattr(prepared, "current_device", lambda: None)
        patch.setattr(launch, "_launcher", lambda: device.start)
        patch.setattr(Kernel, "allow_shared", lambda *_: None)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(execute, "_usable", lambda _: True)
        patch.setattr(execute, "_hopper", lambda _: True)
        patch.setattr(execute, "_device_name", lambda _: "emulated")
        patch.setattr(execute, "_prepared", {})
        patch.setattr(recent, "_recent", {})
        patch.setattr(running, "_launches", {})
        patch.setattr(running, "_calls", {})
        yield device
