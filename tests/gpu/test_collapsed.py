"""Collapsed means as kernels, on a GPU or an emulated one: sums of any boxes, products, whole models."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs
from stages import LIMIT, Stages, check, made, sample, steps_run
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels import execute
from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.plan import Path
from fxfuse.kernels.runtime import tail_engine
from fxfuse.kernels.stages import collapsed
from fxfuse.kernels.stages.collapsed import Sums, sums_of
from fxfuse.kernels.stages.sources import kind_of
from fxfuse.vocabulary import lookup

pytest.importorskip("cuda.bindings")
pytestmark = needs((8, 0))

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always():
        yield


# --- sums -----------------------------------------------------------------------------------------
def planned(
    x: Tensor, dims: tuple[int, ...], boxes: tuple[tuple[tuple[int, int], ...], ...]
) -> tuple[Sums | None, Tensor]:
    """The step for ``tap_sums`` of x, and what it is in float64."""
    attributes = tuple(lookup("tap_sums").complete({"dims": dims, "boxes": boxes}).items())
    exact = lookup("tap_sums")(x.double(), dims=dims, boxes=boxes)
    kinds = [TensorType(x.dtype, tuple(x.shape)), TensorType(F32, tuple(exact.shape))]
    return sums_of(Instr(("s",), "tap_sums", (Ref("x"),), attributes), kinds[0], x.stride(), kinds[1]), exact


def summed(step: Sums, x: Tensor) -> Tensor:
    values = {"x": x}
    tail_engine.prepare(step, x.device, {}, set())(values)
    return values["s"]


def test_a_result_that_is_there_is_filled() -> None:
    x = sample(2, 3, 4, 5, 6)
    step, exact = planned(x, (2, 3, 4), (((0, 4),), ((0, 5), (1, 5)), ((0, 6),)))
    assert step is not None
    there = torch.full(exact.shape, NAN, device=DEVICE)
    tail_engine.prepare(step, x.device, {}, set())({"x": x, step.stored: there})
    torch.testing.assert_close(there.double(), exact, rtol=1e-5, atol=1e-5)


def drawn(
    pick: random.Random, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...], tuple[tuple[tuple[int, int], ...]]]:
    """A tensor of either memory format, some of its spatial dims, and some boxes along each."""
    spatial = pick.choice([1, 2, 3, 3])
    sizes = [pick.choice([1, 2, 3, 4, 5, 7, 8, 12, 16, 33]) for _ in range(spatial)]
    if pick.random() < 0.15:
        sizes[-1] = pick.choice([300, 514])
    shape = pick.choice([1, 2, 3, 5, 9]), pick.choice([1, 2, 4, 6, 8, 40]), *sizes
    x = torch.randn(shape, device=DEVICE).add_(pick.choice([0.0, 1.0])).to(dtype)
    if pick.random() < 0.5:
        order = [0, *range(2, x.dim()), 1]
        x = torch.empty_strided(shape, dense(shape, "channels_last"), dtype=dtype, device=DEVICE).copy_(x)
        assert x.permute(order).is_contiguous()
    dims = tuple(sorted(pick.sample(range(2, x.dim()), pick.randint(1, spatial))))

    def box(size: int) -> tuple[int, int]:
        low = pick.choice([0, 0, pick.randrange(size)])
        return low, pick.choice([size, pick.randint(low + 1, size)])

    boxes = []
    for d in dims:
        count = pick.choice([1, 2, 3, 5])
        boxes.append((box(shape[d]),) * count if pick.random() < 0.4 else tuple(box(shape[d]) for _ in range(count)))
    return x, dims, tuple(boxes)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_sums_of_any_boxes(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values that are not all finite, too: as the float64 sums of every box, each by itself, have them."""
    pick = random.Random(f"{seed} {dtype}")
    torch.manual_seed(seed)
    for _ in range(12):
        x, dims, boxes = drawn(pick, dtype)
        monkeypatch.setattr(collapsed, "LEAST_SLOT", pick.choice([1, 8, 64, 8192]))
        monkeypatch.setattr(collapsed, "ENOUGH_BLOCKS", pick.choice([1, 4, 64, 1024]))
        step, exact = planned(x, dims, boxes)
        assert step is not None, (x.shape, x.stride(), dims, boxes)
        got = summed(step, x)
        assert got.dtype is F32
        _, most = planned(x.abs(), dims, boxes)
        assert ((got.double() - exact).abs() <= 2e-6 * most).all(), (step, x.shape, x.stride(), dims, boxes)
        assert torch.equal(got, summed(step, x)), "other bits in a second run"
        for value in pick.choices([NAN, INF, -INF], k=2):
            x[tuple(pick.randrange(s) for s in x.shape)] = value
        _, exact = planned(x, dims, boxes)
        got = summed(step, x)
        assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isposinf(), exact.isposinf())
        assert torch.equal(got.isneginf(), exact.isneginf())


def test_sums_of_a_value_that_begins_anywhere() -> None:
    """A slice of a buffer: what is read at once has to be aligned."""
    buffer = sample(2 * 4 * 6 * 8 + 1)
    x = buffer[1:].view(2, 4, 6, 8)
    step, exact = planned(x, (2, 3), (((0, 6),), ((0, 8),)))
    assert step is not None and step.count == 4 and x.data_ptr() % 16
    torch.testing.assert_close(summed(step, x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_values_laid_out_otherwise_than_planned(last: bool) -> None:
    """Torch's operators may lay out what they make in another way than they said."""
    x = sample(2, 8, 5, 6)
    if last:
        x = x.to(memory_format=torch.channels_last)
    step, exact = planned(x, (2,), (((0, 3), (1, 5)),))
    assert step is not None
    other = x.contiguous() if last else x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(summed(step, other).double(), exact, rtol=1e-5, atol=1e-5)


# --- whole chains -----------------------------------------------------------------------------------
def average(y: Tensor) -> Tensor:
    return y.mean((2, 3, 4), keepdim=True)


def flat_average(y: Tensor) -> Tensor:
    return y.mean((2, 3), keepdim=True)


def total(y: Tensor) -> Tensor:
    return y.sum((2, 3, 4))


def trained(channels: int, dims: int) -> nn.Module:
    """BatchNorm with statistics and factors that are not those of a new one."""
    norm: nn.Module = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels).to(DEVICE)
    with torch.no_grad():
        norm.running_mean.normal_()
        for each in (norm.running_var, norm.weight):
            each.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


Then = Sequence[nn.Module | Callable[[Tensor], Tensor]]
#: the convolution, what follows, the shape of x
CASES: dict[str, tuple[Callable[[torch.dtype], nn.Module], Callable[[], Then], tuple[int, ...]]] = {
    "scale, batch norm, average": (
        lambda t: made(3, 8, 10, 5, dtype=t),
        lambda: [lambda y: y * 2.0, trained(10, 3), average],
        (3, 8, 4, 5, 6),
    ),
    "padding, groups": (
        lambda t: made(3, 6, 8, (3, 4, 2), padding=(1, 2, 0), groups=2, dtype=t), lambda: [average], (2, 6, 4, 5, 7),
    ),
    "stride, dilation, a sum without dims": (
        lambda t: made(3, 4, 6, 3, stride=(2, 1, 3), padding=1, dilation=(1, 2, 1), dtype=t),
        lambda: [total],
        (9, 4, 3, 4, 5),
    ),
    "one channel each, one sample": (
        lambda t: made(3, 1, 1, 2, stride=2, bias=False, dtype=t), lambda: [average], (1, 1, 3, 3, 3),
    ),
    "two dims": (
        lambda t: made(2, 5, 7, 4, stride=2, padding=1, output_padding=1, dtype=t),
        lambda: [lambda y: y / 3, lambda y: flat_average(y) + 1, torch.sigmoid],
        (4, 5, 9, 8),
    ),
    "one dim": (lambda t: made(1, 16, 12, 3, padding=1, dtype=t), lambda: [lambda y: y.mean(-1)], (2, 16, 37)),
    "a kernel larger than x": (lambda t: made(2, 3, 4, 7, padding=3, dtype=t), lambda: [flat_average], (2, 3, 2, 3)),
    "a tap in the middle": (lambda t: made(3, 4, 6, 3, padding=1, dtype=t), lambda: [average], (2, 4, 1, 1, 1)),
    "taps that reach nothing": (lambda t: made(2, 3, 4, 5, padding=3, dtype=t), lambda: [flat_average], (2, 3, 3, 4)),
    "many channels, a chain per channel": (
        lambda t: made(3, 40, 70, 3, padding=1, dtype=t),
        lambda: [average, lambda y: F.leaky_relu(y, 0.1), trained(70, 3), lambda y: y.flatten(1)],
        (2, 40, 3, 3, 5),
    ),
}  # fmt: skip


def check_case(case: str, dtype: torch.dtype, *, last: bool) -> None:
    torch.manual_seed(7)
    make, stages, shape = CASES[case]
    model, x = Stages(make(dtype), *stages()).to(dtype).eval(), sample(*shape, dtype=dtype)
    if last and x.dim() > 3:
        form = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        model, x = model.to(memory_format=form), x.to(memory_format=form)
    check(model, x, "tap_sums of ", "one kernel: contract_taps")


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_means_of_the_whole(case: str, last: bool, dtype: torch.dtype) -> None:
    check_case(case, dtype, last=last)


def test_the_model_takes_two_launches() -> None:
    model = Stages(made(3, 8, 10, 5), lambda y: y * 2.0, trained(10, 3), nn.AdaptiveAvgPool3d(1)).eval()
    x = sample(3, 8, 4, 5, 6)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad(), ops.watch() as runs:
        fast(x)
    assert [r.path for r in runs] == [Path.KERNEL]
    (prepared,) = (p for p in execute._prepared.values() if p is not None)
    assert [kind_of(s) for s in prepared.schedule.steps] == ["sums", "contraction"]
    assert not prepared.asks_torch and prepared.apart and len(prepared.steps) == 2


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_values_that_are_not_finite(where: str, value: float) -> None:
    """Where the rewritten chain has them by torch's operators: Inf meets each weight by itself, be it 0."""
    torch.manual_seed(3)
    convolution = made(2, 4, 6, 3, padding=1)
    with torch.no_grad():
        convolution.weight[2, 1:3] = 0.0
        given = {"x": sample(3, 4, 5, 6), "weight": convolution.weight, "bias": convolution.bias}
        given[where].view(-1)[2 * given[where].numel() // 3] = value
    model, x = Stages(convolution, flat_average).eval(), given["x"]
    with torch.no_grad():
        expected = fxfuse.optimize(model, (x,), kernels=False)(x)
        got = fxfuse.optimize(model, (x,))(x)
    assert "one kernel: contract_taps" in steps_run()
    assert 0 < (~expected.isfinite()).sum() < expected.numel()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isposinf(), expected.isposinf()) and torch.equal(got.isneginf(), expected.isneginf())
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_weights_that_change_are_seen() -> None:
    convolution, x = made(3, 4, 6, 3), sample(2, 4, 3, 4, 5)
    norm = trained(6, 3)
    model = Stages(convolution, norm, average).eval()
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        first = fast(x)
        for tensor in (convolution.weight, convolution.bias, norm.running_var, norm.weight):
            tensor.data.mul_(1.5)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast(x), first)


def test_one_module_used_twice() -> None:
    """Two means of one convolution's weights, one of them of another value."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = made(3, 4, 6, 3, padding=1), trained(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return average(self.norm(self.up(x))) - 2 * average(self.norm(self.up(x.tanh())))

    model, x = Twice().eval(), sample(2, 4, 3, 4, 5)
    with torch.no_grad():
        got, expected = fxfuse.optimize(model, (x,))(x), copy.deepcopy(model).double()(x.double())
    assert steps_run().count("one kernel: contract_taps") == 2
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_else_reads_the_mean() -> None:
    """The kernel's chain ends where two read the value; vectors that others need are made for them, too."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = made(3, 4, 6, 3), nn.Parameter(torch.rand(6, 1, 1, 1, device=DEVICE))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = average(self.up(x)) * torch.exp(self.scale)
            return y, torch.relu(y - 0.1) * torch.exp(self.scale)

    model, x = Both().eval(), sample(2, 4, 3, 4, 5)
    with torch.no_grad():
        got, expected = fxfuse.optimize(model, (x,))(x), copy.deepcopy(model).double()(x.double())
    assert "one kernel: contract_taps" in steps_run()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [(2,), (3,), (4,), (2, 4), (3, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_means_over_some_dims(dims: tuple[int, ...], last: bool) -> None:
    """The sums are a kernel; what is left of the convolution is torch's."""
    torch.manual_seed(4)
    x = sample(2, 8, 5, 6, 7)
    model = Stages(made(3, 8, 6, 3, stride=(1, 2, 1), padding=1), lambda y: y.mean(dims)).eval()
    check(model, x.to(memory_format=torch.channels_last_3d) if last else x, "tap_sums of ", "then contract_taps")


def test_gradients_are_those_of_the_chain() -> None:
    model, x = Stages(made(3, 4, 6, 3), trained(6, 3), average).eval(), sample(2, 4, 3, 4, 5).requires_grad_()
    fast = fxfuse.optimize(model, (x,))
    wanted = [x, *model.parameters()]
    got, expected = (torch.autograd.grad(m(x).square().sum(), wanted) for m in (fast, model))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_errors_are_those_of_float32() -> None:
    """Many values of the same sign: no sum loses more than torch's."""
    torch.manual_seed(8)
    model, x = Stages(made(2, 4, 8, 3), flat_average).eval(), sample(1, 4, 130, 131).abs_().add_(100)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        got = fxfuse.optimize(model, (x,))(x)
    assert ((got.double() - exact).norm() / exact.norm()).item() <= LIMIT[F32] / 100
