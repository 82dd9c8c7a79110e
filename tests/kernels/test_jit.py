"""From CUDA C++ to a cubin: headers, keys, errors, resources, and the caches in front."""

from __future__ import annotations

import builtins
import importlib.metadata
import multiprocessing
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from fxfuse.kernels.compilation import cache, jit, sass
from fxfuse.kernels.compilation.jit import CompileError, MissingPackage, Resources, compile_cubin

pytest.importorskip("cuda.bindings.nvrtc", reason="needs the extra fxfuse[cuda]")

HEADER = "#pragma once\nstatic __device__ float twice(float x) { return 2.f * x; }\n"
SOURCE = '#include "twice.cuh"\nextern "C" __global__ void kernel(float* p) { p[threadIdx.x] = twice(p[0]); }\n'
#: 64 values per thread in at most 32 registers
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* p) {
  float v[64], a = 0.f;
  #pragma unroll
  for (int i = 0; i < 64; i++) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 64; i++) { a = a * v[i] + v[63 - i]; p[i] = a; }
}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a folder of headers with one in it."""
    headers = tmp_path / "cuh"
    headers.mkdir()
    (headers / "twice.cuh").write_text(HEADER)
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FXFUSE_CACHE_SIZE", raising=False)
    monkeypatch.setattr(jit, "HEADERS", headers)
    jit.forget()
    yield tmp_path
    jit.forget()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that reached the compiler."""
    sources: list[str] = []
    original = jit._compile

    def count(source: str, *arguments: object) -> tuple[bytes, str]:
        sources.append(source)
        return original(source, *arguments)

    monkeypatch.setattr(jit, "_compile", count)
    return sources


def test_a_cubin_and_what_it_takes(place: Path) -> None:
    cubin = compile_cubin(SOURCE)
    assert cubin.code[:4] == b"\x7fELF"
    assert (cubin.source, cubin.arch, cubin.warnings) == (SOURCE, "sm_90a", ())
    (taken,) = cubin.kernels.values()
    assert list(cubin.kernels) == ["kernel"]
    assert 4 <= taken.registers <= 32
    assert taken == Resources(registers=taken.registers)
    assert taken.spills == 0
    entry = place / "cache" / "v1" / cubin.key
    assert (entry / "kernel.cubin").read_bytes() == cubin.code
    assert (entry / "kernel.cu").read_text() == SOURCE


def test_spills_are_seen() -> None:
    taken = compile_cubin(SPILLING).kernels["spilling"]
    assert taken.registers == 32
    assert taken.spill_stores > 0
    assert taken.spill_loads > 0
    assert taken.stack > 0
    assert taken.spills == taken.spill_stores + taken.spill_loads


def test_shared_memory_barriers_and_stack_of_several_kernels() -> None:
    cubin = compile_cubin(
        """
        template <int N> __global__ void sized(float* p) { p[N] = 1.f; }
        template __global__ void sized<3>(float*);
        extern "C" __global__ void shared(float* p) {
          __shared__ float s[100];
          s[threadIdx.x] = p[threadIdx.x];
          __syncthreads();
          p[threadIdx.x] = s[99 - threadIdx.x];
        }
        __device__ __noinline__ float pick(const float* p, int n) {
          float v[40];
          for (int i = 0; i < 40; i++) v[i] = p[i] * p[i + 1];
          return v[n] + v[(n * 7) % 40];
        }
        extern "C" __global__ void indexed(float* p, int n) { p[0] = pick(p, n); }
        """
    )
    kernels = cubin.kernels
    assert set(kernels) == {"_Z5sizedILi3EEvPf", "shared", "indexed"}
    assert kernels["shared"].shared == 400
    assert kernels["shared"].barriers == 1
    assert kernels["_Z5sizedILi3EEvPf"].shared == 0
    assert kernels["indexed"].stack >= 160
    assert kernels["indexed"].spills == 0


def test_facts_survive_the_disk(compiled: list[str]) -> None:
    first = compile_cubin(SPILLING)
    jit.forget()
    second = compile_cubin(SPILLING)
    assert first is not second
    assert compiled == [SPILLING]
    assert (second.code, second.log, second.kernels) == (first.code, first.log, first.kernels)


def test_ptxas_notes_of_lost_performance_are_warnings() -> None:
    source = 'extern "C" __global__ void kernel(int n) { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }'
    assert any("setmaxnreg" in line for line in compile_cubin(source).warnings)


def test_compiler_warnings_are_warnings() -> None:
    (line,) = compile_cubin('extern "C" __global__ void kernel() { int unused; }').warnings
    assert "declared but never referenced" in line


def test_options_and_architecture(compiled: list[str]) -> None:
    source = 'extern "C" __global__ void kernel(int* p) { p[0] = N + __CUDA_ARCH__; }'
    assert compile_cubin(source, options=("-DN=1",)).key != compile_cubin(source, options=("-DN=2",)).key
    assert compile_cubin(source, "sm_80", options=("-DN=1",)).arch == "sm_80"
    assert len(compiled) == 3
    with pytest.raises(CompileError, match='"N" is undefined'):
        compile_cubin(source)
    with pytest.raises(CompileError, match="gpu-architecture"):
        compile_cubin(source, "sm_1")


def test_a_source_names_its_options(compiled: list[str]) -> None:
    named = "// NVRTC: -DN=3 --fmad=false\n"
    assert compile_cubin(f"{named}{SOURCE}").key == compile_cubin(f"{named}{SOURCE}", options=()).key
    keys = {compile_cubin(f"{line}{SOURCE}").key for line in (named, named.replace("3", "4"), "")}
    assert len(keys) == 3
    with pytest.raises(ValueError, match="option -I/tmp"):
        compile_cubin(f"// NVRTC: -I/tmp\n{SOURCE}")


@pytest.mark.parametrize(("version", "left_out"), [((12, 8), False), ((12, 9), True), ((13, 0), True), ((14, 0), True)])
def test_nvrtc_s_own_cache_is_left_out(
    version: tuple[int, int], left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gives back from there comes without ptxas' words; an NVRTC without a cache refuses the option."""
    given: list[tuple[str, ...]] = []

    def compile_(source: str, headers: object, flags: tuple[str, ...]) -> tuple[bytes, str]:
        given.append(flags)
        return b"", ""

    monkeypatch.setattr(jit, "_numbers", lambda: version)
    monkeypatch.setattr(jit, "_compile", compile_)
    compile_cubin(SOURCE)
    (flags,) = given
    assert ("--no-cache" in flags) is left_out


@pytest.mark.parametrize(
    "option", ["-I/usr/include", "-I", "--include-path=/x", "-include=x.h", "--pre-include=x.h", "-arch=sm_80", "--pch"]
)
def test_options_that_the_key_does_not_see_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"headers come from .*cuh"):
        compile_cubin(SOURCE, options=(option,))


def test_a_changed_header_compiles_again(place: Path, compiled: list[str]) -> None:
    before = compile_cubin(SOURCE)
    (place / "cuh" / "twice.cuh").write_text(HEADER.replace("2.f", "3.f"))
    after = compile_cubin(SOURCE)
    assert before.key != after.key
    assert before.code != after.code
    (place / "cuh" / "twice.cuh").write_text(HEADER)
    assert compile_cubin(SOURCE) is before
    assert len(compiled) == 2


def test_headers_of_headers_count_and_others_do_not(place: Path, compiled: list[str]) -> None:
    (place / "cuh" / "outer.cuh").write_text('#pragma once\n  #  include <twice.cuh>\n#include "outer.cuh"\n')
    source = SOURCE.replace("twice.cuh", "outer.cuh")
    before = compile_cubin(source)
    (place / "cuh" / "unrelated.cuh").write_text("nonsense")
    assert compile_cubin(source) is before
    (place / "cuh" / "twice.cuh").write_text(HEADER + "// more\n")
    assert compile_cubin(source).key != before.key
    assert len(compiled) == 2


def test_a_header_that_is_not_there() -> None:
    with pytest.raises(CompileError, match=r'could not open source file "cuda_fp16\.h"'):
        compile_cubin("#include <cuda_fp16.h>\n" + SOURCE)
    compile_cubin("#if 0\n#include <cuda_fp16.h>\n#endif\n" + SOURCE)


def test_nvrtc_s_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compile_cubin(SOURCE).key
    monkeypatch.setattr(jit, "_version", lambda: "99.9")
    assert compile_cubin(SOURCE).key != before


def test_an_error_shows_its_line() -> None:
    source = "\n".join(f"// line {n}" for n in range(1, 10)) + '\nextern "C" __global__ void k() { foo(); }\n// end'
    with pytest.raises(CompileError) as raised:
        compile_cubin(source)
    message = str(raised.value)
    assert raised.value.source == source
    assert 'identifier "foo" is undefined' in raised.value.log
    assert '>   10 | extern "C" __global__ void k() { foo(); }' in message
    assert "     6 | // line 6" in message
    assert "// line 5" not in message
    assert "    11 | // end" in message


def test_an_error_in_a_header_shows_the_header(place: Path) -> None:
    (place / "cuh" / "twice.cuh").write_text(HEADER.replace("2.f", "two"))
    with pytest.raises(CompileError) as raised:
        compile_cubin(SOURCE)
    assert "twice.cuh:\n" in str(raised.value)
    assert ">    2 | static __device__ float twice(float x) { return two * x; }" in str(raised.value)


def test_an_error_in_inline_ptx_shows_the_ptx() -> None:
    with pytest.raises(CompileError) as raised:
        compile_cubin('extern "C" __global__ void k() { asm volatile("no.such;"); }')
    assert "ptxas" in raised.value.log
    assert " | \tno.such;" in str(raised.value)


def test_an_error_is_not_kept(compiled: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(CompileError):
            compile_cubin("broken")
    assert len(compiled) == 2
    assert cache.current().entries() == []


def test_memory_answers_without_the_disk(place: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_cubin(SOURCE)
    monkeypatch.setattr(cache, "current", None)
    assert compile_cubin(SOURCE) is first
    assert len(compiled) == 1


def test_a_warm_disk_answers_at_once(compiled: list[str]) -> None:
    compile_cubin(SPILLING)
    taken = []
    for _ in range(3):
        jit.forget()
        start = time.perf_counter()
        compile_cubin(SPILLING)
        taken.append(time.perf_counter() - start)
    assert len(compiled) == 1
    assert min(taken) < 0.05


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + b"\xff" + b[101:], lambda b: b""])
def test_a_damaged_cubin_compiles_again(place: Path, compiled: list[str], damage: Callable[[bytes], bytes]) -> None:
    first = compile_cubin(SOURCE)
    file = place / "cache" / "v1" / first.key / "kernel.cubin"
    file.write_bytes(damage(first.code))
    jit.forget()
    assert compile_cubin(SOURCE).code == first.code
    assert file.read_bytes() == first.code
    assert len(compiled) == 2


def test_eviction_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_SIZE", "12K")
    keys = [compile_cubin(SOURCE, options=(f"-DN={n}",)).key for n in range(6)]
    left = [e.key for e in cache.current().entries()]
    assert 0 < len(left) < 6
    assert keys[-1] in left
    assert keys[0] not in left


def test_a_cache_that_cannot_be_written(
    place: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "file").write_text("not a folder")
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(place / "file" / "cache"))
    first = compile_cubin(SOURCE)
    assert compile_cubin(SOURCE) is first
    compile_cubin(SPILLING)
    assert len(compiled) == 2
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


def test_threads_compile_once(compiled: list[str]) -> None:
    start, cubins = threading.Barrier(6), []

    def work() -> None:
        start.wait()
        cubins.append(compile_cubin(SPILLING))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [SPILLING]
    assert len(cubins) == 6
    assert len({id(c) for c in cubins}) == 1


def _race(headers: Path, tally: Path, start: Barrier) -> None:
    original = jit._compile

    def count(*arguments: object) -> tuple[bytes, str]:
        with tally.open("a") as file:
            file.write("compiled\n")
        time.sleep(0.3)
        return original(*arguments)

    jit.HEADERS, jit._compile = headers, count
    start.wait(60)
    taken = compile_cubin(SOURCE).kernels["kernel"]
    with tally.open("a") as file:
        file.write(f"{taken}\n")


def test_processes_compile_once(place: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    racers = [context.Process(target=_race, args=(place / "cuh", place / "tally", start)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [r.exitcode for r in racers] == [0, 0]
    first, *taken = (place / "tally").read_text().splitlines()
    assert first == "compiled"
    assert taken == [str(compile_cubin(SOURCE).kernels["kernel"])] * 2


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found out about the installation is forgotten, before and after."""
    for found in (jit._nvrtc, jit._numbers, jit._version, sass._nvdisasm):
        found.cache_clear()
    yield
    for found in (jit._nvrtc, jit._numbers, jit._version, sass._nvdisasm):
        found.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: object, **named: object) -> object:
        if name.startswith("cuda"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackage, match=r"No module named 'cuda.*pip install fxfuse\[cuda\]"):
        compile_cubin(SOURCE)


@pytest.mark.usefixtures("fresh")
def test_a_missing_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"')

    monkeypatch.setattr(sys.modules["cuda.bindings.nvrtc"], "nvrtcVersion", gone)
    with pytest.raises(MissingPackage, match=r'Failure finding "libnvrtc.so".*pip install fxfuse\[cuda\]'):
        compile_cubin(SOURCE)


@pytest.mark.usefixtures("fresh")
def test_a_missing_disassembler_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    cubin = compile_cubin(SPILLING)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sass._disassemble.cache_clear()
    with pytest.raises(MissingPackage, match="pip install nvidia-cuda-nvdisasm"):
        sass.sass(cubin)


def test_the_machine_code_of_a_kernel() -> None:
    source = 'extern "C" __global__ void %s(float* p) { p[0] = %s; }\n'
    cubin = compile_cubin(source % ("sine", "__sinf(p[0])") + source % ("root", "rsqrtf(p[0])"))
    whole = sass.sass(cubin)
    assert "MUFU.SIN" in sass.sass(cubin, "sine")
    assert "MUFU.RSQ" not in sass.sass(cubin, "sine")
    assert "MUFU.RSQ" in sass.sass(cubin, "root")
    assert "MUFU.SIN" in whole
    assert "MUFU.RSQ" in whole
    with pytest.raises(KeyError, match="no kernel cosine; there are"):
        sass.sass(cubin, "cosine")
    with pytest.raises(RuntimeError, match="nvdisasm"):
        sass.sass(jit.Cubin(b"no cubin", "", "sm_90a", "", ""))
