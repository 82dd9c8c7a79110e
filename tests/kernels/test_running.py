"""BatchNorm's buffers by one kernel: torch's bits, what it is not for, version counters; compiled and emulated."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator.device import Device, emulated, needs_compiler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxfuse
from fxfuse import ops
from fxfuse.kernels import execute, running
from fxfuse.kernels.codegen.arithmetic import FLOATS
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.runtime import prepared, tail_engine

PAIRS = [*itertools.product(FLOATS, FLOATS)]
MOMENTA = [0.1, 0.3, 1.0, 0.0, 1, None]


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated() as found:
        yield found


def given(
    channels: int = 300, buffers: torch.dtype = torch.float32, batch: torch.dtype = torch.float32, count: int = 6
) -> list[Any]:
    torch.manual_seed(channels)
    vectors = [torch.randn(channels).to(buffers), torch.rand(channels).to(buffers), torch.tensor(count)]
    return [*vectors, torch.randn(channels).to(batch), torch.rand(channels).to(batch)]


def by_torch(tensors: list[Any], momentum: Any) -> list[Any]:
    copies = [t.clone() for t in tensors]
    ops.update_running_statistics(*copies, momentum, kernels=False)
    return copies


@needs_compiler
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize(("buffers", "batch"), PAIRS, ids=str)
def test_the_bits_are_torchs(device: Device, buffers: torch.dtype, batch: torch.dtype, momentum: float | None) -> None:
    """Of vectors longer than a block, and of one channel; three times in a row; not finite values among them."""
    for channels in (300, 1):
        tensors = given(channels, buffers, batch)
        if channels > 1:
            tensors[3][5], tensors[4][7], tensors[0][9] = math.inf, math.nan, -math.inf
        for step in range(3):
            expected = by_torch(tensors, momentum)
            versions = [t._version for t in tensors]
            ops.update_running_statistics(*tensors, momentum)
            assert device.launches == ["running"]
            device.launches.clear()
            for got, right in zip(tensors, expected, strict=True):
                assert torch.equal(got.nan_to_num(-77), right.nan_to_num(-77)), step
            moved = [t._version > v for t, v in zip(tensors, versions, strict=True)]
            assert moved == [True, True, True, False, False]


@needs_compiler
@pytest.mark.parametrize("momentum", [0.1, None])
def test_counts(device: Device, momentum: float | None) -> None:
    """None at all; of a long training; beyond what float32 and int32 count."""
    for count in (0, 10**4, 2**24, 2**31 - 1, 2**40 + 5):
        tensors = given(4, count=count)
        expected = by_torch(tensors, momentum)
        assert running.move(*tensors, momentum)
        assert int(tensors[2]) == count + 1
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    if momentum is not None:
        mean, var, _, *batch = given(4)
        expected = by_torch([mean, var, torch.tensor(0), *batch], momentum)
        assert running.move(mean, var, None, *batch, momentum)
        assert torch.equal(mean, expected[0]) and torch.equal(var, expected[1])


def _with(index: int, value: Any) -> list[Any]:
    tensors = given(4)
    tensors[index] = value
    return tensors


@needs_compiler
@pytest.mark.parametrize(
    "tensors",
    [
        _with(0, torch.zeros(4, dtype=torch.float64)),
        _with(1, torch.zeros(4, dtype=torch.float16)),
        _with(4, torch.zeros(4, dtype=torch.float16)),
        [t.double() if i != 2 else t for i, t in enumerate(given(4))],
        _with(0, torch.zeros(8)[::2]),
        _with(3, torch.zeros(1)),
        _with(2, torch.tensor(3.0)),
        _with(1, torch.ones(4, requires_grad=True)),
        given(0),
    ],
)  # fmt: skip
def test_what_torchs_operators_do(device: Device, tensors: list[Any]) -> None:
    """Other dtypes, holes, sizes that are broadcast, buffers that ask for gradients, no channels."""
    expected = by_torch([t.detach() for t in tensors], 0.1)
    assert not running.move(*tensors, 0.1)
    ops.update_running_statistics(*tensors, 0.1)
    assert device.launches == []
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@needs_compiler
def test_calls_that_torchs_operators_serve(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum that is a tensor or asks for a count that is not there, tensors that are traced, and switches."""
    tensors = given(4)
    assert not running.move(*tensors, torch.tensor(0.1))
    assert not running.move(*tensors[:2], None, *tensors[3:], None)
    ops.update_running_statistics(*tensors, 0.1, kernels=False)
    with FakeTensorMode() as mode:
        ops.update_running_statistics(*[mode.from_tensor(t) for t in tensors], 0.1)
    torch.func.functionalize(lambda *given: ops.update_running_statistics(*given, 0.1))(*tensors)
    with monkeypatch.context() as patch:
        patch.setenv("FXFUSE_KERNELS", "0")
        ops.update_running_statistics(*tensors, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        ops.update_running_statistics(*tensors, 0.1)
        assert device.launches == [] and int(tensors[2]) == 10
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        ops.update_running_statistics(*tensors, 0.1)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        ops.update_running_statistics(*tensors, 0.1)
    assert device.launches == ["running"] * 2 and int(tensors[2]) == 12
    with torch.inference_mode():
        ops.update_running_statistics(*[t.clone() for t in tensors], 0.1)
    assert device.launches == ["running"] * 3


@needs_compiler
def test_another_device_is_made_the_current_one(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the launch alone, and only where it is another one."""
    tensors, entered = given(4), []
    running.move(*tensors, 0.1)  # which loads the kernel
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or contextlib.nullcontext())
    for current, expected in ((None, []), (1, [torch.device("cpu")])):
        monkeypatch.setattr(prepared, "current_device", lambda current=current: current)
        entered.clear()
        right = by_torch(tensors, 0.1)
        assert running.move(*tensors, 0.1) and entered == expected
        assert all(torch.equal(a, b) for a, b in zip(tensors, right, strict=True))


@needs_compiler
def test_calls_like_one_before(device: Device) -> None:
    """What differs is looked at again: dtypes, holes, buffers that ask for gradients now; other lengths."""
    plain = given(4)
    for other in ({}, {0: torch.ones(8)[::2]}, {}, {1: torch.ones(4, requires_grad=True)}, {3: torch.ones(4).half()}):
        device.launches.clear()
        tensors = [other.get(i, t) for i, t in enumerate(plain)]
        ops.update_running_statistics(*tensors, 0.1)
        assert device.launches == ([] if other else ["running"])
    for step in range(2):
        for channels in (3, 4, 5):
            tensors = given(channels)
            tensors[3].requires_grad_(step == 0)
            expected = by_torch(tensors, 0.1)
            assert running.move(*tensors, 0.1)
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_a_kernel_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Torch's operators move the buffers, and the reason is told once."""
    monkeypatch.setattr(execute, "_usable", lambda device: True)
    monkeypatch.setattr(running, "_launches", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def fail(*_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(tail_engine, "load", fail)
    tensors = given(4)
    expected = by_torch(tensors, 0.1)
    for _ in range(2):
        ops.update_running_statistics(*[t.clone() for t in tensors], 0.1)
    ops.update_running_statistics(*tensors, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert [r.message for r in caplog.records if "no such thing" in r.message] == caplog.messages
    assert len(caplog.messages) == 1


@needs_compiler
def test_a_backward_notices(device: Device) -> None:
    """Of a value that was saved before the buffers moved."""
    tensors, x = given(4), torch.ones(4, requires_grad=True)
    y = (x * tensors[0]).sum()
    ops.update_running_statistics(*tensors, 0.1)
    assert device.launches == ["running"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@needs_compiler
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_model(device: Device, momentum: float | None) -> None:
    """Buffers after calls of a model are eager mode's; with kernels left out no kernel runs."""
    model = nn.Sequential(nn.ConvTranspose3d(2, 8, 2, 2), nn.BatchNorm3d(8, momentum=momentum), nn.ReLU())
    for kernels in (True, False):
        eager, x = copy.deepcopy(model), torch.randn(2, 2, 3, 4, 5)
        fast = fxfuse.optimize(copy.deepcopy(model), (x,), kernels=kernels)
        device.launches.clear()
        with torch.no_grad():
            for _ in range(2):
                fast(x), eager(x)
        assert device.launches.count("running") == (2 if kernels else 0)
        for a, b in zip(fast.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@needs_compiler
def test_statistics_that_a_kernel_on_small_tensors_reads(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and variance lie in one tensor, one behind the other."""
    for name in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{name}.LEAST_ELEMENTS", 1)
    monkeypatch.setattr(execute, "slower", lambda *_: None)
    model = nn.Sequential(nn.ConvTranspose3d(3, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.AvgPool3d(2))
    eager, x = copy.deepcopy(model), torch.randn(2, 3, 3, 4, 5)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        for _ in range(2):
            device.launches.clear()
            torch.testing.assert_close(fast(x), eager(x), rtol=1e-2, atol=1e-2)
            assert [n for n in device.launches if n in ("finish_statistics", "bundle", "running")] == [
                "finish_statistics",
                "bundle",
                "running",
            ]
            for a, b in zip(fast.buffers(), eager.buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("buffers", "batch"), PAIRS, ids=str)
def test_kernels_compile(buffers: torch.dtype, batch: torch.dtype) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    source = running.source(buffers, batch)
    assert source.startswith("// NVRTC: --fmad=false\n")
    made = compile_cubin(f"{source}static_assert(fxfuse::kRunningThreads == {running.BLOCK});")
    used = made.kernels["running"]
    assert used.spills == 0 and used.registers * running.BLOCK <= 65536


def test_nothing_of_it_without_a_gpu() -> None:
    tensors: list[Tensor] = given(4)
    assert not running.move(*tensors, 0.1)
