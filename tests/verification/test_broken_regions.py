"""Regions by themselves: wrong rules are named with their node, wrong kernels are told from wrong rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from agreement import Block, assert_same, data
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.chain import Builder, attributes, op_of, operands
from fxfuse.kernels import execute
from fxfuse.module import OptimizedModule
from fxfuse.patterns import DEFAULT_RULES, Legality, Match, P, Reject, X
from fxfuse.pipeline import Options


class ForgetRelu(fxfuse.Rule):
    """relu(x) = x, which is wrong"""

    legality = Legality.BITWISE
    pattern = P("relu", X)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        node: fx.Node = operands(match.root)[0]
        return node


class Nudge(fxfuse.Rule):
    """max_pool(x) = max_pool(x) * (1 + 1e-7), which float32 does not show"""

    legality = Legality.REASSOCIATING
    pattern = P("max_pool", X, name="pool")

    def check(self, match: Match) -> Reject | None:
        done = any(op_of(u).name == "mul" for u in match.root.users if u.op == "call_function")
        return Reject("it is done") if done else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        pool = match["pool"]
        new = build.call("max_pool", *operands(pool), **attributes(pool))
        return build.call("mul", new, 1 + 1e-7)


class DoubleVariance(fxfuse.Rule):
    """The statistics of a training-mode BatchNorm come out twice as large"""

    legality = Legality.BITWISE
    pattern = P("batch_norm_train", name="norm")
    #: marks what is done
    eps = 1.0000001e-5

    def check(self, match: Match) -> Reject | None:
        return Reject("it is done") if attributes(match["norm"])["eps"] == self.eps else None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        norm = match["norm"]
        new = build.call(op_of(norm).name, *operands(norm), **{**attributes(norm), "eps": self.eps})
        y, mean, var = (build.output(new, i) for i in range(3))
        return y, mean, build.call("mul", var, 2.0)


def verified(model: nn.Module, *rules: fxfuse.Rule) -> nn.Module:
    return OptimizedModule(model, Options(rules=(*rules, *DEFAULT_RULES)), verify=True)


# --- rules ------------------------------------------------------------------------------------------
def test_optimize_names_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule planted in the list that `optimize` uses."""
    made = Options(rules=(ForgetRelu(), *DEFAULT_RULES))
    monkeypatch.setattr(Options, "make", lambda *_, **__: made)
    with pytest.raises(
        fxfuse.VerificationError, match=r"region up: the rule ForgetRelu at relu is wrong here"
    ) as caught:
        fxfuse.optimize(Block().eval(), data(), verify=True)
    assert "relu(x) = x, which is wrong" in str(caught.value) and "FXFUSE_DISABLE=ForgetRelu" in str(caught.value)


@pytest.mark.parametrize("training", [False, True])
def test_the_first_wrong_rule_of_several(training: bool) -> None:
    model = nn.Sequential(
        nn.ConvTranspose3d(2, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.MaxPool3d(2), nn.BatchNorm3d(4)
    ).train(training)
    nn.init.constant_(model[0].bias, -1.0)
    optimised = OptimizedModule(model, Options(rules=(*DEFAULT_RULES, ForgetRelu())))
    report = fxfuse.verify(model, optimised, torch.randn(2, 2, 6, 6, 6))
    (region,) = report.regions
    assert not report.ok and region.broken is not None
    assert not report.comparisons[0].ok  # although the first call of an optimised module is the model's own
    applied = [a.rule for a in optimised.fxfuse_report.rules]  # type: ignore[union-attr]
    assert len(applied) >= 3 and region.broken.number == applied.index("ForgetRelu") + 1
    assert (
        region.broken.application.rule == "ForgetRelu" and region.broken.application.node == "3"
    )  # where the pools moved it
    assert report.failures[0].startswith("region 0: the rule ForgetRelu at 3 is wrong here: after it the chain is ")


def test_a_rule_that_float32_does_not_show() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 4, 3), nn.MaxPool3d(2)).eval()
    with pytest.raises(
        fxfuse.VerificationError, match=r"the rule Nudge at 1 is wrong here: .* is 1.0e-07 from"
    ) as caught:
        verified(model, Nudge())(torch.randn(2, 2, 6, 6, 6))
    assert all(c.ok for c in caught.value.report.comparisons)  # type: ignore[union-attr]


def test_statistics() -> None:
    with pytest.raises(fxfuse.VerificationError, match="the rule DoubleVariance at norm is wrong here") as caught:
        verified(Block(), DoubleVariance())(data())
    wrong = {c.what for c in caught.value.report.comparisons if not c.ok}  # type: ignore[union-attr]
    assert wrong == {"norm.running_var afterwards"}  # with gradients the original chain runs


def test_a_part_of_a_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Block().eval(), nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))  # type: ignore[no-any-return]

    model = Two()
    optimised: Any = fxfuse.optimize(model, submodules=["first", "last"])
    wrong = OptimizedModule(model.last, Options(rules=(ForgetRelu(),)))
    optimised._modules["last"] = wrong
    report = fxfuse.verify(model, optimised, data())
    assert [r.ok for r in report.regions] == [True, False]
    assert report.failures[0].startswith("region last: 0: the rule ForgetRelu at 1")


def test_fuel_and_disabled_rules_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 4, 3), nn.MaxPool3d(2), nn.MaxPool3d(2), nn.ReLU()).eval()
    x = torch.randn(2, 2, 6, 6, 6)
    monkeypatch.setenv("FXFUSE_DISABLE", "ForgetRelu")
    assert fxfuse.verify(None, OptimizedModule(model, Options(rules=(*DEFAULT_RULES, ForgetRelu()))), x).ok
    monkeypatch.setenv("FXFUSE_DISABLE", "ComposeMaxPools")
    nn.init.constant_(model[0].bias, -1.0)
    report = fxfuse.verify(None, OptimizedModule(model, Options(rules=(*DEFAULT_RULES, ForgetRelu()))), x)
    assert [r.broken.application.rule for r in report.regions if r.broken] == ["ForgetRelu"]
    monkeypatch.delenv("FXFUSE_DISABLE")
    monkeypatch.setenv("FXFUSE_FUEL", "1")
    assert fxfuse.verify(None, OptimizedModule(model, Options(rules=(*DEFAULT_RULES, ForgetRelu()))), x).ok


# --- what is not a rule's fault ---------------------------------------------------------------------
def test_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(region: fxfuse.Region, inputs: Sequence[Tensor], key: object = None) -> list[Tensor]:
        return [1.01 * t for t in region.rewritten.run(inputs)]

    model = Block().eval()
    optimised = fxfuse.optimize(model, data())
    monkeypatch.setattr(execute, "run", wrong)
    report = fxfuse.verify(model, optimised, data())
    (region,) = report.regions
    assert not region.ok and region.algebra is not None and region.algebra.ok and region.reference.ok
    assert region.ran.error == pytest.approx(0.01, rel=1e-3)
    assert report.failures[0].startswith(
        "region up: the rewrites are right and its kernels are not; its output is 1.00e-02"
    )
    assert "FXFUSE_KERNELS=0" in report.failures[0]
    assert not report.comparisons[0].ok


def test_a_chain_that_loses_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(fxfuse.Rule):
        """relu(x) = relu(x + c) - c for a large negative c, which float32 does not survive"""

        legality = Legality.REASSOCIATING
        pattern = P("relu", X, name="relu")

        def check(self, match: Match) -> Reject | None:
            return Reject("it is done") if op_of(operands(match["relu"])[0]).name == "sub" else None

        def rewrite(self, match: Match, build: Builder) -> fx.Node:
            (x,) = operands(match["relu"])
            return build.call("relu", build.call("sub", build.call("add", x, 1e3), 1e3))

    model = nn.Sequential(nn.ConvTranspose3d(2, 4, 3), nn.ReLU()).eval()
    optimised = OptimizedModule(model, Options(rules=(Large(),)))
    report = fxfuse.verify(model, optimised, torch.randn(2, 2, 6, 6, 6))
    (region,) = report.regions
    assert not region.ran.ok and region.broken is None
    assert "right in float64, the rewritten chain loses accuracy" in report.failures[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_in_the_input(value: float) -> None:
    x = data()
    x[0, 0, 1, 1, 1] = value
    assert fxfuse.verify(None, fxfuse.optimize(Block().eval()), x).ok


def test_autocast() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 4, 3), nn.MaxPool3d(2), nn.MaxPool3d(2), nn.ReLU()).eval()
    optimised = fxfuse.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        report = fxfuse.verify(model, optimised, torch.randn(2, 2, 6, 6, 6))
    (region,) = report.regions
    assert report.ok and report.truth == "float64" and region.algebra is not None, report
    assert region.algebra.error == 0 and region.ran.own > 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_optimize_passes_what_is_right(training: bool) -> None:
    """For each new set of shapes, and leaving everything as one call leaves it."""
    model, twin = (Block().train(training) for _ in range(2))
    optimised: Any = fxfuse.optimize(model, verify=True)
    for size in (3, 4, 4, 5):
        x = data(2, 2, size, 3, 3)
        with torch.no_grad():
            assert_same(optimised(x), twin(x))
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    specials = [s for e in next(iter(optimised._fxfuse_runtime._entries.values())) for s in e.specialisations.values()]
    assert len(specials) == 3 and all(s.verified for s in specials)
