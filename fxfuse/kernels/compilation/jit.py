"""CUDA C++ text to a cubin: NVRTC, without a compiler, a GPU or a driver, behind a cache in memory and on disk.

A source includes the package's own device code by name, ``#include "ptx.cuh"`` from ``kernels/cuh/``, and
nothing else: NVRTC comes without ``cuda_fp16.h``, ``cuda.h`` and ``<cstdint>``, and none is looked for. What it
knows of itself: ``size_t``, ``float4`` and the like, ``dim3``, the math, atomic, shuffle and conversion
intrinsics. Half types are ``unsigned short`` and inline PTX (``cvt.rn.f16.f32``, ``cvt.rn.bf16x2.f32``).

A source whose first line is ``// NVRTC: <options>`` is compiled with these.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxfuse.kernels.compilation import cache

#: the package's device code
HEADERS = Path(__file__).parents[1] / "cuh"

_ALWAYS = ("--std=c++17", "--ptxas-options=-v")
#: from CUDA 12.9 on NVRTC keeps what it has compiled in the driver's cache, without what ptxas said of it
_CACHES = (12, 9)
#: what would let files in that the key does not see
_UNSEEN = re.compile(r"-I|--?(include|pre-include|pch|use-pch|create-pch|arch|gpu-arch)")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_OPTIONS = re.compile(r"// NVRTC: (.+)")
_PLACE = re.compile(r"^(\S+?)\((\d+)\): (?:catastrophic )?error", re.MULTILINE)
_PTX_PLACE = re.compile(r"^ptxas .*?, line (\d+); *(?:error|fatal)", re.MULTILINE)
_AROUND = 4


class MissingPackage(ImportError):  # noqa: N818 - what is missing, as in ModuleNotFoundError
    """A package of the extra ``fxfuse[cuda]`` is not installed."""


class CompileError(RuntimeError):
    """NVRTC or ptxas refused a source. ``log`` is what they said, ``source`` the text; the message shows both."""

    def __init__(self, log: str, source: str, excerpt: str = "") -> None:
        super().__init__(f"the kernel does not compile:\n{log}" + (f"\n\n{excerpt}" if excerpt else ""))
        self.log = log
        self.source = source


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers per thread; bytes of static shared memory per block; bytes of stack per
    thread (local memory, spills included); bytes of spill stores and loads in its code, functions that it
    calls included; named barriers."""

    registers: int
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    barriers: int = 0

    @property
    def spills(self) -> int:
        """Bytes of spill stores and loads: 0 in every kernel worth emitting."""
        return self.spill_stores + self.spill_loads


@dataclasses.dataclass(frozen=True, eq=False)
class Cubin:
    """A compiled source. ``code`` are the bytes of the cubin, ``log`` the compiler's words, ``key`` its name."""

    code: bytes
    source: str
    arch: str
    log: str
    key: str

    @functools.cached_property
    def kernels(self) -> Mapping[str, Resources]:
        """What each kernel takes, by its (mangled) name."""
        return _resources(self.log)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the compiler warned of, and what ptxas could not do: ignored setmaxnreg, serialised wgmma."""
        return tuple(
            line.strip()
            for line in self.log.splitlines()
            if re.search(r"(: |^ptxas )warning\b|potential performance loss", line, re.IGNORECASE)
        )


_memory: dict[str, Cubin] = {}
_making: dict[str, threading.Lock] = {}


def compile_cubin(source: str, arch: str = "sm_90a", *, options: tuple[str, ...] = ()) -> Cubin:
    """The cubin of a CUDA C++ source for one architecture, from the caches where they have it.

    ``options`` are NVRTC's, behind C++17. Options that read other files raise ValueError: the key would not see
    what they bring in. Raises CompileError where the source does not compile, MissingPackage without NVRTC.
    """
    headers, flags, key = _keyed(source, arch, options)
    found = _memory.get(key)
    if found is not None:
        return found
    with _making.setdefault(key, threading.Lock()):
        found = _memory.get(key)  # another thread may have made it while this one waited
        if found is None:
            stored, _ = cache.current().get(key, lambda: _make(source, headers, flags, arch))
            found = _memory[key] = Cubin(stored.code, source, arch, stored.log, key)
    return found


def compiled(source: str, arch: str = "sm_90a") -> Cubin | None:
    """The cubin of a source where a cache has it; None where it would have to be compiled, or without NVRTC."""
    try:
        _, _, key = _keyed(source, arch, ())
    except MissingPackage:
        return None
    found = _memory.get(key)
    if found is None and (stored := cache.current().load(key)) is not None:
        found = _memory[key] = Cubin(stored.code, source, arch, stored.log, key)
    return found


def _keyed(source: str, arch: str, options: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...], str]:
    """The headers, the flags and the key of a source."""
    headers, own = _headers(source), _OPTIONS.match(source)
    options = (*options, *(own[1].split() if own is not None else ()))
    for option in options:
        if _UNSEEN.match(option):
            raise ValueError(f"option {option}: headers come from {HEADERS} and the architecture from arch=")
    uncached = ("--no-cache",) if _numbers() >= _CACHES else ()
    flags = (f"--gpu-architecture={arch}", *_ALWAYS, *uncached, *options)
    return headers, flags, _key(source, headers, flags, _version())


def forget() -> None:
    """Empty the cache in memory; the one on disk stays."""
    _memory.clear()


def _key(source: str, headers: Mapping[str, str], flags: tuple[str, ...], version: str) -> str:
    digest = hashlib.sha256()
    parts = [f"fxfuse {cache.SCHEMA}", version, source, *flags]
    for name in sorted(headers):
        parts += [name, headers[name]]
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


def _headers(source: str) -> dict[str, str]:
    """The own headers that a source includes, directly or not. NVRTC is given these texts and no folder, so
    that what the key saw is what was compiled, and an include that was not seen is an error."""
    found: dict[str, str] = {}
    ahead = list(_included(source))
    while ahead:
        name = ahead.pop()
        if name not in found:
            try:
                written = (HEADERS / name).stat()
                found[name] = _header(HEADERS / name, written.st_mtime_ns, written.st_size)
            except OSError:
                continue  # under an #if, perhaps; else NVRTC says which line
            ahead += _included(found[name])
    return found


@functools.lru_cache(maxsize=256)
def _header(path: Path, _changed: int, _size: int) -> str:
    return path.read_text("utf-8")


@functools.lru_cache(maxsize=256)
def _included(text: str) -> tuple[str, ...]:
    return tuple(_INCLUDE.findall(text))


def _make(source: str, headers: Mapping[str, str], flags: tuple[str, ...], arch: str) -> cache.Stored:
    code, log = _compile(source, headers, flags)
    kernels = " ".join(sorted(_resources(log)))
    return cache.Stored(code, source, log, {"arch": arch, "nvrtc": _version(), "kernels": kernels})


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        _checked(nvrtc.nvrtcVersion())
    except Exception as error:
        raise MissingPackage(
            f"compiling kernels needs NVRTC ({type(error).__name__}: {error}): pip install fxfuse[cuda]"
        ) from error
    return nvrtc


@functools.cache
def _numbers() -> tuple[int, int]:
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return major, minor


@functools.cache
def _version() -> str:
    """NVRTC's version; the library itself tells two numbers, its wheel all."""
    major, minor = _numbers()
    try:
        return f"{major}.{minor} {importlib.metadata.version('nvidia-cuda-nvrtc')}"
    except importlib.metadata.PackageNotFoundError:
        return f"{major}.{minor}"


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"NVRTC: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _compile(source: str, headers: Mapping[str, str], flags: tuple[str, ...]) -> tuple[bytes, str]:
    """The cubin and the log."""
    nvrtc = _nvrtc()
    texts, names = [t.encode() for t in headers.values()], [n.encode() for n in headers]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(texts), texts, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        log = log.strip("\0\n ")
        if int(status) != 0:
            raise CompileError(log or status.name, source, _excerpt(log, source, headers, flags))
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(size: Any, content: Any, program: Any) -> bytes:
    buffer = bytearray(_checked(size(program)))
    _checked(content(program, buffer))
    return bytes(buffer)


def _excerpt(log: str, source: str, headers: Mapping[str, str], flags: tuple[str, ...]) -> str:
    """The lines around the first error, numbered: of the source, of a header, or of the PTX that ptxas refused."""
    place = _PLACE.search(log)
    if place is not None:
        name, line = place[1], int(place[2])
        return _numbered(name, source if name == "kernel.cu" else headers.get(name, ""), line)
    place = _PTX_PLACE.search(log)
    if place is not None:
        return _numbered("ptx", _ptx(source, headers, flags), int(place[1]))
    return ""


def _numbered(name: str, text: str, line: int) -> str:
    lines = text.splitlines()
    first, last = max(line - _AROUND, 1), min(line + _AROUND, len(lines))
    shown = (f"{'>' if n == line else ' '}{n:5d} | {lines[n - 1]}" for n in range(first, last + 1))
    return "\n".join([f"{name}:", *shown]) if lines else ""


def _ptx(source: str, headers: Mapping[str, str], flags: tuple[str, ...]) -> str:
    """The PTX of a source that ptxas refused; empty where that cannot be had."""
    nvrtc = _nvrtc()
    virtual = [f.replace("=sm_", "=compute_") for f in flags if not f.startswith("--ptxas-options")]
    texts, names = [t.encode() for t in headers.values()], [n.encode() for n in headers]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(texts), texts, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(virtual), [f.encode() for f in virtual])
        if int(status) != 0:
            return ""
        return _read(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).decode(errors="replace").strip("\0")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _resources(log: str) -> dict[str, Resources]:
    """What each kernel takes, from ptxas' words: a kernel's lines follow its name, those of its callees them."""
    found: dict[str, dict[str, int]] = {}
    now: dict[str, int] = {}
    for line in log.splitlines():
        entry = re.search(r"Compiling entry function '([^']+)'", line)
        if entry is not None:
            now = found.setdefault(entry[1], {})
            continue
        for name, pattern in _FACTS.items():
            number = re.search(pattern, line)
            if number is not None:
                value = int(number[1])
                now[name] = now.get(name, 0) + value if name.startswith("spill") else max(now.get(name, 0), value)
    return {name: Resources(**facts) for name, facts in found.items() if "registers" in facts}


_FACTS = {
    "registers": r"Used (\d+) registers",
    "barriers": r"used (\d+) barriers",
    "shared": r"(\d+) bytes smem",
    "stack": r"(\d+) bytes (?:stack frame|cumulative stack size)",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}
