"""FXFUSE_DUMP: what is written for a region, under which name, by several at once, and where nothing can be."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.kernels import dump, execute
from fxfuse.kernels.planning.candidate import Candidate
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.region import Region


def model() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose3d(4, 8, 3, stride=2), nn.ReLU(), nn.MaxPool3d(2))


def explain() -> Region:
    return fxfuse.explain(model(), torch.randn(1, 4, 5, 5, 5)).regions[0].region


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXFUSE_DUMP", str(tmp_path / "dump"))
    monkeypatch.setattr(execute, "slower", lambda *_: None)
    return tmp_path / "dump"


def read(place: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in sorted(place.iterdir())}


def test_what_is_written(folder: Path) -> None:
    region = explain()
    (place,) = folder.iterdir()
    assert place.name.startswith("conv_transpose-relu-max_pool-f32-1x4x5x5x5-")
    files = read(place)
    assert list(files) == ["1-convolution.cu", "plan.txt", "region.txt"]
    assert files["1-convolution.cu"] == execute.source(region) != ""
    assert files["region.txt"] == region.text
    lines = files["plan.txt"].splitlines()
    assert lines[0] == "for a Hopper GPU, where the inputs are contiguous (not run)"
    assert f"  {execute.describe(region)}" in lines
    assert "  x0: f32[1, 4, 5, 5, 5], strides (500, 125, 25, 5, 1)" in lines
    assert "  1-convolution.cu" in lines


def test_the_name_is_stable_and_tells_regions_apart(folder: Path) -> None:
    explain()
    first = {p.name for p in folder.iterdir()}
    explain()
    assert {p.name for p in folder.iterdir()} == first
    fxfuse.explain(model(), torch.randn(2, 4, 5, 5, 5))
    assert len({p.name for p in folder.iterdir()} - first) == 1
    other = nn.Sequential(nn.ConvTranspose3d(4, 8, 3, stride=2, dilation=2), *model()[1:])
    fxfuse.explain(other, torch.randn(1, 4, 5, 5, 5))
    assert len({p.name for p in folder.iterdir()} - first) == 2


def test_without_the_variable_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DUMP", "")
    monkeypatch.chdir(folder.parent)
    explain()
    assert not list(folder.parent.iterdir())


def test_what_torch_runs_has_a_plan_and_no_source(folder: Path) -> None:
    fxfuse.explain(model().double(), torch.randn(1, 4, 5, 5, 5, dtype=torch.float64))
    (place,) = folder.iterdir()
    assert set(read(place)) == {"plan.txt", "region.txt"}
    assert "torch's operators: no kernel convolves f64[1, 4, 5, 5, 5]" in (place / "plan.txt").read_text()


def test_a_compiled_source_has_its_resources(folder: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    region = explain()
    made = schedule(region.rewritten, examples(region.rewritten))
    assert made.kernel is not None
    candidate = Candidate("engine", made, execute.convolution_of(made.kernel))
    strides = [t.stride() for t in examples(region.rewritten)]
    dump.write(region, strides, "a test", lambda: candidate, "sm_90a")
    (place,) = [p for p in folder.iterdir() if "for a test" in (p / "plan.txt").read_text()]
    told = (place / "plan.txt").read_text()
    assert "1-convolution.cu: sm_90a, cubin " in told
    for kernel in ("measure", "prepare", "convolution", "direct"):
        assert f"    {kernel}: " in told
    assert " registers, " in told and "spills" not in told


# --- several at once, and damage ------------------------------------------------------------------
def test_another_content_takes_the_place(folder: Path) -> None:
    explain()
    (place,) = folder.iterdir()
    kept = read(place)
    (place / "plan.txt").write_text("of another version")
    (place / "2-old.cu").write_text("")
    explain()
    assert [p.name for p in folder.iterdir()] == [place.name]
    assert read(place) == kept


def test_many_writers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    region, start = explain(), threading.Barrier(8)
    strides = [t.stride() for t in examples(region.rewritten)]

    class Plan:
        def __init__(self, number: int) -> None:
            self.number = number

        def __str__(self) -> str:
            return f"plan {self.number}"

        def sources(self) -> list[tuple[str, str]]:
            return [(f"kernel{self.number}", "text")]

    def work(number: int) -> None:
        start.wait()
        for _ in range(10):
            dump.write(region, strides, "a test", lambda: Plan(number % 2))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = [p for p in folder.iterdir() if "plan.txt" in read(p) and "for a test" in read(p)["plan.txt"]]
    assert len(places) == 1
    files = read(places[0])
    number = files["plan.txt"].split("plan ")[1][0]
    assert set(files) == {"plan.txt", "region.txt", f"1-kernel{number}.cu"}  # of one writer
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert not caplog.records


def test_a_folder_that_cannot_be_written_costs_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        explain()
        report = fxfuse.explain(model(), torch.randn(2, 4, 5, 5, 5))
    assert len(report.regions) == 1
    (record,) = caplog.records
    assert f"nothing is written to {folder}" in record.getMessage()
    assert "name a folder that can be written" in record.getMessage()


@pytest.mark.defective
def test_a_defect_does_not_reach_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Candidate:
        raise AssertionError("broken")

    monkeypatch.setattr(execute, "planned", broken)
    assert len(fxfuse.explain(model(), torch.randn(1, 4, 5, 5, 5)).regions) == 1
    assert not folder.exists()
    assert "AssertionError: broken" in caplog.text
