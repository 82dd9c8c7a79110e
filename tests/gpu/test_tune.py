"""Measured choices on a GPU: every way that is measured runs and is right, and calls run the one that was chosen."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.compilation import kept
from fxfuse.kernels.plan import Path as Way
from fxfuse.tuning import measured

pytest.importorskip("cuda.bindings")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU or later"
)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
WAYS = ["engine", "cudnn", "torch"] if HOPPER else ["cudnn", "torch"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Choices of their own, compiled kernels as always."""
    monkeypatch.setattr(kept, "_folder", lambda: tmp_path / "choices")
    restart()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield tmp_path / "choices"
    restart()


def restart() -> None:
    execute.forget()
    kept.forget()


def model() -> nn.Module:
    """A convolution, and a softmax over channels of more than 2^20 elements: work for every way."""
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose3d(16, 32, 3, stride=2), nn.ReLU(), nn.Softmax(1)).cuda().eval()


def sample() -> Tensor:
    return torch.randn(2, 16, 16, 16, 16, device="cuda")


def plan(network: nn.Module, x: Tensor) -> str:
    report = fxfuse.explain(network, x)
    return report.regions[0].plan


def test_every_way_is_measured_and_one_is_kept() -> None:
    network, x = model(), sample()
    fast = fxfuse.optimize(network, x)
    result = fxfuse.tune(fast, x)
    (found,) = result.regions
    assert sorted(w.name for w in found.ways) == sorted(WAYS)
    assert all(w.seconds is not None and 1e-6 < w.seconds < 1 for w in found.ways), str(result)
    assert found.chosen == min(found.ways, key=lambda w: w.seconds or 1.0).name
    assert torch.cuda.get_device_name() in str(result)
    assert "measured: " in plan(network, x)
    restart()
    assert "measured: " in plan(network, x)


@pytest.mark.parametrize("name", WAYS)
def test_what_was_chosen_runs_and_is_right(name: str) -> None:
    network, x = model(), sample()
    truth = copy.deepcopy(network).double()(x.double())
    fast = fxfuse.optimize(network, x)
    measured(fast, (x,), {}, lambda ways: {n: 0.5 if n == name else 1.0 for n in ways})
    for _ in range(2):
        with torch.no_grad(), ops.watch() as runs:
            got = fast(x)
        assert [r.path for r in runs] == [Way.REWRITTEN if name == "torch" else Way.KERNEL]
        assert relative_error(got, truth) < 1e-3
        made = [p for p in execute._prepared.values() if p is not None]
        assert [(p.convolution is not None) for p in made] == ([] if name == "torch" else [name == "engine"])
        restart()  # what is on disk chooses


def test_an_ordinary_call_neither_measures_nor_synchronises(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = model(), sample()
    fast = fxfuse.optimize(network, x)
    fxfuse.tune(fast, x)
    restart()
    with torch.no_grad():
        monkeypatch.setattr(execute, "_measure", lambda *_: pytest.fail("an ordinary call measures"))
        fast(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_is_captured_after_tuning() -> None:
    network, x = model(), sample()
    fast = fxfuse.optimize(network, x, tune=True)
    with torch.no_grad():
        expected = fast(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = fast(x)
        graph.replay()
        assert torch.equal(held, expected)


def test_the_model_is_left_as_it_is() -> None:
    network = nn.Sequential(nn.ConvTranspose3d(16, 32, 3, stride=2), nn.BatchNorm3d(32), nn.ReLU()).cuda().train()
    before, x = {k: v.clone() for k, v in network.state_dict().items()}, sample()
    assert fxfuse.tune(fxfuse.optimize(network, x), x).regions
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_kernels_left_out() -> None:
    network, x = model(), sample()
    fast = fxfuse.optimize(network, x, kernels=False)
    with torch.no_grad(), ops.watch() as runs:
        fast(x)
    assert [r.path for r in runs] == [Way.REWRITTEN]


def test_what_runs_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DUMP", str(tmp_path / "dump"))
    network, x = model(), sample()
    with torch.no_grad():
        fxfuse.optimize(network, x)(x)
    (place,) = (tmp_path / "dump").iterdir()
    told = (place / "plan.txt").read_text()
    assert f"for {torch.cuda.get_device_name()}, tf32 convolutions of float32" in told
    assert " registers, " in told and "cubin " in told
    assert list(place.glob("*.cu"))


def test_another_process_reads_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "shared"))
    script = """
import torch, fxfuse
from torch import nn
torch.backends.cudnn.allow_tf32 = True
network = nn.Sequential(nn.ConvTranspose3d(16, 32, 3, stride=2), nn.ReLU(), nn.Softmax(1)).cuda().eval()
x = torch.randn(2, 16, 16, 16, 16, device="cuda")
{}
print(fxfuse.explain(network, x).regions[0].plan)
"""
    for line, expected in (("", False), ("fxfuse.tune(network, x)", True), ("", True)):
        done = subprocess.run([sys.executable, "-c", script.format(line)], capture_output=True, text=True, check=True)
        assert ("measured: " in done.stdout) == expected, done.stdout + done.stderr
