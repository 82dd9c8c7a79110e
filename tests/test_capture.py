"""Captures of awkward models: each is followed exactly, or left alone with a reason."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agree
from torch import Tensor, nn

TRACED, EXPORTED, ALONE = "captured with torch.fx.symbolic_trace", "captured with torch.export", "left alone"

CASES: list[Any] = []


def case(how: str, *notes: str, call: Callable[[], tuple[Any, ...]] | None = None, **kwargs: Any) -> Any:
    """Register a model class: how it is captured, and what the report's notes say."""

    def enter(kind: type[nn.Module]) -> type[nn.Module]:
        CASES.append(pytest.param(kind, call or volume, kwargs, how, notes, id=kind.__name__))
        return kind

    return enter


def volume(*shape: int, grad: bool = True) -> tuple[Tensor]:
    return (torch.randn(shape or (2, 2, 3, 3, 3), dtype=torch.float64, requires_grad=grad),)


class Up(nn.Module):
    """A transposed convolution; the cases add what makes them awkward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.up = nn.ConvTranspose3d(2, 3, 2, stride=2, dtype=torch.float64)


# --- control flow ---------------------------------------------------------------------------------
@case(ALONE, r"symbolic_trace refused: the forward decides by the value", r"torch.export refused: .*data-dependent")
class DataDependent(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y * 2 if y.sum() > 0 else y


@case(EXPORTED, r"symbolic_trace refused: the forward decides by the value or the size of a tensor")
class ShapeDependent(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu() if x.shape[0] > 1 else self.up(x)


@case(EXPORTED, r"asks with isinstance what a value is")
class JitIsinstance(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if torch.jit.isinstance(y, Tensor):
            y = torch.cat([y, y * 2], 1)
        return y


@case(EXPORTED, r"asks with isinstance what a value is")
class IsinstanceThatMattersLater(Up):
    """A trace would agree for small batches, and go wrong for larger ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if isinstance(x, Tensor) and x.shape[0] > 2:
            y = y * 3
        return y


@case(EXPORTED, r"asks with isinstance what a value is")
class IsinstanceOfSize(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * (2.0 if isinstance(x.shape[0], int) else 3.0)


@case(EXPORTED, r"asks with isinstance what a value is")
class MatchesClass(Up):
    def forward(self, x: Tensor) -> Tensor:
        match self.up(x):
            case Tensor() as y:
                return y * 2
            case y:
                return y


@case(TRACED)
class TorchMayAsk(Up):
    """Some of torch's operators ask too, in the name of their caller."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return torch.where(y > 0, y, 0.0)


@case(EXPORTED, r"symbolic_trace refused: the forward iterates over a tensor or its shape")
class IterateShape(Up):
    def forward(self, x: Tensor) -> Tensor:
        n, _, *space = x.shape
        return self.up(x).reshape(n, -1, math.prod(space)).mean(1)


@case(TRACED)
class SizesInside(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y.reshape(y.shape[0], -1) / y.size(1)


@case(EXPORTED, r"symbolic_trace refused: the forward decides by the value or the size of a tensor")
class Swallows(Up):
    """A trace fails where the model does not, and the model hides it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        with contextlib.suppress(Exception):
            if x.shape[0] == 2:
                y = y + 1
        return y


# --- modes ----------------------------------------------------------------------------------------
@case(ALONE, r"changes grad mode or autocast", r"control flow or nested graphs")
class NoGradInside(Up):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.up(x).mean()
        return self.up(x) * scale


@case(ALONE, r"changes grad mode or autocast", r"control flow or nested graphs")
class AutocastInside(Up):
    def __init__(self) -> None:
        super().__init__()
        self.float()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.up(x.float())
        return y.double()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@case(ALONE, r"calls Straight, whose backward a graph would lose")
class CustomFunction(Up):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(self.up(x) * 4)


@case(TRACED)
class Detached(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y * y.detach().sigmoid()


@case(ALONE, r"torch.export refused: the forward registers a hook on a tensor")
class TensorHook(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 2)
        return y * 1.5


# --- state ----------------------------------------------------------------------------------------
@case(ALONE, r"left alone: a call changes calls of a module")
class Counts(Up):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.up(x) * self.calls


@case(ALONE, r"left alone: a call changes seen of a module")
class Appends(Up):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        self.seen.append(float(y.detach().sum()))
        return y


@case(ALONE, r"left alone: a call changes running of a module")
class ReplacesBuffer(Up):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        self.running = self.running * 0.9 + y.detach().mean((0, 2, 3, 4)) * 0.1
        return y - self.running.reshape(3, 1, 1, 1)


@case(TRACED)
class WritesBuffer(Up):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        self.running.mul_(0.9).add_(y.detach().mean((0, 2, 3, 4)), alpha=0.1)
        return y - self.running.reshape(3, 1, 1, 1)


@case(TRACED)
class PlainTensorAttribute(Up):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((3, 1, 1, 1), 2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.scale


@case(EXPORTED, r"writes to a tensor that the forward makes anew")
class Accumulates(Up):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64)
        total += self.up(x).mean((0, 2, 3, 4)).detach()
        return total


# --- random numbers -------------------------------------------------------------------------------
@case(EXPORTED, r"draws random numbers that the trace took for a constant")
class RandomConstant(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + torch.randn(3, 1, 1, 1, dtype=torch.float64)


@case(TRACED)
class RandomLike(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return y + torch.rand_like(y) * torch.rand_like(y).sigmoid()


@case(TRACED)
class DropoutInTraining(Up):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.dropout3d(self.up(x), 0.3).relu(), 0.5) * 2


@case(ALONE, r"random numbers of Python or NumPy")
class PythonRandom(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * (1.0 + 0 * random.random())


@case(ALONE, r"random numbers of Python or NumPy")
class NumpyRandom(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * (1.0 + 0 * float(numpy.random.rand()))


# --- weights reached otherwise --------------------------------------------------------------------
@case(EXPORTED, r"computes with a tensor of the model that the trace took for a constant")
class NormOfAWeight(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) / next(self.parameters()).norm()


@case(TRACED)
class FunctionalWeights(Up):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose3d(x, self.up.weight, self.up.bias, stride=2) * self.up.weight.mean()


@case(TRACED)
class ModulesInAList(Up):
    def __init__(self) -> None:
        super().__init__()
        self.stages = [self.up, torch.relu]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class _Helper:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x) * 2


@case(TRACED)
class ModuleInAHelper(Up):
    def __init__(self) -> None:
        super().__init__()
        self.helper = _Helper(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)


@case(TRACED)
class CalledTwice(Up):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu() + self.up(x * 2)


@case(TRACED)
class Scripted(Up):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings(action="ignore"):
            head = nn.Sequential(nn.Conv3d(3, 2, 1, dtype=torch.float64), nn.ReLU()).requires_grad_(False)
            self.head = torch.jit.script(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).relu())


@case(TRACED)
class ParametersInContainers(Up):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(2, 3, 2, 2, 2, dtype=torch.float64)])
        self.named = nn.ParameterDict({"gain": torch.full((3, 1, 1, 1), 2.0, dtype=torch.float64)})

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose3d(x, self.weights[0]) * self.named["gain"]


@case(TRACED)
class MethodAttribute(Up):
    def __init__(self) -> None:
        super().__init__()
        self.run = self._run
        self.act = F.relu

    def _run(self, x: Tensor) -> Tensor:
        return self.act(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


# --- arguments and results ------------------------------------------------------------------------
@case(TRACED, scale=3.0)
class KeywordOnly(Up):
    def forward(self, x: Tensor, *, scale: float, shift: Tensor | None = None) -> Tensor:
        y = self.up(x) * scale
        return y if shift is None else y + shift


@case(TRACED, call=lambda: (*volume(), 2, "relu"))
class Scalars(Up):
    def forward(self, x: Tensor, times: int, act: str) -> Tensor:
        return getattr(F, act)(self.up(x)) * times


@case(TRACED, call=lambda: (volume()[0], volume()[0], 3), b=torch.ones(1, dtype=torch.float64))
class Stars(Up):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.up(args[0] + args[1]) * args[2] + kwargs["b"]


@case(TRACED, call=lambda: ({"x": volume()[0], "more": [volume()[0], None]},))
class Nested(Up):
    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        y = self.up(batch["x"])
        return {"y": [y, (y.relu(), None)], "x": batch["more"][0], "n": 3, "name": "z"}


Pair = namedtuple("Pair", "first second")


@case(TRACED)
class NamedTuple(Up):
    def forward(self, x: Tensor) -> Pair:
        y = self.up(x)
        return Pair(y.relu(), second={"mean": y.mean()})


@dataclasses.dataclass
class Output:
    y: Tensor
    extra: tuple[Tensor, int]
    none: None = None


@case(TRACED)
class Dataclass(Up):
    def forward(self, x: Tensor) -> Output:
        y = self.up(x)
        return Output(y.relu(), (y.sum(), 3))


@case(TRACED)
class TwoResults(Up):
    def forward(self, x: Tensor) -> Any:
        return self.up(x).max(1)


@case(TRACED)
class ReturnsSize(Up):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.up(x), x.shape[2]


@case(TRACED)
class ReturnsInput(Up):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.up(x)


@case(TRACED, call=tuple)
class NoInputs(Up):
    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.ones(1, 2, 2, 2, 2, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.up(self.seed).relu()


@case(ALONE, "an argument of class _Helper", call=lambda: (*volume(), _Helper(nn.Identity())))
class OpaqueArgument(Up):
    def forward(self, x: Tensor, helper: _Helper) -> Tensor:
        return helper(self.up(x))


@case(TRACED, call=lambda: (*volume(), torch.ones(2, dtype=torch.int64)))
class IntegerInput(Up):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.up(x)[index] * index.reshape(2, 1, 1, 1, 1)


# --- memory ---------------------------------------------------------------------------------------
@case(TRACED)
class InPlaceModule(Up):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(x)) * 2


@case(TRACED)
class UsedAfterInPlace(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        before = y * 1.0
        z = y.relu_()
        return y + z * before


@case(TRACED)
class ViewWrittenInPlace(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * 1
        y[:, 0] += 1
        y.view(-1)[:3].mul_(2)
        y[0].zero_()
        return y.tanh()


@case(TRACED)
class DropoutAliases(Up):
    """In eval mode dropout returns its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.same = nn.Identity()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * 1
        z = self.same(self.drop(y))
        z += 1
        return y * z


@case(TRACED, call=lambda: volume(grad=False))
class WritesItsInput(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.clone())
        x.mul_(2)
        return y + self.up(x)


@case(TRACED, call=lambda: (lambda x: (x, x))(volume()[0]))
class SameTensorTwice(Up):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.up(x).relu() * self.up(y)


@case(ALONE, call=lambda: (lambda x: (x, x))(volume(grad=False)[0]))
class SameTensorTwiceWritten(Up):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return self.up(y)


@case(TRACED)
class AugmentedAssignment(Up):
    """``skip`` is written too; as the gain starts at zero, only later calls tell."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * 1
        skip = y
        y += self.gain
        y *= 1 + self.gain
        y -= 0.5 * self.gain
        y /= 1 + self.gain
        self.gain.add_(1)
        return skip * y.detach()


@case(EXPORTED, r"symbolic_trace refused: the forward changes attributes of its modules \(gain\)")
class AugmentedBuffer(Up):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.gain += 1
        return self.up(x) * self.gain


@case(ALONE, r"the forward sets data of a tensor")
class SetsData(Up):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).detach()
        y.data = y.data * 2
        return y


@pytest.mark.parametrize(("kind", "call", "kwargs", "how", "notes"), CASES)
def test_awkward(
    kind: type[nn.Module],
    call: Callable[[], tuple[Any, ...]],
    kwargs: dict[str, Any],
    how: str,
    notes: tuple[str, ...],
) -> None:
    optimized, _ = assert_agree(kind(), call, kwargs, fused=how != ALONE)
    said = "\n".join(optimized.fxfuse_report.notes)
    for note in notes:
        assert re.search(note, said), said
    if how in (TRACED, EXPORTED):
        assert how in said
    else:
        assert "captured with" not in said
