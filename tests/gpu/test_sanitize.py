"""The script that runs compute-sanitizer: which kernels it names, and where it looks for the tool."""

from __future__ import annotations

import dataclasses
import functools
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitize
import torch
from emulator.device import needs_compiler

from fxfuse.instr import TensorType
from fxfuse.kernels import running
from fxfuse.kernels.codegen.reductions import Fold, Window
from fxfuse.kernels.codegen.statistics import KINDS
from fxfuse.kernels.convolution.correlation import Correlation
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.planning.observe import examples, observe
from fxfuse.kernels.stages.emit_bundle import emit_bundle
from fxfuse.kernels.stages.emit_collapsed import emit_contraction, emit_sums
from fxfuse.kernels.stages.emit_tail import emit_fold, emit_map, emit_pool, emit_statistics
from fxfuse.program import Program


def test_every_kernel_is_named() -> None:
    """Tools instrument the kernels that are named, and no others."""
    three, one = (3, 3, 3), (1, 1, 1)
    layer, f32 = Layer(8, 8, 1, three, one, (0, 0, 0), one), torch.float32
    both = ("contiguous", "contiguous")
    convolution = Convolution.of(layer, f32, f32, f32, Epilogue(gathers=("statistics",)))
    watched = dataclasses.replace(convolution, made=dataclasses.replace(convolution.made, watched=True))
    _, bundle = Program.parse("def chain(a: f32[8], b: f32[8]):\n    c = add(a, b)\n    d = mul(c, a)\n    return d\n")
    values = observe(bundle, examples(bundle))
    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}
    texts = [
        convolution.source(),
        watched.source(),
        Correlation.of(dataclasses.replace(layer, in_channels=1), f32, f32, f32).source(),
        emit_bundle(bundle, types, {n: t.stride() for n, t in values.items()}).text,
        emit_map("f32", "f32", "contiguous", None),
        emit_pool("f32", "f32", both, None, Window("Sum", three, three, (0, 0, 0), one), None),
        emit_fold("f32", "f32", both, None, Fold("Sum", 8), None),
        emit_statistics("f32", "contiguous", tuple(KINDS)),
        emit_sums("f32", 4, keeps=False),
        emit_contraction("f32", "f32", None, rows=8, across=2, taps=27),
        running.source(f32, f32),
    ]
    names = {name for text in texts for name in re.findall(r"__global__ void __launch_bounds__.*\n(\w+)\(", text)}
    assert names == set(sanitize.KERNELS)


def test_the_tool_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "PACKAGES", ())
    assert sanitize.sanitizer() is None
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(stat.S_IRWXU)
    assert sanitize.sanitizer() == str(tool)


def test_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    monkeypatch.setattr("sys.argv", ["sanitize.py"])
    with pytest.raises(SystemExit, match="pip install nvidia-cuda-sanitizer-api"):
        sanitize.main()


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_commands(tool: str) -> None:
    words = sanitize.command(tool, "compute-sanitizer")
    assert words[:3] == ["compute-sanitizer", "--tool", tool]
    assert words.count("--kernel-name") == len(sanitize.KERNELS)
    assert words[words.index("--error-exitcode") + 1] == "99" and "--run" in words
    assert ("--unchecked" in words) == (tool == "initcheck")
    assert sanitize.command(tool, "compute-sanitizer", ["direct"]).count("--kernel-name") == 1


@pytest.mark.parametrize(("statuses", "left"), [([1], "the chains themselves"), ([0, 99], "memcheck"), ([0, 0], None)])
def test_what_fails_is_named(statuses: list[int], left: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tool first; what fails so is not run under one."""
    given, words = iter(statuses), list[list[str]]()
    monkeypatch.setattr("sys.argv", ["sanitize.py", "--tools", "memcheck", "--sanitizer", "compute-sanitizer"])

    def ran(command: list[str], **_: object) -> SimpleNamespace:
        words.append(command)
        return SimpleNamespace(returncode=next(given))

    monkeypatch.setattr("subprocess.run", ran)
    with pytest.raises(SystemExit) as ended:
        sanitize.main()
    assert ended.value.code == (f"failed: {left}" if left else 0)
    assert next(given, None) is None
    assert all(w[w.index("--part") :] == ["--part", "0", "--jobs", "1"] for w in words)


def test_parts_have_all_chains_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[int]()
    monkeypatch.setattr(sanitize, "_each", lambda _: ((str(i), functools.partial(ran.append, i)) for i in range(10)))
    for part in range(3):
        sanitize.run("cpu", part=part, parts=3)
    assert sorted(ran) == list(range(10)) and ran[:4] == [0, 3, 6, 9]


def test_one_failure_of_several_jobs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=int("--part 2" in " ".join(command)))

    monkeypatch.setattr("subprocess.run", ran)
    assert sanitize._statuses(["command"], 4) == [0, 0, 1, 0]


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself runs them on a GPU")
@pytest.mark.parametrize(
    "name",
    [
        "maximum, tf32, each warpgroup has tiles",
        "softmax, float16 last, each warpgroup has tiles",
        "batch, tf32, each warpgroup has tiles",
        "stored, tf32, samples side by side",
        "a mean of many, x as it lies",
        "holes, rows of several positions, contiguous",
        "moments of 17 channels from products of x",
    ],
)
def test_chains_run_the_kernels_that_they_are_for(name: str) -> None:
    """On the emulated GPU; each of them asserts which."""
    pytest.importorskip("cuda.bindings")
    with torch.no_grad():
        dict(sanitize._each("cpu"))[name]()
