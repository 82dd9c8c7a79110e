"""`python -m fxfuse` as a new user tries it: every command, and every wrong argument."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import bench, demo
from fxfuse.chain import Builder, operands
from fxfuse.cli import main
from fxfuse.cli import target as targets
from fxfuse.models import Case
from fxfuse.patterns import DEFAULT_RULES, Legality, Match, P, X
from fxfuse.pipeline import Options
from fxfuse.report import Report

MODEL = """
import torch
from torch import nn

class Decoder(nn.Sequential):
    def __init__(self):
        super().__init__(nn.ConvTranspose3d(2, 4, 4, 2, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 2, 2)

    def forward(self, x, y):
        return self.up(x).relu() + y

class Space:
    make = Decoder

ready = Decoder()
value = 5

def raises():
    raise RuntimeError("no weights here\\nand more")

def leaves():
    raise SystemExit(3)

def wants(channels, *, depth, more=1):
    return Decoder()

def number():
    return 3

class Leaves(nn.Module):
    def forward(self, x):
        raise SystemExit(5)
"""
SHAPE = "2x2x3x4x4"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with a user's file in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "kept"))
    (tmp_path / "users_decoder.py").write_text(MODEL)
    (tmp_path / "users_broken.py").write_text("import users_decoder\nraise ValueError('as planned')")
    (tmp_path / "users_imports.py").write_text("import a_module_that_is_not_there")
    sys.modules.pop("users_decoder", None)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence on stderr of a call with wrong arguments: exit code 2, no traceback, nothing on stdout."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith(("fxfuse: ", *(f"fxfuse {a}: " for a in arguments[:1]))), err
    return line


# --- naming a model ---------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["explain", "verify", "bench"])
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("no_such_module:x", "there is no module 'no_such_module' in"),
        ("no_such_file.py:x", "there is no file no_such_file.py"),
        ("users_decoder.py", "'users_decoder.py' does not name a model; write module:factory or file.py:factory"),
        ("users_decoder:", "does not name a model"),
        ("users_decoder:Decodr", "users_decoder has no 'Decodr'; did you mean 'Decoder'?"),
        ("users_decoder:Space.mke", "users_decoder has no 'Space.mke'; did you mean 'make'?"),
        ("users_decoder.py:raises", "users_decoder.py:raises fails with RuntimeError: no weights here"),
        ("users_decoder:leaves", "users_decoder:leaves fails with SystemExit: 3"),
        ("users_decoder:wants", "a factory takes no arguments, this one asks for channels, depth"),
        ("users_decoder:number", "users_decoder:number returns a int, not an nn.Module"),
        ("users_decoder:value", "users_decoder:value is a int, neither a factory nor an nn.Module"),
        ("users_broken:x", "importing users_broken fails with ValueError: as planned"),
        ("users_broken.py:x", "importing users_broken.py fails with ValueError: as planned"),
        ("users_imports:x", "importing users_imports fails with ModuleNotFoundError: No module named 'a_module"),
    ],
)
def test_models_that_do_not_load(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, model: str, sentence: str
) -> None:
    assert sentence in refused(capsys, command, model, "--shape", SHAPE)


@pytest.mark.parametrize("name", ["users_decoder:Decoder", "users_decoder.py:ready", "./users_decoder.py:Space.make"])
def test_models_that_load(folder: Path, name: str) -> None:
    assert type(targets.load(name)).__name__ == "Decoder"


# --- other wrong arguments --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: command"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("explain",), "the following arguments are required: module:factory, --shape"),
        (("verify", "users_decoder:Decoder"), "the following arguments are required: --shape"),
        (("verify", "users_decoder:Decoder", "--shape", "2xx3"), "'2xx3' is no shape; write sizes with x between"),
        (("verify", "users_decoder:Decoder", "--shape", "2x0x3"), "'2x0x3' has a size of 0"),
        (
            ("verify", "users_decoder:Decoder", "--shape", "2x3"),
            "does not run on 2x3 of float32 on cpu: RuntimeError: ",
        ),
        (("explain", "users_decoder:Two", "--shape", SHAPE), "TypeError: Two.forward() missing 1 required positional"),
        (("explain", "users_decoder:Decoder", "--shape", SHAPE, "--dtype", "float7"), "'float7' is none of float32"),
        (("explain", "users_decoder:Decoder", "--shape", SHAPE, "--device", "tpu"), "'tpu' is none of cpu, cuda"),
        (("explain", "users_decoder:Decoder", "--shape", SHAPE, "--html", "no/x.html"), "there is no folder no"),
        (("explain", "users_decoder:Decoder", "--shape", SHAPE, "--html", "."), ". is a folder; name a file"),
        (("verify", "users_decoder:Decoder", "--shape", SHAPE, "--precision", "x"), "invalid choice: 'x'"),
        (
            ("explain", "users_decoder:Leaves", "--shape", SHAPE),
            "does not run on 2x2x3x4x4 of float32 on cpu: SystemExit",
        ),
        (("explain", "users_decoder:Decoder", "--shape", SHAPE, "--json", "no/x.json"), "there is no folder no"),
        (("explain", "users_decoder:Decoder", "--shape", SHAPE, "--dot", "no/x.dot"), "there is no folder no"),
        (("explain", "users_decoder:Decoder"), "; `python -m fxfuse explain --help` has examples"),
        (("bench", "users_decoder:Decoder"), "users_decoder:Decoder needs --shape, once per input"),
        (("bench", "users_decoder:Decoder", "--shape", "2x3"), "does not run on 2x3"),
        (("bench", "users_decoder:Decoder", "--cases", "all"), "give either module:factory or --cases"),
        (("bench", "--shape", SHAPE), "--shape goes with module:factory"),
        (("bench", "--train"), "--train goes with module:factory"),
        (("bench", "--cases", "some"), "invalid choice: 'some'"),
        (("bench", "--peers", "eager,fast"), "'fast' is none of eager, channels_last, compile"),
        (("bench", "--peers", ","), "nothing is none of eager"),
        (("bench", "--json", "no/x.json"), "cannot write no/x.json: there is no folder no"),
        (("bench", "--plot", "no/x.svg"), "cannot write no/x.svg: there is no folder no"),
        (("bench", "--seconds", "-1"), "'-1' is no number of seconds above 0"),
        (("env", "now"), "unrecognized arguments: now"),
        (("cache", "--clean"), "unrecognized arguments: --clean"),
        (("demo", "--fast"), "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refused(capsys, *arguments)


@pytest.mark.parametrize("command", ["explain", "verify", "bench"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    sentence = refused(capsys, command, "users_decoder:Decoder", "--shape", SHAPE, "--device", "cuda:3")
    assert "; leave --device out to use the CPU" in sentence


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir(mode=0o500)
    assert "cannot write mine/x.json: Permission denied" in refused(capsys, "bench", "--json", "mine/x.json")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may make files")
def test_a_folder_that_takes_no_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked before anything is measured, not after."""
    assert "cannot write /proc/x.json: " in refused(capsys, "bench", "--json", "/proc/x.json")


def test_asking_leaves_no_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "old.json").write_text("kept")
    refused(capsys, "bench", "--json", "new.json", "--plot", "no/x.svg")
    refused(capsys, "bench", "--json", "old.json", "--plot", "no/x.svg")
    assert not (folder / "new.json").exists() and (folder / "old.json").read_text() == "kept"


def test_output_that_turns_out_not_to_be_writable(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    arguments = ("users_decoder:Decoder", "--shape", SHAPE, "--seconds", "0.01", "--peers", "eager")
    assert main(("bench", *arguments, "--json", "x.json")) == 2
    assert "fxfuse bench: cannot write x.json: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(Report, "to_html", fails, raising=False)
    assert main(("explain", *arguments[:3], "--html", "x.html")) == 2
    assert "fxfuse explain: cannot write x.html: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("FXFUSE_FUEL", "some", "FXFUSE_FUEL='some' must be a whole number"),
        ("FXFUSE_CACHE_SIZE", "some", "FXFUSE_CACHE_SIZE"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "verify", "bench"])
def test_wrong_settings(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    value: str,
    sentence: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert sentence in refused(capsys, command, "users_decoder:Decoder", "--shape", SHAPE)


# --- what works -------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [(), ("explain",), ("verify",), ("bench",), ("demo",), ("env",), ("cache",)])
def test_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    assert main((*command, "--help")) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {' '.join(('python -m fxfuse', *command))}")
    assert re.search(r"examples:\n  (FXFUSE_\w+=\S+ )?python -m fxfuse", text)
    if command == ():
        assert "exit codes: 0 all is well; 1 it ran, and a result is wrong; 2 wrong arguments" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("--version",)) == 0 and capsys.readouterr().out.strip() == fxfuse.__version__


def test_explain(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(("explain", "users_decoder:Decoder", "--shape", SHAPE)) == 0
    assert capsys.readouterr().out.startswith("Decoder: 1 region of 4 operators")
    assert main(("explain", "users_decoder:Decoder", "--shape", SHAPE, "--train")) == 0
    assert "batch_norm_train" in capsys.readouterr().out
    monkeypatch.setattr(Report, "to_html", lambda _, path: Path(path).write_text("a page"), raising=False)
    assert main(("explain", "users_decoder:Decoder", "--shape", SHAPE, "--html", "x.html")) == 0
    assert (folder / "x.html").read_text() == "a page" and capsys.readouterr().err == "wrote x.html\n"
    assert main(("explain", "users_decoder:Decoder", "--shape", SHAPE, "--json", "x.json", "--dot", "x.dot")) == 0
    assert json.loads((folder / "x.json").read_text())["model"] == "Decoder"
    assert (folder / "x.dot").read_text().startswith("digraph")
    assert capsys.readouterr().err == "wrote x.json\nwrote x.dot\n"


def test_two_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("verify", "users_decoder.py:Two", "--shape", SHAPE, "--shape", "1x2x1x1x1")) == 0
    assert "Two: verified against float64" in capsys.readouterr().out


class ForgetRelu(fxfuse.Rule):
    """relu(x) = x, which is wrong"""

    legality = Legality.BITWISE
    pattern = P("relu", X)

    def rewrite(self, match: Match, build: Builder) -> Any:
        return operands(match.root)[0]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Options(rules=(ForgetRelu(), *DEFAULT_RULES))
    monkeypatch.setattr(Options, "make", lambda *_, **__: made)


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("verify", "users_decoder:Decoder", "--shape", SHAPE, "--dtype", "bfloat16")) == 0
    assert "Decoder: verified against float64" in (out := capsys.readouterr().out) and "gradient of 0.weight" in out
    assert main(("verify", "users_decoder:Decoder", "--shape", SHAPE, "--no-gradients")) == 0
    assert "gradient of" not in capsys.readouterr().out


def test_verify_fails(folder: Path, capsys: pytest.CaptureFixture[str], planted: None) -> None:
    assert main(("verify", "users_decoder:Decoder", "--shape", SHAPE)) == 1
    out = capsys.readouterr().out
    assert "NOT verified" in out and "FAILED: region 0: the rule ForgetRelu at 2 is wrong here" in out


def measured(*more: str) -> int:
    return main(("bench", "users_decoder:Decoder", "--shape", SHAPE, "--seconds", "0.01", *more))


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured("--json", "x.json", "--plot", "x.svg", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert "GB/s" in out and "fxfuse channels_last_3d" in out and "times the least time" in out
    assert "[1] users_decoder:Decoder, eval: fxfuse: first call, verification" in err and "wrote x.svg" in err
    results = json.loads((folder / "x.json").read_text())
    (row,) = results["rows"]
    ways = {"eager", "channels_last_3d", "fxfuse", "fxfuse channels_last_3d"}
    assert {*row["ms"]} == {*row["error"]} == {*row["first_s"]} == ways
    assert row["model"] == "users_decoder:Decoder" and row["mode"] == "eval" and row["shapes"] == [[2, 2, 3, 4, 4]]
    assert row["floor"] > 0 and {"device", "torch", "fxfuse", "protocol"} <= {*results["machine"]}
    svg = ET.parse(folder / "x.svg").getroot()
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert ways <= {*texts} and "users_decoder:Decoder, eval, float32, 2x2x3x4x4" in texts
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + len(ways)


def test_bench_does_not_time_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str], planted: None) -> None:
    assert measured("--json", "x.json", "--plot", "x.svg") == 1
    out = capsys.readouterr().out
    assert out.count("not timed: it is not right: output is ") == 2
    (row,) = json.loads((folder / "x.json").read_text())["rows"]
    assert {*row["ms"]} == {"eager", "channels_last_3d"} and {*row["failed"]} == {"fxfuse", "fxfuse channels_last_3d"}
    assert "not right, not timed" in (folder / "x.svg").read_text()


def test_bench_of_a_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = Case(
        "small", lambda: nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU()), (9, 2, 9, 9, 9), (1, 2, 2, 2, 2)
    )
    monkeypatch.setitem(bench.SETS, "seeds", (small, small))
    assert main(("bench", "--seconds", "0.01", "--peers", "eager", "--dtype", "float64")) == 0
    if not torch.cuda.is_available():
        assert capsys.readouterr().out.count("small, eval, float64, 1x2x2x2x2") == 2


def test_bench_keeps_what_was_measured_before_an_interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU())

    def interrupted() -> nn.Module:
        raise KeyboardInterrupt

    cases = (Case("one", make, (1, 2, 2, 2, 2), (1, 2, 2, 2, 2)), Case("two", interrupted, (1,), (1,)))
    monkeypatch.setitem(bench.SETS, "seeds", cases)
    assert main(("bench", "--seconds", "0.01", "--peers", "eager", "--json", "x.json")) == 130
    assert [r["model"] for r in json.loads((folder / "x.json").read_text())["rows"]] == ["one"]


def test_a_cache_that_cannot_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "it cannot be written, and kernels are compiled anew in every process: set FXFUSE_CACHE_DIR"
    for command in ("env", "cache"):
        monkeypatch.setenv("FXFUSE_CACHE_DIR", str(folder / "new" / "folder"))
        assert main((command,)) == 0 and remedy not in " ".join(capsys.readouterr().out.split())
        monkeypatch.setenv("FXFUSE_CACHE_DIR", str(folder / "users_decoder.py"))
        assert main((command,)) == 0 and remedy in " ".join(capsys.readouterr().out.split())


def test_env(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DISABLE", "ComposeMaxPools")
    assert main(("env",)) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "FXFUSE_DISABLE=ComposeMaxPools" in out
    assert f"{folder / 'kept'}: 0 compiled" in out.replace("\n      ", " ")
    assert ("is built without CUDA" in out) == (torch.version.cuda is None)
    monkeypatch.setenv("FXFUSE_CACHE_SIZE", "some")
    assert main(("env",)) == 0 and "FXFUSE_CACHE_SIZE" in capsys.readouterr().out


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupt)
    assert main(("demo",)) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_process_of_its_own_whose_reader_goes_away(folder: Path) -> None:
    """`python -m fxfuse env | true`"""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # written when the process ends
    made = subprocess.Popen(
        [sys.executable, "-m", "fxfuse", "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
    )
    assert made.stdout is not None and made.stderr is not None
    made.stdout.close()
    err = made.stderr.read()
    assert made.wait() == 0 and "Traceback" not in err and "BrokenPipe" not in err


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.BatchNorm3d(2), nn.ReLU())

    monkeypatch.setattr(demo, "CASES", (Case("small", make, (1, 2, 3, 3, 3), (1, 2, 3, 3, 3)),))
    results: Callable[..., Any] = demo.results
    monkeypatch.setattr(demo, "results", lambda device: results(device, seconds=0.01))
    assert main(("demo",)) == 0
    out = capsys.readouterr().out
    assert out.count("--- small") == 2 and "error against float64" in out


def test_demo_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, planted: None) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU())

    monkeypatch.setattr(demo, "CASES", (Case("small", make, (1, 2, 3, 3, 3), (1, 2, 3, 3, 3)),))
    assert main(("demo",)) == 1
    assert "small, eval: Sequential: NOT verified" in capsys.readouterr().out
