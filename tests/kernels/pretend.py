"""CPU tensors pass for those of a Hopper GPU: everything but the kernels themselves, which torch stands in for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import execute
from fxfuse.kernels.compilation import kept
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.stages.steps import Schedule
from fxfuse.program import Program


class Stand:
    """Stands in for what is compiled: counts its runs, and has the program run by torch."""

    runs: list[str] = []
    asks_torch, apart = False, False

    def __init__(self, program: Program, schedule: Schedule, name: str) -> None:
        self.program, self.schedule, self.name = program, schedule, name

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        Stand.runs.append(self.name)
        return self.program.run(inputs)


def make(
    program: Program,
    schedule: Schedule,
    convolution: Convolution | None,
    device: torch.device,
    measuring: Convolution | None = None,
    inputs: object = None,
) -> Stand:
    ours = execute.ENGINE if measuring is None else execute.TWICE
    return Stand(program, schedule, execute.CUDNN if convolution is None else ours)


class Clock:
    """A timer that tells given seconds, and remembers which ways it was asked about."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[list[str]] = []

    def __call__(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        self.asked.append(list(ways))
        for way in ways.values():
            way()
        return {name: self.seconds.get(name, 1.0) for name in ways}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Stand]]:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(execute, "_usable", lambda device: True)
    monkeypatch.setattr(execute, "_hopper", lambda device: True)
    monkeypatch.setattr(execute, "_device_name", lambda device: "NVIDIA Pretend")
    monkeypatch.setattr(execute.Prepared, "of", staticmethod(make))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    restart()
    yield Stand
    restart()


def restart() -> None:
    """As in a new process: what is on disk is all that is left."""
    execute.forget()
    kept.forget()
    Stand.runs.clear()
