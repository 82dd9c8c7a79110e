"""`fxfuse.verify`: outputs, gradients, what is written to; and that nothing is left changed."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from agreement import Block, assert_same, data
from torch import Tensor, nn

import fxfuse
from fxfuse import dynamo
from fxfuse.models import ScaleNormPool
from fxfuse.state import State
from fxfuse.verification import Kind, VerifyReport


class Function(nn.Module):
    """A function with a Block of parameters, which it is given."""

    def __init__(self, function: Callable[..., Any], block: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block or Block().eval()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.block, *args, **kwargs)


def against(right: Callable[..., Any], wrong: Callable[..., Any], *args: Any, **kwargs: Any) -> VerifyReport:
    """The report on two functions of the same block."""
    one = Function(right)
    return fxfuse.verify(one, Function(wrong, copy.deepcopy(one.block)), *args, **kwargs)


def named(report: VerifyReport) -> dict[str, Any]:
    return {c.what: c for c in report.comparisons}


# --- what is right ----------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_optimize_returns(dtype: torch.dtype, training: bool) -> None:
    model = Block().to(dtype).train(training)
    report = fxfuse.verify(None, fxfuse.optimize(model), data(dtype=dtype).requires_grad_())
    assert report.ok and report.truth == "float64" and not report.failures, report
    report.raise_for_failure()
    assert [r.path.value for r in report.regions if r.path] == ["rewritten"]
    kinds = {k: [c.what for c in report.comparisons if c.kind is k] for k in Kind}
    assert kinds[Kind.OUTPUT] == ["output", "output, with gradients"]
    assert {f"gradient of {n}" for n, _ in model.named_parameters()} - {*kinds[Kind.GRADIENT]} == {"gradient of unused"}
    assert "gradient of input 0" in kinds[Kind.GRADIENT]
    buffers = ["running_mean", "running_var", "num_batches_tracked"] if training else []
    assert [w for w in kinds[Kind.STATE] if "with gradients" not in w] == [f"norm.{b} afterwards" for b in buffers]


def test_submodules_and_torch_compile() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (
                Block().eval(),
                nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU(), nn.MaxPool3d(2)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))  # type: ignore[no-any-return]

    model = Two()
    report = fxfuse.verify(None, fxfuse.optimize(model, submodules=["first", "last"]), data())
    assert report.ok and [r.anchor for r in report.regions] == ["first: up", "last: 0"], report
    compiled: Any = torch.compile(model, backend=dynamo.backend, options={"remainder": "eager"})
    report = fxfuse.verify(None, compiled, data())
    assert report.ok and not report.notes and "gradient of first.up.weight" in named(report), report


def test_everything_is_left_as_it_was() -> None:
    model = Block().train()
    optimised = fxfuse.optimize(model)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    x = data().requires_grad_()
    kept, before = x.detach().clone(), copy.deepcopy(model.state_dict())
    state = State(model, [x])
    versions = {n: t._version for n, t in model.state_dict(keep_vars=True).items()}
    assert fxfuse.verify(model, optimised, x).ok
    assert not state.draws() and not state.draws_elsewhere() and not state.attributes.changed()
    assert_same(dict(model.state_dict()), dict(before))
    assert versions == {n: t._version for n, t in model.state_dict(keep_vars=True).items()}
    assert torch.equal(x, kept) and x.grad is None and model.training and optimised.training
    assert torch.equal(model.up.weight.grad, torch.ones_like(model.up.weight))
    assert [p.grad for p in (model.up.bias, model.head.weight)] == [None, None]


def test_without_gradients() -> None:
    optimised = fxfuse.optimize(Block().eval())
    with torch.no_grad():
        report = fxfuse.verify(None, optimised, data())
    assert report.ok and {c.kind for c in report.comparisons} == {Kind.OUTPUT}
    assert "gradients were not compared" in str(report)
    model = Block().eval().requires_grad_(False)
    report = fxfuse.verify(None, fxfuse.optimize(model), data())
    assert {c.kind for c in report.comparisons} == {Kind.OUTPUT}


def test_a_gradient_that_cancels() -> None:
    """A bias before BatchNorm in train mode has a gradient of zero, of which eager mode makes noise."""
    model = nn.Sequential(nn.ConvTranspose3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
    for seed in range(4):
        torch.manual_seed(seed)
        report = fxfuse.verify(None, fxfuse.optimize(model), data())
        found = named(report)["gradient of 0.bias"]
        assert report.ok and found.own > 1, report
    assert "it cancels to 0" in str(report)


def test_the_mean_that_needs_no_convolution() -> None:
    report = fxfuse.verify(None, fxfuse.optimize(ScaleNormPool().eval()), torch.randn(1, 64, 3, 4, 4))
    assert report.ok and "conv_transpose" not in report.regions[0].stages, report


# --- what is wrong ----------------------------------------------------------------------------------
def test_a_wrong_element() -> None:
    def wrong(block: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = block(x)
        return torch.cat([y[:1], y[1:] + F.pad(torch.ones(1, 1, 1, 1, 1), (2, 4, 1, 5, 0, 6, 1, 0))])

    report = against(lambda block, x: block(x), wrong, data())
    assert not report.ok and report.failures[0].startswith("output is ")
    assert named(report)["output"].worst[0].index == (1, 1, 0, 1, 2)
    with pytest.raises(fxfuse.VerificationError, match=r"compared with float64: output is .* from the truth") as caught:
        report.raise_for_failure()
    assert caught.value.report is report
    assert "NOT verified" in str(report) and "worst elements of output" in str(report) and "FAILED" in str(report)


class Doubled(torch.autograd.Function):
    """y = x, of which the gradient is twice too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def test_a_wrong_gradient() -> None:
    report = against(lambda block, x: block(x), lambda block, x: Doubled.apply(block(x)), data())
    assert named(report)["output"].ok and named(report)["output, with gradients"].ok
    wrong = [c for c in report.comparisons if not c.ok]
    assert {c.kind for c in wrong} == {Kind.GRADIENT} and len(wrong) == 6
    assert all(c.error == pytest.approx(1, abs=1e-4) for c in wrong)


def test_a_missing_gradient() -> None:
    report = against(lambda block, x: block(x), lambda block, x: block(x).detach().requires_grad_(), data())
    assert "gradient of block.up.weight: no gradient arrives where the original has one" in report.failures
    report = against(lambda block, x: block(x).detach().requires_grad_(), lambda block, x: block(x), data())
    assert "gradient of block.up.weight: a gradient arrives where the original has none" in report.failures


def test_inf_for_nan() -> None:
    """It counts, unless an input or a parameter holds some already."""

    def filled(value: float) -> Callable[..., Tensor]:
        return lambda block, x: torch.where(x > 0, x, value)

    x = data()
    assert against(filled(float("inf")), filled(float("inf")), x).ok
    assert not against(filled(float("inf")), filled(float("nan")), x).ok
    x[0, 0, 0, 0, 0] = float("nan")
    assert against(filled(float("inf")), filled(float("nan")), x).ok
    assert not against(filled(float("inf")), filled(7.0), x).ok


def test_wrong_buffers() -> None:
    def wrong(block: Any, x: Tensor) -> Tensor:
        y: Tensor = block(x)
        block.norm.running_var.mul_(1.01)
        block.norm.num_batches_tracked.add_(1)
        return y

    def writes(block: Any, x: Tensor) -> Tensor:
        block.offset.add_(1)
        return x

    one = Function(lambda block, x: block(x), Block().train())
    report = fxfuse.verify(one, Function(wrong, copy.deepcopy(one.block)), data())
    found = named(report)
    assert found["output"].ok and found["block.norm.running_mean afterwards"].ok
    assert found["block.norm.running_var afterwards"].error == pytest.approx(0.01, rel=1e-2)
    assert found["block.norm.num_batches_tracked afterwards"].reason == (
        "block.norm.num_batches_tracked afterwards: 1 element has another value"
    )
    report = against(lambda block, x: x, writes, data())
    reason = "the optimised model writes to it, the original does not"
    assert report.failures == [f"block.offset afterwards{s}: {reason}" for s in ("", ", with gradients")]


def test_results_that_are_buffers() -> None:
    """They are compared as they were returned, not as they are when the model is put back."""

    def returns(add: float) -> Callable[..., Tensor]:
        return lambda block, x: block.offset.add_(add)

    assert against(returns(1.0), returns(1.0), data()).ok
    assert not named(against(returns(1.0), returns(1.1), data()))["output"].ok


def test_a_failing_model() -> None:
    def fails(block: Any, x: Tensor) -> Tensor:
        y = block.up(x).sigmoid()
        if torch.is_grad_enabled():
            return y.mul_(2)
        raise ValueError("as planned")

    report = against(lambda block, x: block.up(x).sigmoid() * 2, fails, data())
    assert report.problems[0] == "a forward of the optimised model fails with ValueError: as planned"
    assert report.problems[1].startswith("a backward or forward of the optimised model fails with RuntimeError: one of")
    with pytest.raises(ValueError, match="as planned"):
        against(fails, fails, data())


def test_inputs_that_are_written_to() -> None:
    report = against(lambda block, x: x.relu_() + 1, lambda block, x: x.relu() + 1, data())
    assert named(report)["output"].ok
    assert "input 0 afterwards: the original writes to it, the optimised model does not" in report.failures


@dataclasses.dataclass
class Result:
    logits: Tensor
    chosen: Tensor
    more: tuple[float, str]


def test_nested_results() -> None:
    def of(add: int = 0, name: str = "b") -> Callable[..., Any]:
        def function(block: nn.Module, x: Tensor, *, scale: float) -> Any:
            y = block(x) * scale
            return {"a": [Result(y, y.argmax(1) + add, (scale, name))], "empty": None}

        return function

    assert against(of(), of(), data(), scale=2.0).ok
    report = against(of(), of(add=1), data(), scale=2.0)
    wrong = [c for c in report.comparisons if not c.ok]
    assert {c.what for c in wrong} == {f"output['a'][0].chosen{s}" for s in ("", ", with gradients")}
    assert all(c.mismatches == data()[:, 0].numel() * 7**3 // 4**3 for c in wrong)
    report = against(of(), of(name="c"), data(), scale=2.0)
    assert "output['a'][0].more[1]: 'c' where the model gives 'b'" in report.failures
    report = against(of(), lambda block, x, scale: [block(x) * scale], data(), scale=2.0)
    assert "output[0]: the original has no such output" in report.failures
    assert "output['a'][0].logits: the optimised model has no such output" in report.failures


def test_random_numbers() -> None:
    def drops(block: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(block(x), 0.5)

    report = against(drops, drops, data())
    assert report.ok and report.truth == "eager mode (it draws random numbers)"
    report = against(lambda block, x: block(x), lambda block, x: (torch.rand(1), block(x))[1], data())
    assert not report.ok and report.failures == [
        "it draws other random numbers than the original",
        "it draws other random numbers than the original, with gradients",
    ]
    assert not against(drops, lambda block, x: block(x), data()).ok


def test_attributes() -> None:
    def counts(block: Any, x: Tensor) -> Any:
        block.calls = getattr(block, "calls", 0) + 1
        return block(x)

    report = against(lambda block, x: block(x), counts, data())
    assert report.failures[0] == "a call changes the attributes calls in one of the two models"
    assert against(counts, counts, data()).ok


def test_a_model_that_does_not_run_in_float64() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(2, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x.float()).relu()  # type: ignore[no-any-return]

    report = fxfuse.verify(None, fxfuse.optimize(Casts()), data())
    assert report.ok and report.truth.startswith("eager mode (it does not run in float64: ")
    assert {c.own for c in report.comparisons} == {0.0}


def test_what_cannot_be_compared() -> None:
    model = Block()
    with pytest.raises(TypeError, match=r"needs a result of optimize\(\)"):
        fxfuse.verify(None, model, data())
    with pytest.raises(TypeError, match="optimised is a function"):
        fxfuse.verify(model, lambda x: x, data())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="original is a int"):
        fxfuse.verify(3, model, data())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the same module"):
        fxfuse.verify(fxfuse.optimize(model), model, data())
    assert "no region of fxfuse ran" in str(fxfuse.verify(model, copy.deepcopy(model), data()))


def test_generators_are_left_where_an_error_is_raised() -> None:
    def fails(block: nn.Module, x: Tensor) -> Tensor:
        torch.rand(1), random.random(), numpy.random.rand()
        block.register_buffer("made", torch.ones(1))
        raise RuntimeError("as planned")

    one, other, x = Function(fails), Function(fails), data()
    state = State(one)
    with pytest.raises(RuntimeError, match="as planned"):
        fxfuse.verify(one, other, x)
    assert not state.draws() and not state.draws_elsewhere() and not state.attributes.changed()


def test_a_long_table_is_cut() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU(), *(nn.Conv3d(2, 2, 1) for _ in range(20)))
    text = str(fxfuse.verify(None, fxfuse.optimize(model), data()))
    assert text.count("gradient of") == 6 and "36 more of kind 'gradient'" in text
