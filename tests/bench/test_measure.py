"""Peers side by side: what is timed, what is not, and the least time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import bench
from fxfuse.bench.chains import CHAINS
from fxfuse.bench.peers import Peer, layout_of
from fxfuse.bench.roofline import Work, work
from fxfuse.models import CASES, ScaleNormPool

CPU = torch.device("cpu")
MACHINE = bench.Machine(bandwidth=1e9, flops=1e10, source="made up")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose3d(2, 3, 2), nn.ReLU(), nn.MaxPool3d(2)).eval()


def measured(*peers: Peer, of: nn.Module | None = None, shape: tuple[int, ...] = (1, 2, 3, 3, 3)) -> bench.Row:
    return bench.measure(
        "small",
        model() if of is None else of,
        [shape],
        dtype=torch.float32,
        device=CPU,
        peers=peers or (bench.PEERS["eager"],),
        machine=MACHINE,
        seconds=0.01,
    )


def other(change: Callable[[nn.Module], Any]) -> Peer:
    return Peer("other", False, change)


def test_a_row() -> None:
    steps: list[str] = []
    row = bench.measure(
        "small", model(), [(1, 2, 3, 3, 3)], dtype=torch.float32, device=CPU, machine=MACHINE, seconds=0.01,
        peers=[bench.PEERS["eager"], bench.PEERS["channels_last"]], progress=steps.append,
    )  # fmt: skip
    ways = ["eager", "channels_last_3d", "fxfuse", "fxfuse channels_last_3d"]
    assert [*row.ms] == [*row.first] == [*row.error] == ways and not row.failed and not row.peak
    assert all(ms > 0 for ms in row.ms.values()) and all(e < 1e-6 for e in row.error.values())
    assert row.best in ways[:2] and row.ours in ways[2:]
    assert [*row.plan] == ways[2:] and {*row.plan.values()} == {"torch's operators"}
    assert len(steps) == 6 and steps[-1] == "timing"
    assert row.to_json()["floor"] == round(row.floor, 4) and "failed" not in row.to_json()


def test_the_best_of_each_side() -> None:
    row = bench.Row("a", "eval", "float32", [[1]], ms={"eager": 2.0, "compile": 1.0, "fxfuse": 3.0, "fxfuse x": 0.5})
    assert (row.best, row.ours) == ("compile", "fxfuse x")
    assert (bench.Row("a", "eval", "float32", [[1]]).best, bench.Row("a", "eval", "float32", [[1]]).ours) == (
        None,
        None,
    )


def test_the_model_is_left_as_it_was() -> None:
    own = nn.Sequential(nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), nn.ReLU()).train()
    kept = copy.deepcopy(own.state_dict())
    row = measured(of=own)
    assert row.mode == "train" and not row.failed
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), kept.values(), strict=True))


# --- what is not timed ------------------------------------------------------------------------------
class Louder(nn.Module):
    """A model times 1.001."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.001 * self.inner(x)  # type: ignore[no-any-return]


def test_a_wrong_peer_is_not_timed() -> None:
    row = measured(bench.PEERS["eager"], other(Louder))
    assert (
        "other" not in row.ms and row.wrong == ["other"] and row.failed["other"].startswith("it is not right: output")
    )
    assert row.error["other"] == pytest.approx(1e-3, rel=1e-2) and row.best == "eager"
    assert row.to_json()["failed"] == row.failed


def test_a_peer_that_does_not_run_is_not_timed() -> None:
    def fails(inner: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler\nat all")

    def full(inner: nn.Module) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = measured(other(fails), dataclasses.replace(other(full), label="full"))
    assert row.failed == {
        "other": "it does not run: RuntimeError: no compiler",
        "full": "out of memory: CUDA out of memory",
    }
    assert row.wrong == [] and row.best is None and row.ours is not None


def test_layouts() -> None:
    """One-dimensional convolutions have no layout with the channels last; two-dimensional ones have another."""
    row = measured(bench.PEERS["eager"], bench.PEERS["channels_last"], of=nn.ConvTranspose1d(2, 3, 2), shape=(1, 2, 5))
    assert [*row.ms] == ["eager", "fxfuse"]
    x = torch.ones(2, 3, 4, 5)
    assert layout_of([x[0], x]) is torch.channels_last
    last = bench.PEERS["channels_last"]
    assert last.lay_out(x, torch.channels_last).is_contiguous(memory_format=torch.channels_last)
    assert last.lay_out(x, torch.channels_last_3d) is x and bench.PEERS["eager"].lay_out(x, torch.channels_last) is x
    made = last.make(nn.ConvTranspose2d(4, 3, 2), torch.channels_last)
    assert made.weight.is_contiguous(memory_format=torch.channels_last) and not made.weight.is_contiguous()


# --- the least time ---------------------------------------------------------------------------------
def test_work_is_what_is_left_after_the_rewrites() -> None:
    x = torch.randn(2, 64, 3, 4, 5)
    model = nn.ConvTranspose3d(64, 8, 3, stride=2, bias=False).eval()
    with torch.no_grad():
        optimised = fxfuse.optimize(model, x)
        found = work(optimised, [x])
        out = model(x)
        assert found.bytes == 4 * (x.numel() + model.weight.numel() + out.numel())
        # a product per tap and output position of the same residue, borders included
        full = 2 * 2 * model.weight.numel() * out[0, 0].numel() // 8
        assert found.flops == pytest.approx(full, rel=0.05)
        mean = ScaleNormPool().eval()
        collapsed = work(fxfuse.optimize(mean, x), [x])
        assert collapsed.flops < 2 * x.numel() // 64 * mean.up.weight.numel() / 50


def test_work_counts_what_is_not_fused() -> None:
    x = torch.randn(1, 2, 3, 3, 3)
    alone, more = model(), nn.Sequential(model(), nn.Conv3d(3, 5, 1)).eval()
    with torch.no_grad():
        first, both = (work(fxfuse.optimize(m, x), [x]) for m in (alone, more))
    assert both.flops - first.flops == 2 * 3 * 5 * 2**3


def test_which_bound() -> None:
    assert Work(bytes=2 * 10**9, flops=10**10).seconds(MACHINE) == 2.0
    assert Work(bytes=2 * 10**9, flops=10**10).bound(MACHINE) == "memory"
    assert Work(bytes=10**9, flops=3 * 10**10).seconds(MACHINE) == 3.0
    assert Work(bytes=10**9, flops=3 * 10**10).bound(MACHINE) == "arithmetic"


def test_rates_are_measured() -> None:
    machine = bench.Machine.of(CPU)
    assert 1e7 < machine.bandwidth < 1e13 and 1e7 < machine.flops < 1e15 and "measured here" in machine.source
    assert bench.Machine.of(CPU) is machine


# --- cases ------------------------------------------------------------------------------------------
def test_sets_and_modes() -> None:
    assert bench.SETS["all"] == (*CASES, *CHAINS)
    modes = {c.name: bench.modes(c) for c in bench.SETS["all"]}
    assert modes["scale_norm_pool"] == ("train", "eval") and modes["alone"] == ("eval",)
    assert modes["batch_norm_pools"] == ("train",) and modes["generator"] == ("eval",)
