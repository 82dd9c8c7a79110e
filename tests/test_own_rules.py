"""Rules of a caller's own, passed to optimize and to torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxfuse
from fxfuse import Legality, Report, Rule, dynamo
from fxfuse.ops import watch
from fxfuse.patterns import Builder, Match, P, Pat, Reject, X, dtype, operands


class Swish(Rule):
    """x * sigmoid(x) = silu(x)"""

    legality = Legality.REASSOCIATING
    pattern = P("mul", Pat(name="x"), P("sigmoid", Pat(name="x")), commutative=True)

    def check(self, match: Match) -> Reject | None:
        if dtype(match["x"]) is torch.float64:
            return Reject("not in float64", match["x"])
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build.call("silu", match["x"])


class Grow(Rule):
    """sigmoid(x) = sigmoid(x) * 1, again and again"""

    legality = Legality.BITWISE
    pattern = P("sigmoid", X)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build.call("mul", build.call("sigmoid", operands(match.root)[0]), 1.0)


class Fails(Swish):
    """a rule that raises, half of its replacement made"""

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        build.call("silu", match["x"])
        raise ZeroDivisionError("no luck")


class Edits(Swish):
    """a rule that changes the chain itself"""

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        match.root.args = (match["x"], 3.0)
        return match["x"]


class Wrong(Swish):
    """x * sigmoid(x) = relu(x), which is not true"""

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build.call("relu", match["x"])


class BeforeTheFold(Rule):
    """conv(x) * s seen before it folds"""

    legality = Legality.BITWISE
    pattern = P("mul", P("conv_transpose"))
    seen: list[str]

    def check(self, match: Match) -> Reject | None:
        self.seen.append("seen")
        return Reject("it only looks")

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        raise AssertionError


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


class Up(nn.Module):
    """A scaled transposed convolution, a swish as models spell it, and a relu too many."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * 2.0
        return torch.relu(torch.relu(y * torch.sigmoid(y)))


SWISHED, PLAIN = "conv_transpose > silu > relu", "conv_transpose > sigmoid > mul > relu"
FOLD, MERGE = "FoldScaleIntoConvTranspose", "MergeClamps"


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    return Up().eval()


@pytest.fixture
def x() -> Iterator[Tensor]:
    yield torch.randn(1, 2, 3, 4, 5)
    torch._dynamo.reset()


def stages(report: Report) -> str:
    return " > ".join(report.regions[0].visible_stages)


def fired(report: Report) -> list[str]:
    return [r.rule for r in report.rules]


def test_a_rule_is_applied_and_named_with_its_identity(model: nn.Module, x: Tensor) -> None:
    fast = fxfuse.optimize(model, x, rules=[Swish()], verify=True)
    report = fast.fxfuse_report
    assert stages(report) == SWISHED and fired(report) == ["Swish", MERGE, FOLD]
    assert "Swish: x * sigmoid(x) = silu(x)" in str(report)
    with torch.no_grad(), watch() as runs:
        torch.testing.assert_close(fast(x), model(x))
    assert len(runs) == 1 and "silu" in runs[0].region.text
    assert stages(fxfuse.optimize(model, x).fxfuse_report) == PLAIN
    assert stages(fxfuse.explain(fast, x)) == SWISHED
    assert stages(fxfuse.explain(model, x)) == PLAIN


def test_gradients_are_those_of_the_chain_as_written(model: nn.Module, x: Tensor) -> None:
    """The backward differentiates the model's own chain, whatever a rule made of the forward."""
    fast = fxfuse.optimize(model, x, rules=[Swish()])
    for module in (model, fast):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        if module is model:
            expected, weight = given.grad, model.up.weight.grad
            model.zero_grad()
    torch.testing.assert_close(given.grad, expected)
    torch.testing.assert_close(model.up.weight.grad, weight)


def test_own_rules_come_first(x: Tensor) -> None:
    """A scale behind the convolution is there to be seen, before the built-in rule folds it."""
    rule = BeforeTheFold()
    rule.seen = []
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 3), Doubled())
    report = fxfuse.optimize(model, x, rules=[rule]).fxfuse_report
    assert rule.seen == ["seen"] and fired(report) == [FOLD]


def test_a_refusal_is_a_near_miss(model: nn.Module, x: Tensor) -> None:
    report = fxfuse.optimize(model.double(), x.double(), rules=[Swish()]).fxfuse_report
    assert stages(report) == PLAIN
    assert [(r.node, r.reason) for r in report.rejected if r.rule == "Swish"] == [("mul", "not in float64")]


def test_a_class_that_is_not_allowed(model: nn.Module, x: Tensor) -> None:
    report = fxfuse.optimize(model, x, rules=[Swish()], allow={"bitwise"}).fxfuse_report
    reasons = {r.rule: r.reason for r in report.rejected}
    assert reasons["Swish"] == "it is reassociating: pass allow={..., 'reassociating'} to permit it"
    assert fired(report) == [MERGE]


def test_a_rule_is_switched_off_by_name(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DISABLE", "Swish")
    report = fxfuse.optimize(model, x, rules=[Swish()]).fxfuse_report
    assert stages(report) == PLAIN and report.rejected[0].reason == "switched off by FXFUSE_DISABLE"


# --- defects --------------------------------------------------------------------------------------
@pytest.mark.defective
def test_a_rule_without_an_end_leaves_the_chain_as_written(
    model: nn.Module, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    fast = fxfuse.optimize(model, x, rules=[Grow()])
    report = fast.fxfuse_report
    (rejection,) = report.rejected
    assert (rejection.rule, rejection.node) == ("the rewriting", "up")
    assert rejection.reason.endswith("this rule matches again what it makes: Grow") and not report.rules
    assert report.regions[0].region.rewritten == report.regions[0].region.original
    assert "rules are defective, and the chain of up goes on as it was written: no end after" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.defective
def test_a_rule_that_raises_is_left_out(model: nn.Module, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    fast = fxfuse.optimize(model, x, rules=[Fails()])
    report = fast.fxfuse_report
    assert fired(report) == [MERGE, FOLD] and stages(report) == PLAIN
    assert [(r.node, r.reason) for r in report.rejected if r.rule == "Fails"] == [
        ("mul_1", "the rule is defective: ZeroDivisionError: no luck")
    ]
    assert caplog.text.count("the rule Fails is defective at mul_1: ZeroDivisionError: no luck") == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.defective
def test_a_rule_that_edits_leaves_the_chain_as_written(model: nn.Module, x: Tensor) -> None:
    fast = fxfuse.optimize(model, x, rules=[Edits()])
    (rejection,) = fast.fxfuse_report.rejected
    assert rejection.reason.startswith("the rule Edits edited mul_1, a node of the chain")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_a_wrong_identity_is_found_by_verify(model: nn.Module, x: Tensor) -> None:
    fast = fxfuse.optimize(model, rules=[Wrong()], verify=True)
    with pytest.raises(fxfuse.VerificationError):
        fast(x)


# --- nothing is shared between other rules --------------------------------------------------------
def test_models_with_other_rules_share_nothing(model: nn.Module, x: Tensor) -> None:
    """Both optimise one model, and run by turns, in several shapes."""
    plain, swished = fxfuse.optimize(model, x), fxfuse.optimize(model, x, rules=[Swish()])
    for shape in (x.shape, (2, 2, 4, 4, 4)):
        for fast, marker in ((plain, False), (swished, True), (plain, False)):
            with torch.no_grad(), watch() as runs:
                fast(torch.randn(shape))
            assert ["silu" in r.region.text for r in runs] == [marker]


def test_copies_and_parts_keep_the_rules(model: nn.Module, x: Tensor) -> None:
    whole = copy.deepcopy(fxfuse.optimize(model, x, rules=[Swish()]))
    parts = fxfuse.optimize(nn.Sequential(model), x, rules=[Swish()], submodules=["0"])
    for fast in (whole, parts):
        fast(x)
        assert stages(fast.fxfuse_report) == SWISHED


@pytest.mark.parametrize("how", ["options", "function"])
def test_torch_compile_tells_rules_apart(how: str, model: nn.Module, x: Tensor) -> None:
    """Graphs that were compiled with other rules are not used again, whichever came first."""

    def compiled(rules: Sequence[Rule] | None) -> Callable[..., Any]:
        options: dict[str, Any] = {"remainder": "eager"} | ({} if rules is None else {"rules": rules})
        if how == "options":
            return torch.compile(model, backend=dynamo.backend, options=options)
        return torch.compile(model, backend=functools.partial(dynamo.backend, options=options))

    with torch.no_grad():
        expected = model(x)
        for rules, wanted in ((None, PLAIN), ([Swish()], SWISHED), ([], PLAIN), ((Swish(),), SWISHED)):
            torch.testing.assert_close(compiled(rules)(x), expected)
            assert stages(dynamo.reports()[-1]) == wanted


# --- wrong values ---------------------------------------------------------------------------------
def test_wrong_values_are_named(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"rules holds the class Swish; pass an instance, rules=\[Swish\(\)\]"):
        fxfuse.optimize(model, x, rules=[Swish])
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="TypeError: rules must be a list of rules"):
        torch.compile(model, backend=dynamo.backend, options={"remainder": "eager", "rules": "Swish"})(x)
