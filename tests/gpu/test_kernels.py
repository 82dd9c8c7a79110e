"""The convolution kernels on a Hopper GPU, or an emulated one, against float64: layouts, odd inputs, switches."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from orientation import by_channel_always, by_channel_never
from place import DEVICE, kernels_always, needs, needs_gpu, what_torch_has
from stages import LIMIT, made, sample
from torch import Tensor, nn

import fxfuse
import fxfuse.dynamo
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with kernels_always(any_size=False):
        yield


class Chain(nn.Module):
    """A transposed convolution and functions behind it; those that take two operands get a residual as well."""

    def __init__(self, convolution: nn.Module, *stages: Callable[..., Tensor], residual: Tensor | None = None) -> None:
        super().__init__()
        self.convolution, self.stages = convolution, stages
        self.register_buffer("residual", residual)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        for stage in self.stages:
            y = stage(y)
        return y if self.residual is None else F.relu(y + self.residual)


def run(model: nn.Module, x: Tensor, path: Path = Path.KERNEL) -> tuple[Tensor, Tensor, Tensor]:
    """The optimised model's result, eager mode's, and that of float64."""
    truth = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), what_torch_has():
        fast = fxfuse.optimize(copy.deepcopy(model), (x,))
        with ops.watch() as runs:
            got, expected = fast(x), model(x)
    assert [r.path for r in runs] == [path], fast.fxfuse_report
    return got, expected, truth


def check(model: nn.Module, x: Tensor, path: Path = Path.KERNEL) -> Tensor:
    got, expected, truth = run(model, x, path)
    assert got.shape == expected.shape and got.dtype is expected.dtype
    assert got.stride() == expected.stride()
    assert relative_error(got, truth) <= max(2 * relative_error(expected, truth), LIMIT[x.dtype])
    return got


# --- what the schedule's parts are for ------------------------------------------------------------
def test_stacked_pools() -> None:
    check(
        Chain(
            made(3, 16, 24, 5, stride=2, padding=2), lambda y: F.max_pool3d(F.max_pool3d(y, 2), 3), lambda y: y.sum(1)
        ),
        sample(2, 16, 9, 10, 11),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [F.max_pool3d, F.avg_pool3d], ids=["max", "avg"])
def test_16_bits_with_a_pool(dtype: torch.dtype, pool: Callable[..., Tensor]) -> None:
    check(
        Chain(made(3, 32, 48, 3, stride=2, dtype=dtype), F.gelu, lambda y: pool(y, 2)),
        sample(2, 32, 7, 8, 9, dtype=dtype),
    )


def test_16_bits_without_a_pool() -> None:
    check(Chain(made(3, 32, 48, 3, dtype=torch.float16), F.relu), sample(2, 32, 7, 8, 9, dtype=torch.float16))


def test_rows_of_every_alignment() -> None:
    """Pairs along w that begin anywhere, whole rows and parts of them, float32 and 16 bits."""
    for dtype in (torch.float32, torch.float16):
        for width in (2, 4, 8, 9, 16, 33):
            for out in (3, 24, 70):
                model = Chain(made(3, 12, out, (3, 3, 2), stride=(2, 1, 2), dtype=dtype), F.relu)
                check(model, sample(2, 12, 3, 8, width, dtype=dtype))


def test_a_pool_that_is_no_multiple() -> None:
    check(Chain(made(3, 8, 16, 3, stride=2), F.silu, lambda y: F.max_pool3d(y, 3)), sample(1, 8, 9, 9, 9))


def test_a_residual() -> None:
    check(Chain(made(3, 8, 16, 3), residual=sample(2, 16, 8, 9, 10)), sample(2, 8, 6, 7, 8))


def test_a_value_used_twice() -> None:
    check(
        Chain(made(3, 8, 16, 3), lambda y: F.relu(y) + F.relu(y).mean((2, 3, 4), keepdim=True)), sample(2, 8, 6, 7, 8)
    )


def test_folded_weights() -> None:
    convolution, norm = made(3, 8, 16, 3, stride=2), nn.BatchNorm3d(16).to(DEVICE)
    nn.init.uniform_(norm.weight, -1, 1), nn.init.uniform_(norm.running_var, 0.5, 2)
    check(nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool3d(2)).eval(), sample(2, 8, 6, 7, 8))


def test_groups_and_dilation() -> None:
    check(Chain(made(3, 48, 96, 3, dilation=(1, 2, 3), groups=3), torch.tanh), sample(2, 48, 9, 8, 17))


@pytest.mark.parametrize("orientation", [by_channel_always, by_channel_never])
def test_taps_far_apart(orientation: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Further than a signed byte tells."""
    with orientation():
        check(Chain(made(1, 64, 64, 3, dilation=64), torch.tanh), sample(2, 64, 300))
        check(
            Chain(made(3, 8, 64, (1, 1, 3), dilation=(1, 1, 100), padding=(0, 0, 99)), torch.tanh),
            sample(2, 8, 2, 9, 7),
        )


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 2, 1), (2, 1, 3)), ((1, 1, 1), (2, 2, 2)), ((1, 1, 2), (3, 3, 3)), ((2, 1, 1), (1, 1, 2))],
)
def test_outputs_that_no_input_reaches(kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """A stride beyond the kernel: residue classes without taps, which hold the bias alone."""
    check(Chain(made(3, 16, 5, kernel, stride=stride), F.silu), sample(2, 16, 7, 14, 14))
    check(Chain(made(3, 16, 5, kernel, stride=stride), lambda y: F.max_pool3d(y, stride)), sample(2, 16, 7, 14, 14))


# --- layouts and odd inputs -----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["x", "weight", "both"])
def test_channels_last(of: str, dtype: torch.dtype) -> None:
    model = Chain(made(3, 32, 48, 3, stride=2, dtype=dtype), F.silu, lambda y: F.max_pool3d(y, 2))
    x = sample(2, 32, 6, 7, 9, dtype=dtype)
    if of != "weight":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if of != "x":
        model = model.to(memory_format=torch.channels_last_3d)
    check(model, x)


def test_channels_last_without_a_pool() -> None:
    x = sample(2, 32, 6, 7, 9).contiguous(memory_format=torch.channels_last_3d)
    check(Chain(made(3, 32, 48, 3, stride=2), F.silu), x)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 4),
        lambda x: x[:, 1:9],
        lambda x: x[..., 1:],
        lambda x: x[:, :1].expand(-1, 8, -1, -1, -1),
        lambda x: x.flatten()[1 : 1 + 2 * 8 * 7 * 7 * 7].view(2, 8, 7, 7, 7),
        lambda x: x[1:, :8, 1:, 2:, 3:],
    ],
)
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    x = view(sample(2, 10, 8, 8, 8))
    check(Chain(made(3, x.shape[1], 16, 3, stride=2), F.silu, lambda y: F.max_pool3d(y, 2)), x)


def test_an_empty_batch() -> None:
    model = Chain(made(3, 8, 16, 3, stride=2), F.silu)
    fast = fxfuse.optimize(copy.deepcopy(model), (sample(2, 8, 5, 5, 5),))
    x = sample(0, 8, 5, 5, 5)
    with torch.no_grad():
        assert fast(x).shape == model(x).shape


def test_shapes_change() -> None:
    model = Chain(made(3, 8, 16, 3, stride=2), F.silu, lambda y: F.max_pool3d(y, 4))
    fast = fxfuse.optimize(copy.deepcopy(model), (sample(2, 8, 5, 5, 5),))
    for n, size in ((1, 5), (3, 9), (2, 5), (1, 21)):
        x = sample(n, 8, size, size + 1, size)
        with torch.no_grad():
            assert relative_error(fast(x), copy.deepcopy(model).double()(x.double())) < 1e-3


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("pool", [None, F.max_pool3d, F.avg_pool3d], ids=["none", "max", "avg"])
def test_values_that_are_not_finite(value: float, pool: Callable[..., Tensor] | None) -> None:
    x = sample(2, 8, 7, 8, 9)
    x[0, 3, 2, 5, 4] = x[1, 7, 6, 7, 8] = value
    stages = [F.softsign] if pool is None else [lambda y: pool(y, 2)]
    got, _, truth = run(Chain(made(3, 8, 16, 3, stride=2, padding=1), *stages), x)
    for found in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(found(got), found(truth)), found
    finite = truth.isfinite()
    assert relative_error(got[finite], truth[finite]) < 1e-3


def test_large_and_small_values() -> None:
    x = sample(3, 16, 6, 7, 8) * torch.tensor([1e-30, 1.0, 1e30], device=DEVICE).view(3, 1, 1, 1, 1)
    got, _, truth = run(Chain(made(3, 16, 16, 3, stride=2), lambda y: y * 0.5 + 0), x)
    for one, other in zip(got, truth, strict=True):
        assert relative_error(one, other) < 1e-3


def test_scales_whose_product_no_float_holds() -> None:
    """Samples and channels far from one at once: zeros stay zeros, and what float32 holds is there."""
    convolution = made(3, 16, 16, 3, stride=2)
    with torch.no_grad():
        convolution.bias.zero_()
        convolution.weight[:, 0] *= 1e-18
        convolution.weight[:, 1] *= 1e22
    x = sample(3, 16, 6, 7, 8) * torch.tensor([1e-19, 1.0, 0.0], device=DEVICE).view(3, 1, 1, 1, 1)
    x[2, 3, 2, 3, 4] = 1e22
    got, _, truth = run(Chain(convolution, lambda y: y * 0.5), x)
    truth = truth.float()
    for one, other in zip(got.flatten(0, 1), truth.flatten(0, 1), strict=True):
        finite = other.isfinite()
        assert torch.equal(one[~finite], other[~finite])
        assert relative_error(one[finite], other[finite].double()) < 1e-3 or (other[finite] == 0).all()
        assert (one[other == 0] == 0).all()


def test_the_same_bits_twice() -> None:
    model = Chain(made(3, 48, 70, 3, stride=2, padding=1), F.gelu, lambda y: F.avg_pool3d(y, 4))
    x = sample(3, 48, 13, 14, 15)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        assert torch.equal(fast(x), fast(x))


# --- switches -------------------------------------------------------------------------------------
def test_the_environment_switches_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_KERNELS", "0")
    check(Chain(made(3, 8, 16, 3), F.relu), sample(1, 8, 5, 5, 5), Path.REWRITTEN)


@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-5, 1e-3), ("ieee", 0.0, 5e-7)])
def test_precision_is_asked_for(precision: str, least: float, most: float) -> None:
    x, model = sample(1, 64, 9, 9, 9), Chain(made(3, 64, 16, 3), F.softsign)
    fast = fxfuse.optimize(model, (x,), precision=precision)
    with torch.no_grad(), ops.watch() as runs:
        got = fast(x)
    assert [r.path for r in runs] == [Path.KERNEL]
    assert least <= relative_error(got, copy.deepcopy(model).double()(x.double())) <= most


@pytest.mark.parametrize("shape", [(2, 300, 5, 6, 7), (1, 1024, 4, 4, 4)])
def test_long_sums_without_tf32(shape: tuple[int, ...]) -> None:
    """The matrix units truncate as they add: what they add by themselves must be short."""
    x, model = sample(*shape).abs(), Chain(made(3, shape[1], 8, 3), lambda y: y * 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got, expected, truth = run(model, x)
    assert relative_error(got, truth) <= max(2 * relative_error(expected, truth), 5e-7)


def test_small_layers_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.kernels.planning.choice import slower

    monkeypatch.setattr("fxfuse.kernels.execute.slower", slower)
    check(Chain(made(3, 7, 9, 2), F.relu), sample(1, 7, 2, 2, 2), Path.REWRITTEN)


def test_float64_is_torchs() -> None:
    model = Chain(made(3, 8, 16, 3, dtype=torch.float64), F.relu)
    x = sample(1, 8, 5, 5, 5, dtype=torch.float64)
    fast = fxfuse.optimize(copy.deepcopy(model), (x,))
    with torch.no_grad(), ops.watch() as runs:
        assert relative_error(fast(x), model(x)) < 1e-12
    assert [r.path for r in runs] == [Path.REWRITTEN]


@needs_gpu
def test_graph_capture() -> None:
    model = Chain(made(3, 16, 32, 3, stride=2), F.silu, lambda y: F.max_pool3d(y, 2))
    x = sample(2, 16, 8, 8, 8)
    fast = fxfuse.optimize(model, (x,))
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fast(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), ops.watch() as runs:
            held = fast(x)
        assert [r.path for r in runs] == [Path.KERNEL]
        x.copy_(sample(2, 16, 8, 8, 8))
        graph.replay()
        assert torch.equal(held, fast(x))


def test_torch_compile() -> None:
    model = Chain(made(3, 16, 32, 3, stride=2), F.silu, lambda y: F.max_pool3d(y, 2))
    x = sample(2, 16, 8, 8, 8)
    compiled = torch.compile(model, backend=functools.partial(fxfuse.dynamo.backend, options={"remainder": "eager"}))
    with torch.no_grad(), ops.watch() as runs:
        got = compiled(x)
    assert [r.path for r in runs] == [Path.KERNEL]
    assert relative_error(got, copy.deepcopy(model).double()(x.double())) < 1e-3
