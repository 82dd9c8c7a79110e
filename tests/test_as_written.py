"""Calls of which torch's operators run all: the model's own forward serves them, where no rewriting is the faster."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels import execute, plan
from fxfuse.kernels.cost import MACHINES, estimate
from fxfuse.kernels.plan import Path
from fxfuse.kernels.runtime import recent
from fxfuse.ops import watch


def up(*behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose3d(4, 8, 2, stride=2), *behind).eval()


MODELS = {
    "alone": up,
    "norm, folded": lambda: up(nn.BatchNorm3d(8), nn.ReLU()),
    "instance_norm": lambda: up(nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(0.01)),
    "group_norm": lambda: up(nn.GroupNorm(4, 8), nn.SiLU()),
    "train": lambda: up(nn.BatchNorm3d(8), nn.ReLU()).train(),
    "two regions": lambda: up(nn.ReLU(), nn.Conv3d(8, 4, 1), nn.ConvTranspose3d(4, 8, 2), nn.GroupNorm(2, 8)),
}


@pytest.fixture(autouse=True)
def chosen(rewritten_chains: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster chain runs, as outside of tests."""
    monkeypatch.setattr(ops, "by_torch", plan.by_torch)
    recent.forget()


def served(fast: nn.Module, *args: Any) -> tuple[Tensor, bool]:
    """The result of a call, and whether the model made all of it."""
    calls: list[nn.Module] = []
    usual = nn.Sequential.forward

    def forward(self: nn.Sequential, *args: Any) -> Any:
        calls.append(self)
        return usual(self, *args)

    with mock.patch.object(nn.Sequential, "forward", forward), mock.patch.object(ops, "_separate") as region:
        region.side_effect = lambda made, inputs: made
        result = fast(*args)
    assert not (calls and region.called)
    return result, bool(calls)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_serves_small_calls(name: str, gradients: bool) -> None:
    model = MODELS[name]()
    twin, fast, x = copy.deepcopy(model), fxfuse.optimize(model), torch.randn(2, 4, 3, 4, 5)
    with torch.set_grad_enabled(gradients):
        found = [served(fast, x) for _ in range(5)]
        expected = [twin(x) for _ in range(5)]
    # captured; by regions until calls are alike; without gradients one region is as short a way
    alike = gradients or name in ("train", "two regions")
    assert [own for _, own in found] == [True, False, False, alike, alike]
    for (got, _), wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted) and got.requires_grad == wanted.requires_grad
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    if gradients:
        got, wanted = (r.square().sum() for r in (found[-1][0], expected[-1]))
        for a, b in zip(
            *(torch.autograd.grad(r, list(m.parameters())) for r, m in ((got, model), (wanted, twin))), strict=True
        ):
            assert torch.equal(a, b)


def test_what_ends_it() -> None:
    model, x = MODELS["two regions"](), torch.randn(2, 4, 3, 4, 5)
    fast = fxfuse.optimize(model, x)

    def settle() -> None:
        with torch.no_grad():
            for _ in range(4):
                fast(x)
            assert served(fast, x)[1]

    settle()
    with torch.no_grad(), watch() as runs:
        assert torch.equal(fast(x), model(x))
    assert len(runs) == 2
    settle()
    assert not served(fast, x)[1] and fast(x).requires_grad  # gradients are on
    settle()
    with torch.no_grad():
        assert not served(fast, x[:1])[1]
    settle()
    execute.forget()
    with torch.no_grad():
        assert not served(fast, x)[1]
    settle()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype is model(x).dtype
    settle()
    model[4].eps = 1.0
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    settle()
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(fast)(x)
    assert torch.ops.fxfuse.region.default in [n.target for n in traced.graph.nodes]


@pytest.mark.parametrize("what", ["a precision", "a pool that is one", "hooks"])
def test_what_a_model_does_not_serve(what: str) -> None:
    options: dict[str, Any] = {"precision": "ieee"} if what == "a precision" else {}
    model = (
        up(nn.MaxPool3d(2), nn.MaxPool3d(2), nn.Conv3d(8, 2, 1))
        if what == "a pool that is one"
        else MODELS["two regions"]()
    )
    seen: list[int] = []
    if what == "hooks":
        model[1].register_forward_hook(lambda *_: seen.append(1))
    fast, x = fxfuse.optimize(model, **options), torch.randn(2, 4, 8, 8, 8)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for _ in range(4):
                fast(x)
            seen.clear()
            assert served(fast, x)[1] == (what == "hooks" or (gradients and what != "a precision"))
        assert bool(seen) == (what == "hooks")


def test_kernels_are_not_left_for_it() -> None:
    """A region that a kernel ran is not the model's, whatever it was with gradients."""
    recent.note("a", as_written=True)
    assert recent.as_written(["a"], []) is not None
    assert recent.as_written(["a", "b"], []) is None and recent.as_written([], []) is None
    with torch.no_grad():
        assert recent.as_written(["a"], []) is None
    still = recent.as_written(["a"], watchers := [])
    assert still is not None and still()
    watchers.append(1)
    assert not still()
    watchers.clear()
    recent.note("a", as_written=False)
    assert recent.as_written(["a"], []) is None


@pytest.mark.parametrize(("size", "path"), [(3, Path.ORIGINAL), (48, Path.REWRITTEN)])
def test_the_chain_that_torchs_operators_run(size: int, path: Path) -> None:
    """A folded norm is arithmetic on weights, which large tensors are worth."""
    model, x = MODELS["norm, folded"](), torch.randn(2, 4, size, size, size)
    fast = fxfuse.optimize(model, x)
    with torch.no_grad(), watch() as runs:
        torch.testing.assert_close(fast(x), model(x))
    assert [r.path for r in runs] == [path]
    report = fast.fxfuse_report
    (region,) = [r.region for r in report.regions]
    assert plan.by_torch(region, "cpu") is path
    before, after = estimate(region.original), estimate(region.rewritten)
    assert before is not None and after is not None
    assert before.calls == 3 < after.calls and before.bytes > after.bytes
    assert before.one_by_one(MACHINES["cpu"]) > before.macs / MACHINES["cpu"].macs + 1.2e-5


def test_who_serves_calls_with_gradients_and_without() -> None:
    """What kernels or a shorter chain run without gradients may be the model's with them, and the other way round."""
    model, x = up(nn.MaxPool3d(2), nn.MaxPool3d(2), nn.Conv3d(8, 2, 1)), torch.randn(2, 4, 8, 8, 8)
    fast = fxfuse.optimize(model, x)
    for _ in range(3):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                own = [served(fast, x)[1] for _ in range(4)]
            assert own[2:] == [gradients, gradients]
