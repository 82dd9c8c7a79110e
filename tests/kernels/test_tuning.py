"""Measured choices: which way runs, what is kept, what is read again, and what is ignored."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import Clock, Stand, gpu, restart  # noqa: F401 - a fixture
from torch import Tensor, nn

import fxfuse
import fxfuse.dynamo
from fxfuse import ops, timing
from fxfuse.__main__ import main
from fxfuse.kernels import execute
from fxfuse.kernels.compilation import cache, kept
from fxfuse.kernels.compilation.kept import Choice
from fxfuse.kernels.measure import fastest
from fxfuse.kernels.plan import Path as Way
from fxfuse.tuning import Tuning, measured

pytestmark = pytest.mark.usefixtures("gpu")


def model() -> nn.Module:
    """A layer that the estimate leaves to torch, and a map that is worth a kernel."""
    return nn.Sequential(nn.ConvTranspose3d(16, 8, 1), nn.GELU()).eval()


def sample(size: int = 51, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, size, size, size)


X = sample()


def tuned(clock: Clock, network: nn.Module | None = None, x: Tensor = X) -> Tuning:
    return measured(model() if network is None else network, (x,), {}, clock)


def ways(network: nn.Module, x: Tensor = X) -> list[str]:
    """What an ordinary call runs by."""
    Stand.runs.clear()
    with torch.no_grad(), ops.watch() as runs:
        network(x)
    assert len(runs) == 1
    assert (runs[0].path is Way.KERNEL) == bool(Stand.runs)
    return list(Stand.runs)


# --- choosing -------------------------------------------------------------------------------------
def test_the_estimate_chooses_where_nothing_was_measured() -> None:
    assert ways(fxfuse.optimize(model(), X)) == ["cudnn"]


@pytest.mark.parametrize(
    ("name", "run"), [("engine", ["engine"]), ("cudnn", ["cudnn"]), ("torch", [])], ids=lambda v: str(v)
)
def test_the_fastest_runs_from_then_on(name: str, run: list[str]) -> None:
    clock = Clock(**{name: 0.5})
    fast = fxfuse.optimize(model(), X)
    result = tuned(clock, fast)
    assert clock.asked == [["cudnn", "torch", "engine"]]
    assert ways(fast) == run
    assert ways(fxfuse.optimize(model(), X)) == run  # another model of the same form
    restart()
    assert ways(fxfuse.optimize(model(), X)) == run  # another process
    (found,) = result.regions
    assert (found.chosen, found.estimated, found.differs) == (name, "cudnn", name != "cudnn")
    assert found.choice == Choice(name, "cudnn", {w: 0.5 if w == name else 1.0 for w in ("cudnn", "torch", "engine")})


def test_the_first_of_equals_is_the_estimates() -> None:
    assert tuned(Clock()).regions[0].chosen == "cudnn"


def test_other_forms_are_other_choices() -> None:
    tuned(Clock(engine=0.5))
    fast = fxfuse.optimize(model(), X)
    assert ways(fast) == ["engine"]
    assert ways(fast, sample(52)) == ["cudnn"]
    assert ways(fast, X.to(memory_format=torch.channels_last_3d)) == ["cudnn"]
    assert ways(fxfuse.optimize(model(), X, precision="ieee")) == ["cudnn"]
    assert ways(fxfuse.optimize(model(), X, precision="tf32")) == ["engine"]  # as torch's settings say
    assert ways(fxfuse.optimize(model().half(), X.half()), X.half()) != ["engine"]


def test_measured_again_after_a_choice() -> None:
    tuned(Clock(engine=0.5))
    second = Clock(torch=0.5)
    assert tuned(second).regions[0].chosen == "torch"
    assert len(second.asked) == 1
    assert ways(fxfuse.optimize(model(), X)) == []


def test_an_ordinary_call_never_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("an ordinary call measures")

    monkeypatch.setattr(timing, "queued_in_turns", fail)
    monkeypatch.setattr(execute, "_measure", fail)
    assert ways(fxfuse.optimize(model(), X)) == ["cudnn"]


def test_a_way_that_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Stand, inputs: list[Tensor]) -> list[Tensor]:
        if self.name == "engine":
            raise torch.OutOfMemoryError("CUDA out of memory\nmore words")
        return self.program.run(inputs)

    monkeypatch.setattr(Stand, "run", run)
    clock = Clock(engine=0.1, torch=0.5)
    result = tuned(clock)
    assert clock.asked == [["cudnn", "torch"]]
    (engine,) = [w for w in result.regions[0].ways if w.name == "engine"]
    assert engine.seconds is None and engine.failure == "OutOfMemoryError: CUDA out of memory"
    assert result.regions[0].chosen == "torch"
    assert "-    OutOfMemoryError: CUDA out of memory" in str(result)


def test_a_way_that_fails_as_it_runs_is_not_timed() -> None:
    def start(name: str) -> Callable[[], object]:
        return lambda: 1 // (name != "b")

    found, chosen = fastest({"a": "plan a", "b": "plan b"}, start, Clock(b=0.1))
    assert chosen == "a"
    assert [(w.plan, w.seconds) for w in found] == [("plan a", 1.0), ("plan b", None)]
    with pytest.raises(RuntimeError, match=r"no way to run it works.*ZeroDivisionError"):
        fastest({"b": ""}, start, Clock())


def test_the_timer() -> None:
    calls = []
    seconds = timing.queued_in_turns({"slow": lambda: time.sleep(2e-3), "fast": lambda: calls.append(1)}, rounds=3)
    assert 2e-3 <= seconds["slow"] < 0.1 and 0 < seconds["fast"] < 1e-4
    assert len(calls) == 5 + 3 * timing.MOST_QUEUED


@pytest.mark.defective
def test_where_measuring_fails_the_estimate_chooses(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no clock")

    assert measured(model(), (X,), {}, broken).regions == ()
    assert "no clock" in caplog.text
    assert ways(fxfuse.optimize(model(), X)) == ["cudnn"]


def test_a_choice_that_is_no_candidate_any_more_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(Clock(engine=0.5))
    restart()
    monkeypatch.setattr(execute, "_hopper", lambda device: False)
    assert ways(fxfuse.optimize(model(), X)) == ["cudnn"]


# --- the ways in ----------------------------------------------------------------------------------
def test_the_model_is_left_as_it_is() -> None:
    network = nn.Sequential(nn.ConvTranspose3d(16, 8, 3), nn.BatchNorm3d(8), nn.Dropout3d(0.5)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x, random = X.clone(), torch.get_rng_state()
    result = tuned(Clock(), network, x)
    assert len(result.regions) == 1
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, X)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_options_tune_measures_once_here_and_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(engine=0.5)
    monkeypatch.setattr(timing, "queued_in_turns", clock)
    fast = fxfuse.optimize(model(), X, tune=True)
    assert len(clock.asked) == 1
    assert ways(fast) == ["engine"]
    assert ways(fast, sample(52))[-1] == "engine"
    assert len(clock.asked) == 2  # other shapes, in their first call
    assert ways(fast, sample(52)) == ["engine"]
    restart()
    assert ways(fxfuse.optimize(model(), X)) == ["engine"]
    fxfuse.optimize(model(), X, tune=True)
    assert len(clock.asked) == 2  # it was kept


def test_a_part_of_a_model() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = model()

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) if float(x.sum()) < 1e9 else x  # no capture follows this

    parts = fxfuse.optimize(Odd(), X, submodules=["up"])
    assert [r.chosen for r in tuned(Clock(engine=0.5), parts).regions] == ["engine"]
    assert ways(parts) == ["engine"]
    holder = nn.ModuleDict({"part": fxfuse.optimize(model(), X)})
    holder.forward = lambda x: holder["part"](x)  # type: ignore[method-assign]
    assert len(tuned(Clock(), holder).regions) == 1


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model(), backend=fxfuse.dynamo.backend, options={"remainder": "eager"})
    assert [r.chosen for r in tuned(Clock(engine=0.5), compiled).regions] == ["engine"]
    assert ways(compiled) == ["engine"]


def test_compiled_with_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(engine=0.5)
    monkeypatch.setattr(timing, "queued_in_turns", clock)
    torch._dynamo.reset()
    compiled = torch.compile(model(), backend=fxfuse.dynamo.backend, options={"remainder": "eager", "tune": True})
    with torch.no_grad():
        compiled(X)
    assert len(clock.asked) == 1
    assert ways(compiled) == ["engine"]


def test_kernels_left_out() -> None:
    fast = fxfuse.optimize(model(), X, kernels=False)
    assert ways(fast) == []
    assert fast.fxfuse_report.regions[0].plan == "torch's operators: kernels are left out, as asked for"
    assert fast.fxfuse_report.regions[0].source == ""
    torch._dynamo.reset()
    assert (
        ways(torch.compile(model(), backend=fxfuse.dynamo.backend, options={"remainder": "eager", "kernels": False}))
        == []
    )
    assert tuned(Clock(), fast).regions == ()
    with pytest.raises(ValueError, match="tune=True measures kernels against torch"):
        fxfuse.optimize(model(), kernels=False, tune=True)


# --- words ----------------------------------------------------------------------------------------
def test_the_table() -> None:
    lines = str(tuned(Clock(engine=0.5e-3, cudnn=1.25e-3, torch=12.5e-3))).splitlines()
    assert lines == [
        "Sequential: 1 region measured, 1 chosen otherwise than by the estimate",
        "",
        "[1] conv_transpose > gelu",
        "    f32[1, 16, 51, 51, 51] on NVIDIA Pretend",
        "    cudnn        1.250 ms  by estimate",
        "    torch       12.500 ms",
        "    engine       0.500 ms  chosen",
    ]


def test_the_table_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(tuned(Clock(), nn.ReLU())) == ("ReLU: nothing was measured: no region of it ran; its report says why")
    monkeypatch.setattr(execute, "_usable", lambda device: False)
    assert "no region ran on a GPU by kernels" in str(tuned(Clock()))
    with pytest.raises(TypeError, match=r"tune\(\) takes an nn.Module, not function"):
        fxfuse.tune(lambda x: x, X)  # type: ignore[arg-type]


def test_the_plan_says_what_was_measured() -> None:
    estimated = fxfuse.explain(model(), X).regions[0].plan
    assert "measured" not in estimated and "is bound by reading its input" in estimated
    tuned(Clock(engine=0.5e-3, cudnn=1.25e-3))
    plan, source = (getattr(fxfuse.explain(model(), X).regions[0], n) for n in ("plan", "source"))
    assert plan.startswith("one kernel: conv_transpose")
    assert plan.endswith("(measured: cudnn 1.250 ms, torch 1000.000 ms, engine 0.500 ms)")
    assert "conv_wgmma.cuh" in source
    assert "measured" not in fxfuse.explain(model(), X.to(memory_format=torch.channels_last_3d)).regions[0].plan


def test_the_dump_says_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXFUSE_DUMP", str(tmp_path / "dump"))
    monkeypatch.setattr(execute, "architecture", lambda device: None)
    tuned(Clock(engine=0.5e-3))
    plans = [(p / "plan.txt").read_text() for p in (tmp_path / "dump").iterdir()]
    assert any("for NVIDIA Pretend, tf32 convolutions of float32" in p and "engine 0.500 ms" in p for p in plans)


# --- on disk --------------------------------------------------------------------------------------
def identity(**change: Any) -> dict[str, Any]:
    region = fxfuse.explain(model(), X).regions[0].region
    inputs = [torch.empty([s or 0 for s in kind.shape]) for _, kind in region.rewritten.inputs]
    return {**kept.identity(region, inputs, exact=False, device="NVIDIA Pretend"), **change}


CHOICE = Choice("engine", "cudnn", {"engine": 1e-3, "cudnn": 2e-3})


def only_file() -> Path:
    (place,) = (p for p in (cache.current().root / "choices").rglob("*") if p.is_file())
    return place


def test_what_is_kept_is_read_back() -> None:
    of = identity()
    assert kept.load(of) is None and kept.count() == 0
    kept.save(of, CHOICE)
    assert kept.load(of) == CHOICE
    kept.forget()
    assert kept.load(of) == CHOICE and kept.count() == 1
    kept.save(of, dataclasses.replace(CHOICE, chosen="cudnn"))
    kept.forget()
    assert kept.load(of).chosen == "cudnn" and kept.count() == 1
    assert kept.clear() == 1 and kept.load(of) is None and kept.count() == 0


def test_the_command_counts_and_clears(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    assert "measured" not in capsys.readouterr().out
    kept.save(identity(), CHOICE)
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.endswith("1.0 GiB; 1 measured choice\n")
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed 0 and 1 measured choice from {cache.current().root}\n"
    assert kept.count() == 0


def test_everything_that_it_depends_on_counts() -> None:
    of = identity()
    kept.save(of, CHOICE)
    for name, value in of.items():
        other = {**of, name: [*value, 1] if isinstance(value, list) else f"{value} "}
        kept.forget()
        assert kept.load(other) is None, name
    assert kept.load(of) == CHOICE


def test_a_file_of_another_name_is_ignored() -> None:
    kept.save(identity(), CHOICE)
    place, other = only_file(), identity(device="NVIDIA Other")
    place.rename(place.with_name(f"{kept._key(other)}.json"))
    assert kept.load(other) is None


def test_cudnns_settings_count() -> None:
    kept.save(identity(), CHOICE)
    with torch.backends.cudnn.flags(enabled=True, benchmark=not torch.backends.cudnn.benchmark):
        assert kept.load(identity()) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"engine"', '"torch"'),
        lambda text: text.replace("0.001", "0.002"),
        lambda text: text.replace('"chosen"', '"chosan"'),
        lambda text: text.replace("NVIDIA Pretend", "NVIDIA Other"),
        lambda text: json.dumps({**json.loads(text), "checksum": "0"}),
        lambda text: "\ud800",
    ],
)
def test_damage_is_ignored(damage: Any) -> None:
    of = identity()
    kept.save(of, CHOICE)
    place = only_file()
    changed = damage(place.read_text())
    assert changed != place.read_text()
    place.write_bytes(changed.encode("utf-8", "surrogatepass"))
    kept.forget()
    assert kept.load(of) is None
    assert ways(fxfuse.optimize(model(), X)) == ["cudnn"]
    kept.save(of, CHOICE)
    kept.forget()
    assert kept.load(of) == CHOICE


@pytest.mark.parametrize(
    "choice",
    [
        {"chosen": "torch"},
        {"seconds": {"engine": float("nan")}},
        {"seconds": {"engine": "fast"}},
        {"seconds": ["engine"]},
        {"more": 1},
    ],
)
def test_a_choice_of_another_form_is_ignored(choice: dict[str, Any]) -> None:
    of = identity()
    kept.save(of, CHOICE)
    place = only_file()
    facts = json.loads(place.read_text())
    del facts["checksum"]
    facts["choice"].update(choice)
    place.write_text(json.dumps({**facts, "checksum": kept._checksum(facts)}))
    kept.forget()
    assert kept.load(of) is None


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "file"))
    fast = fxfuse.optimize(model(), X)
    with caplog.at_level(logging.WARNING):
        tuned(Clock(engine=0.5), fast)
        tuned(Clock(engine=0.5), fast, sample(52))
    (record,) = caplog.records
    assert "they last as long as this process; set FXFUSE_CACHE_DIR" in record.getMessage()
    assert ways(fast) == ["engine"]


@pytest.mark.parametrize("size", ["0", "1G"])
def test_the_switch_of_the_cache_holds(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_SIZE", size)
    tuned(Clock(engine=0.5))
    restart()
    assert kept.count() == (size == "1G")
    assert ways(fxfuse.optimize(model(), X)) == (["engine"] if size == "1G" else ["cudnn"])


def test_the_longest_unused_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 3)
    for n in range(3):
        kept.save(identity(device=str(n)), CHOICE)
    for place in only_file_of_each():
        os.utime(place, (1000, 1000))
    kept.forget()
    assert kept.load(identity(device="1")) is not None  # used again
    kept.save(identity(device="3"), CHOICE)
    kept.save(identity(device="4"), CHOICE)
    kept.forget()
    assert [d for d in "01234" if kept.load(identity(device=d))] == ["1", "3", "4"]


def only_file_of_each() -> list[Path]:
    return list((cache.current().root / "choices").rglob("*.json"))


def _write(number: int) -> None:
    of = {"device": "shared"}
    for _ in range(50):
        kept.save(of, Choice("engine", "cudnn", {"engine": float(number)}))
        kept.forget()
        assert kept.load(of) is not None


def test_several_processes() -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_write, args=(n,)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert kept.count() == 1
    assert only_file().suffix == ".json"
