"""Kernels that read x of few channels as it lies, on a GPU or an emulated one, against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE, kernels_always, needs, what_torch_has
from stages import LIMIT, Stages, made
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.bench.chains import Scale
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.convolution import planar
from fxfuse.kernels.convolution.geometry import ONE
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

F32, TWO = torch.float32, {"stride": 2, "padding": 1}
#: model, sizes of x, and positions per dim whose mean is one value
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int, int]]] = {
    "alone": (lambda: made(3, 3, 16, 3, **TWO), (3, 3, 7, 9, 24), ONE),
    "several classes at once": (lambda: made(3, 2, 24, 4, output_padding=1, **TWO), (3, 2, 5, 9, 32), ONE),
    "few output channels": (lambda: made(3, 3, 5, 3, bias=False, **TWO), (3, 3, 3, 4, 8), ONE),
    "stride 1, dilated": (lambda: made(3, 4, 12, 5, dilation=(1, 2, 1), padding=1), (3, 4, 6, 11, 24), ONE),
    "strides that differ": (
        lambda: made(3, 1, 4, (2, 3, 5), stride=(1, 2, 3), padding=(0, 1, 2)), (3, 1, 3, 4, 16), ONE,
    ),
    "classes without taps": (lambda: made(3, 3, 8, 1, stride=2), (3, 3, 3, 4, 8), ONE),
    "two dims": (lambda: made(2, 1, 16, 3, **TWO), (3, 1, 37, 64), ONE),
    "one dim": (lambda: made(1, 1, 16, 5, **TWO), (3, 1, 40), ONE),
    "a mean": (lambda: Stages(made(3, 3, 16, 3, **TWO), nn.AvgPool3d(2), nn.GELU()), (3, 3, 8, 17, 32), ONE),
    "a mean of many": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), nn.AvgPool3d(2), nn.AvgPool3d(2)), (3, 3, 9, 14, 32), (2, 2, 2),
    ),
    "a mean, sizes that differ": (
        lambda: Stages(made(3, 2, 8, (2, 3, 4), stride=(1, 2, 3)), nn.AvgPool3d((3, 2, 6)), nn.ReLU()),
        (3, 2, 5, 6, 16), (3, 1, 2),
    ),
    "a mean of windows that overlap": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), nn.AvgPool3d(4, 2)), (3, 3, 6, 7, 16), ONE,
    ),
    "a given number of means": (
        lambda: Stages(made(3, 1, 8, 2, stride=2), nn.AdaptiveAvgPool3d((2, 3, 4))), (3, 1, 4, 6, 8), (2, 2, 2),
    ),
    "a mean in two dims": (
        lambda: Stages(made(2, 3, 16, 4, **TWO), nn.AvgPool2d(4)), (3, 3, 9, 24), (1, 2, 2),
    ),
    "a mean's statistics": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), nn.AvgPool3d(4), nn.InstanceNorm3d(16)), (3, 3, 8, 9, 24), (2, 2, 2),
    ),
    "a mean's softmax": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), nn.AvgPool3d(4), nn.Softmax(1)), (3, 3, 6, 7, 16), (2, 2, 2),
    ),
    "a maximum": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), lambda y: y * y.sigmoid(), nn.MaxPool3d(2)), (3, 3, 8, 9, 24), ONE,
    ),
    "a maximum of a monotone chain": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), nn.LeakyReLU(0.2), Scale(16), nn.MaxPool3d(2)), (3, 3, 8, 9, 24), ONE,
    ),
    "statistics": (
        lambda: Stages(made(3, 3, 16, 3, **TWO), nn.SiLU(), nn.GroupNorm(4, 16), nn.Hardswish()), (3, 3, 8, 9, 24), ONE,
    ),
    "softmax": (lambda: Stages(made(3, 3, 16, 3, **TWO), nn.Softmax(1), nn.Sigmoid()), (3, 3, 5, 9, 24), ONE),
    "a sum of channels": (lambda: Stages(made(3, 3, 16, 3, **TWO), lambda y: y.relu().sum(1)), (3, 3, 5, 9, 24), ONE),
}  # fmt: skip


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(planar, "WORTH_IT", 0.0)
    with kernels_always(), torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield


def apart(x: Tensor) -> Tensor:
    """The same, a number behind a place where copies may begin."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def wide(x: Tensor) -> Tensor:
    """The same, as a part of something larger along w."""
    return torch.cat([x, torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("lies", "dtype"),
    [(Tensor.contiguous, F32), (apart, F32), (wide, F32), (Tensor.contiguous, torch.float16), (wide, torch.bfloat16)],
)
def test_values(name: str, lies: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """The second of three samples is one that the kernel leaves to `direct`; the same bits twice."""
    make, sizes, step = CASES[name]
    torch.manual_seed(3)
    model, x = make().eval().to(DEVICE, dtype), torch.randn(sizes, device=DEVICE, dtype=dtype)
    x[1].view(-1)[-1] = math.inf
    with what_torch_has():
        fast = fxfuse.optimize(copy.deepcopy(model), (x,))
    with ops.watch() as runs:
        got = fast(lies(x))
    assert [r.path for r in runs] == [Path.KERNEL]
    (prepared,) = (p for p in execute._prepared.values() if p is not None)
    assert prepared.convolution.made.planar == dtype.itemsize
    assert dtype is not F32 or prepared.convolution.made.step == step  # 16-bit pools round between each other
    truth = model.double()(x.double())
    assert torch.equal(got.isnan(), truth.isnan())
    there = truth.isfinite()  # of the second sample, what `direct` makes
    assert all(relative_error(got[i][there[i]], truth[i][there[i]]) < LIMIT[dtype] for i in range(len(x)))
    assert torch.equal(got.nan_to_num(7), fast(lies(x)).nan_to_num(7))


@pytest.mark.parametrize("size", [1e-39, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("name", ["alone", "a mean of many"])
def test_numbers_of_all_sizes(name: str, size: float) -> None:
    """Denormal ones are the other kernel's; so are those that TF32 rounds to Inf."""
    make, sizes, _ = CASES[name]
    torch.manual_seed(3)
    model, x = make().eval(), torch.randn(sizes, device=DEVICE) * size
    for one in model.parameters():
        if one.dim() == 1:
            one.zero_()
    got, truth = fxfuse.optimize(copy.deepcopy(model), (x,))(x), model.double()(x.double())
    assert relative_error(got, truth) < 1e-3


@pytest.mark.parametrize("odd", [math.inf, math.nan, 1e-40])
def test_weights_that_are_odd(odd: float) -> None:
    """Beyond a border of x nothing is multiplied with them."""
    torch.manual_seed(3)
    model = made(3, 3, 16, 3).eval()
    model.weight[1, 2, 0, 1, 2] = odd
    x = torch.randn(2, 3, 5, 6, 16, device=DEVICE)
    got, truth = fxfuse.optimize(copy.deepcopy(model), (x,))(x), model.double()(x.double())
    assert torch.equal(got.isnan(), truth.isnan()) and torch.equal(got.isinf(), truth.isinf())
    there = truth.isfinite()
    assert there[:, 2].any() and relative_error(got[there], truth[there]) < 1e-3


@pytest.mark.parametrize("by", [math.inf, math.nan])
def test_numbers_that_make_nan_of_a_value_between(by: float) -> None:
    """A value of zero is neither the largest nor the smallest one of its window."""
    torch.manual_seed(2)
    scale = Scale(4)
    model = Stages(made(3, 3, 4, 2, stride=2), nn.LeakyReLU(0.1), scale, nn.MaxPool3d(2)).eval().to(DEVICE)
    model.parts[0].weight[:, :, 0, 0, 1], model.parts[0].bias[:], scale.weight[1] = 0.0, 0.0, by
    x = torch.randn(2, 3, 3, 5, 16, device=DEVICE)
    got, truth = fxfuse.optimize(copy.deepcopy(model), (x,))(x), model.double()(x.double())
    assert torch.equal(got.isnan(), truth.isnan()) and truth[:, 1].isnan().all()
    others = [0, 2, 3]
    assert relative_error(got[:, others], truth[:, others]) < 1e-3


def test_more_tiles_than_a_gpu_has_processors() -> None:
    """Buffers of x are filled again and again."""
    torch.manual_seed(3)
    model, x = made(3, 3, 16, 3, **TWO).eval(), torch.randn(4 if DEVICE == "cpu" else 64, 3, 9, 16, 32, device=DEVICE)
    fast = fxfuse.optimize(copy.deepcopy(model), (x,))
    got, truth = fast(x), F.conv_transpose3d(x.double(), model.weight.double(), model.bias.double(), **TWO)
    assert relative_error(got, truth) < 1e-3 and torch.equal(got, fast(x))
