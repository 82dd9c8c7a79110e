"""What regions take in front of their anchors, and what stays outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grown import SAME, agree, chain, chains_of, ended
from strategies import Chain
from torch import Tensor, nn

import fxfuse
from fxfuse import prologue

FIRST = "nn.Conv2d(2, 2, 3, padding=1)"


def front(*lines: str, modules: tuple[str, ...] = (), train: bool = False) -> Chain:
    """A model, the last of whose ``modules`` is the anchor, which ``lines`` call as ``up``."""
    last = len(modules)
    model = chain(*(line.replace("up(", f"self.m{last}(") for line in lines), modules=(*modules, SAME), train=train)
    return Chain(**{**vars(model), "lines": model.lines[1:]})  # all of them are given


# --- what is taken --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "regions"),
    [
        (front("v0 = x.relu()", "v1 = up(v0)", "return v1"), ["relu > conv_transpose"]),
        (
            front("v0 = F.avg_pool2d(x.exp(), 2)", "v1 = up(v0) + 1", "return v1"),
            ["exp > avg_pool > conv_transpose > add"],
        ),
        (front("v0 = F.max_pool2d(x, 2)", "v1 = up(v0)", "return v1"), ["max_pool > conv_transpose"]),
        # a value that is read several times, by members alone
        (
            front("v0 = x + 1", "v1 = v0 * v0.sigmoid()", "v2 = up(v1)", "return v2"),
            ["add > sigmoid > mul > conv_transpose"],
        ),
        # two branches, of which only one leads nowhere else
        (
            front("s = x.atan()", "v0 = x.relu() + s.tanh() + s", "v1 = up(v0)", "return v1 + s"),
            ["relu > tanh > add > add > conv_transpose > add"],
        ),
        # norms, but for those that update statistics
        (
            front("v0 = self.m0(x).relu()", "v1 = up(v0)", "return v1", modules=("nn.InstanceNorm2d(2)",)),
            ["instance_norm > relu > conv_transpose"],
        ),
        (
            front("v0 = self.m0(x).relu()", "v1 = up(v0)", "return v1", modules=("nn.BatchNorm2d(2)",)),
            ["batch_norm > relu > conv_transpose"],
        ),
        (
            front("v0 = self.m0(x).relu()", "v1 = up(v0)", "return v1", modules=("nn.BatchNorm2d(2)",), train=True),
            ["relu > conv_transpose"],
        ),
        # operators of the vocabulary that are none of these, and others
        (front("v0 = x.softmax(1)", "v1 = up(v0)", "return v1"), ["conv_transpose"]),
        (front("v0 = x.cumsum(0).relu()", "v1 = up(v0)", "return v1"), ["relu > conv_transpose"]),
        (front("v0 = F.dropout(x, 0.5, True) * 2", "v1 = up(v0)", "return v1"), ["mul > conv_transpose"]),
        # what belongs to the region in front of it
        (
            front("v0 = self.m0(x).relu()", "v1 = up(v0 + x)", "return v1", modules=(SAME,)),
            ["conv_transpose > relu > add", "conv_transpose"],
        ),
        # a value that others read, too
        (front("v0 = x.relu()", "v1 = up(v0)", "return v1, v0"), ["conv_transpose"]),
        (front("v0 = x.relu()", "v1 = v0.abs()", "v2 = up(v1) + v0", "return v2"), ["abs > conv_transpose > add"]),
        (
            front("v0 = x.relu()", "v1 = self.m0(v0) + up(v0)", "return v1", modules=(SAME,)),
            ["conv_transpose > add", "conv_transpose"],
        ),
        # parameters of the anchor are none of its input
        (
            front("v0 = x.relu()", "v1 = F.conv_transpose2d(v0, self.m0.weight.exp())", "return v1", modules=(SAME,)),
            ["relu > conv_transpose"],
        ),
    ],
)  # fmt: skip
def test_what_is_taken(model: Chain, regions: list[str]) -> None:
    assert chains_of(agree(model.make()[0])) == regions


# --- writing in place, and the order of effects ---------------------------------------------------
@pytest.mark.parametrize(
    ("model", "regions"),
    [
        # to what an operator of torch has just made
        (
            front("v0 = self.m1(self.m0(x))", "v1 = up(v0)", "return v1", modules=(FIRST, "nn.ReLU(inplace=True)")),
            ["relu > conv_transpose"],
        ),
        (
            front("v0 = x.cumsum(0).relu_().mul_(2)", "v1 = up(v0)", "return v1"),
            ["relu > mul > conv_transpose"],
        ),
        (front("v0 = x + 1", "v0 *= 2", "v1 = up(v0)", "return v1"), ["add > mul > conv_transpose"]),
        (
            front("s = x.cumsum(0)", "v0 = s.mean()", "s.relu_()", "v1 = up(s) * v0", "return v1"),
            ["relu > conv_transpose > mul"],
        ),
        # to the caller's, to parameters, to what is read later
        (front("x.relu_()", "v1 = up(x)", "return v1"), ["conv_transpose"]),
        (front("v0 = (x * 1)[:]", "v0.relu_()", "v1 = up(v0)", "return v1"), ["conv_transpose"]),
        (front("s = x.cumsum(0)", "v0 = s.relu_()", "v1 = up(v0) + s", "return v1"), ["conv_transpose > add"]),
        (
            front("s = x.cumsum(0)", "t = s[:]", "v0 = s.relu_()", "v1 = up(v0)", "return v1, t"),
            ["conv_transpose"],
        ),
        # a later write to what it reads: the region may not wait for what waits for it
        (
            front("s = x * 2", "v0 = s.relu()", "s.add_(1)", "v1 = up(v0)", "v2 = v1 + s", "return v2"),
            ["relu > conv_transpose"],
        ),
        (
            front("s = x * 2", "v0 = s.relu()", "s.add_(1)", "v1 = F.conv_transpose2d(v0, s[..., :1])", "return v1"),
            ["conv_transpose"],
        ),
        # a value that shares memory
        (
            front("s = x * 2", "v0 = s.detach().contiguous()", "s.add_(1)", "v1 = up(v0)", "return v1, s"),
            ["conv_transpose"],
        ),
    ],
)  # fmt: skip
def test_effects(model: Chain, regions: list[str]) -> None:
    assert chains_of(agree(model.make()[0])) == regions


def test_a_write_between_a_prologue_and_its_anchor() -> None:
    """What the region reads must be as it was where the model read it."""
    report = agree(
        front("s = x * 2", "v0 = s.relu()", "s.add_(1)", "v1 = up(v0)", "v2 = v1 + s", "return v2").make()[0]
    )
    assert ended(report)["add"] == "it also needs add_, which comes after the region"


_kept: list[Tensor] = []


@torch.fx.wrap
def _keeps(x: Tensor) -> Tensor:
    _kept.append(x * 2)
    return _kept[-1]


@torch.library.custom_op("fxfuse_tests::keeps", mutates_args=())
def _keeps_too(x: Tensor) -> Tensor:
    _kept.append(x * 2)
    return _kept[-1]


@_keeps_too.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Keeps:
    """A function of somebody, whatever module it says it is of."""

    __module__ = "torch.somewhere"

    def __call__(self, x: Tensor) -> Tensor:
        return _keeps(x)


def test_what_is_called_like_torchs() -> None:
    assert prologue._is_torchs(torch.relu) and prologue._is_torchs(torch.ops.aten.relu.default)
    assert not prologue._is_torchs(_Keeps())


@pytest.mark.parametrize(
    "keeps", [lambda x: _keeps(x), torch.ops.fxfuse_tests.keeps, torch.ops.fxfuse_tests.keeps.default, _keeps_too]
)
def test_memory_that_a_function_keeps(keeps: Callable[[Tensor], Tensor]) -> None:
    """Nothing tells that somebody will look at it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.up = nn.ReLU(inplace=True), nn.ConvTranspose2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.relu(keeps(x)))

    model, x = Model().double(), torch.randn(2, 2, 4, 5).double()
    optimized = fxfuse.optimize(model, (x,))
    assert chains_of(optimized.fxfuse_report) == ["conv_transpose"]
    with torch.no_grad():
        optimized(x)
    assert torch.equal(_kept[-1], (x * 2).relu())


def test_a_prologue_that_cannot_be_built() -> None:
    """What comes behind it is taken all the same."""
    model = front("v0 = x.lt_(1)", "v1 = up((v0 + 1).relu())", "return v1")
    report = agree(Chain(**{**vars(model), "lines": ("v0 = x.clone()", "v0.lt_(1)", *model.lines[1:])}).make()[0])
    assert chains_of(report) == ["add > relu > conv_transpose"]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_autocast_of_an_input_that_is_narrow_already(kind: torch.dtype) -> None:
    """Weights of float32 are cast: fake tensors would convolve both as they are."""
    model = nn.Sequential(nn.ReLU(), nn.ConvTranspose3d(4, 4, 2, 2), nn.ConvTranspose3d(4, 4, 2, 2), nn.Tanh())
    x = torch.randn(2, 4, 4, 4, 4).to(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        optimized = fxfuse.optimize(model, (x,))
        assert torch.equal(optimized(x), model(x))
    assert len(optimized.fxfuse_report.regions) == 2
