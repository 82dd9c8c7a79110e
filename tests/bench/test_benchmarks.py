"""The scripts in benchmarks/: which rows they measure, keep and leave; what they measure is the package's."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fxfuse import bench, environment
from fxfuse.models import CASES

FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS = [(c.name, m) for c in CASES for m in bench.modes(c)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of benchmarks/ by name, on a machine that seems to have a Hopper GPU."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(environment, "described", lambda _: {"device": "a GPU", "torch": "x"})
    monkeypatch.setattr(torch.backends, "cudnn", types.SimpleNamespace())  # torch's test tools freeze its flags
    yield importlib.import_module
    for name in ("arguments", "gpu", "layers", "ways"):
        sys.modules.pop(name, None)


@pytest.fixture
def gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/gpu.py with rows that are made up; ``measured`` lists them."""
    module: Any = script("gpu")
    module.asked = []

    def measured(case: Any, mode: str, dtype: torch.dtype, peers: list[bench.Peer], budget: Any) -> bench.Row:
        module.asked.append((case.name, mode))
        ways = [*(p.label for p in peers), "fxfuse", "fxfuse channels_last_3d"]
        row = bench.Row(case.name, mode, str(dtype).removeprefix("torch."), [list(case.shape)])
        row.ms, row.error = dict.fromkeys(ways, 1.0), dict.fromkeys(ways, 1e-7)
        if case.name in module.broken:
            row.failed, row.wrong = {"fxfuse": "it is not right: ..."}, ["fxfuse"]
            del row.ms["fxfuse"]
        return row

    module.broken = ()
    monkeypatch.setattr(module, "measured", measured)
    return module


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, str]]:
    """Call the script's main; the rows that it measured."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    module.asked.clear()
    module.main()
    return list(module.asked)


def test_rows_are_measured_once(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ("--json", str(tmp_path / "x.json"), "--resume")
    assert run(gpu, monkeypatch, *file, "--cases", "alone", "scale_norm_pool") == ROWS[1:2] + ROWS[3:5]
    assert "[3/3] scale_norm_pool eval float32 (at 0 s)" in capsys.readouterr().out
    assert run(gpu, monkeypatch, *file) == [r for r in ROWS if r not in ROWS[1:2] + ROWS[3:5]]
    assert "3 rows measured in 0 s; 3 kept\n" in capsys.readouterr().out
    data = json.loads((tmp_path / "x.json").read_text())
    assert {(r["model"], r["mode"]) for r in data["rows"]} == {*ROWS} and data["machine"]["precision"] == "tf32 allowed"
    assert run(gpu, monkeypatch, *file, "--compile") == ROWS  # other peers than those that the rows have
    assert run(gpu, monkeypatch, *file) == []
    assert run(gpu, monkeypatch, *file, "--dtype", "float16") == ROWS
    assert run(gpu, monkeypatch, *file[:2]) == ROWS


def test_a_row_that_was_wrong_is_measured_again(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ("--json", str(tmp_path / "x.json"), "--resume")
    gpu.broken = ("alone",)
    with pytest.raises(SystemExit, match="wrong results: alone: fxfuse"):
        run(gpu, monkeypatch, *file)
    assert gpu.asked == ROWS
    gpu.broken = ()
    assert run(gpu, monkeypatch, *file) == ROWS[1:2]


def test_the_time_is_over(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert run(gpu, monkeypatch, "--minutes", "3", "--json", str(tmp_path / "x.json")) == ROWS[:2]
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1].endswith(f"; {len(ROWS) - 2} left: --resume goes on with them")
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume"], "--resume needs --json FILE"),
        (["--cases", "some"], "there is no case some; there are max_max_sum, alone"),
        (["--chains", "--cases", "alone"], "there is no case alone; there are wide_alone"),
    ],
)
def test_wrong_arguments(gpu: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run(gpu, monkeypatch, *arguments)


def test_layers(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers: Any = script("layers")
    asked: list[tuple[str, str]] = []
    compiled: list[Any] = []

    def measure(case: Any, name: str) -> dict[str, Any]:
        asked.append((str(case), name))
        if len(asked) == 2:
            raise layers.Wrong("far off")
        if len(asked) == 3:
            raise layers.Unsupported("no kernel for it")
        return {"case": str(case), "class": name}

    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr(layers, "compile_ahead", compiled.append)
    monkeypatch.setattr(layers, "TOGETHER", 4)
    monkeypatch.setattr(layers, "DECODERS", layers.DECODERS[:1])
    path = tmp_path / "x.json"
    monkeypatch.setattr(sys, "argv", ["layers.py", "--count", "2", "--json", str(path), "--resume"])
    with pytest.raises(SystemExit, match="wrong results: far off"):
        layers.main()
    assert len(asked) == len(set(asked)) == len(compiled) == 9
    rows = json.loads(path.read_text())["rows"]
    assert [(r["case"], r["class"]) for r in rows] == [asked[0], *asked[2:]] and "unsupported" in rows[1]
    wrong = asked[1]
    asked[:] = [("", "")] * 3
    layers.main()
    assert asked[3:] == [wrong] and len(json.loads(path.read_text())["rows"]) == 9
    assert "1 rows measured in 0 s; 8 kept" in capsys.readouterr().out


def test_ways(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case in both dtypes, once; what the file has already is left."""
    ways, asked = script("ways"), []

    def measured(case: Any, mode: str, dtype: torch.dtype) -> dict[str, float]:
        asked.append((case.name, mode, str(dtype)))
        return {"engine": 1.0, "torch": 2.0}

    monkeypatch.setattr(ways, "measured", measured)
    for arguments, new in (
        (["--dtype", "float16"], len(ROWS) + len(ways.CHAINS)),
        ([], len(ROWS) + len(ways.CHAINS)),
        ([], 0),
    ):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["ways.py", "--json", str(tmp_path / "x.json"), "--resume", *arguments])
        ways.main()
        assert len({*asked}) == len(asked) == new
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 2 * (len(ROWS) + len(ways.CHAINS))
