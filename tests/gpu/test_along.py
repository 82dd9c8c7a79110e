"""Reductions along w in the convolution's epilogue, on a GPU or an emulated one, against float64 and eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from along import rows_together, ways_run
from place import CUDA, DEVICE, kernels_always, needs
from stages import Stages, check, made, near, sample, spread
from torch import Tensor, nn

import fxfuse
from fxfuse.kernels.convolution.specialisation import Along

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))


@pytest.fixture(params=Along, ids=lambda along: along.name.lower(), autouse=True)
def along(request: pytest.FixtureRequest) -> Iterator[Along]:
    with kernels_always(), rows_together(request.param):
        yield request.param


#: sizes of x; the width of the output
SIZES = {"even": ((3, 9, 8), 16), "odd": ((2, 5, 17), 33), "wide": ((1, 3, 31), 62)}
LARGE = {"decoder": ((16, 32, 32), 64), "wider": ((8, 24, 48), 96)} if CUDA else {}
LAST: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "rms_norm": lambda w: nn.RMSNorm(w, 1e-4),
    "softmax": lambda w: nn.Softmax(-1),
    "log_softmax": lambda w: nn.LogSoftmax(-1),
}


@pytest.mark.parametrize("size", {**SIZES, **LARGE})
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", LAST)
def test_rows(last: str, dtype: torch.dtype, size: str, along: Along) -> None:
    torch.manual_seed(5)
    sizes, width = {**SIZES, **LARGE}[size]
    more = {"stride": 2, "padding": 1, "output_padding": (1, 1, 1 - width % 2)}
    norm = LAST[last](width).to(DEVICE).to(dtype)
    model = spread(Stages(made(3, 8, 40, 3, dtype=dtype, **more), lambda y: y.tanh() * 3, norm, F.gelu))
    check(model, sample(2, 8, *sizes, dtype=dtype))
    assert ways_run() == [along]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "pool", [nn.AvgPool3d(2), nn.MaxPool3d(2), nn.AvgPool3d((1, 2, 2))], ids=["mean", "max", "plane"]
)
def test_pools_of_rows(pool: nn.Module, dtype: torch.dtype, along: Along) -> None:
    """Of 5 rows of positions, the last of which a warpgroup has alone; samples with Inf and NaN among others."""
    torch.manual_seed(6)
    stride = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (2, 2, 2)
    convolution = made(3, 8, 20, 3, dtype=dtype, stride=stride, padding=1, output_padding=tuple(s - 1 for s in stride))
    norm = spread(Stages(nn.LayerNorm(32).to(DEVICE).to(dtype)))
    model = Stages(convolution, norm, pool, torch.tanh)
    x = sample(3, 8, 3, 5, 16, dtype=dtype)
    check(model, x)
    assert ways_run() == [along]
    x[0, 2, 1, 3, 5], x[2, 1, 2, 4, 0] = float("nan"), float("inf")
    near(model, fxfuse.optimize(model, (x,)), x)


@pytest.mark.parametrize("shape", [(0, 8, 3, 5, 8), (3, 8, 3, 5, 8)], ids=["no samples", "strided"])
def test_other_inputs(shape: tuple[int, ...]) -> None:
    """An empty batch; every other sample of x, and of channels_last_3d."""
    torch.manual_seed(7)
    model = Stages(made(3, 8, 20, 2, stride=2), lambda y: y.softmax(-1), torch.sqrt)
    x = sample(2 * shape[0], *shape[1:])[::2]
    for one in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        with torch.no_grad():
            got, expected = fxfuse.optimize(model, (one,))(one), model.double()(one.double())
        model.float()
        assert got.shape == expected.shape and got.stride() == model(one).stride()
        torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-3)


def test_the_same_bits_twice(along: Along) -> None:
    torch.manual_seed(8)
    model = Stages(made(3, 8, 40, 3, stride=2), nn.LayerNorm(33).to(DEVICE), F.silu)
    x = sample(3, 8, 4, 9, 16)
    with torch.no_grad():
        fast = fxfuse.optimize(model, (x,))
        first = fast(x)
        assert all(torch.equal(first, fast(x)) for _ in range(3))
    assert ways_run() == [along]


def one_each(y: Tensor) -> Tensor:
    return y.amax(-1, keepdim=True)


def test_what_leaves_one_value_of_a_row_has_a_kernel_of_its_own() -> None:
    model = Stages(made(3, 8, 20, 3, stride=2), torch.tanh, one_each)
    check(model, sample(2, 8, 3, 4, 8), "then one kernel: ")
