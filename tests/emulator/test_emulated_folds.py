"""Reductions over channels, in a convolution's epilogue and by themselves, as the emitted kernels compute them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from unittest import mock

import many_chains
import pytest
import torch
import torch.nn.functional as F
from emulator.device import emulated, needs_compiler
from torch import Tensor, nn

import fxfuse
from fxfuse.kernels import execute
from fxfuse.kernels.runtime.prepared import Prepared

pytestmark = needs_compiler

INF, NAN = math.inf, math.nan
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: of the largest value, in a result
LIMIT = {F32: 2e-3, F16: 4e-3, BF16: 3e-2}
Fold = Callable[[Tensor], Tensor]

FOLDS: dict[str, Fold] = {
    "sum": lambda y: y.sum(1),
    "mean": lambda y: y.mean(1, keepdim=True),
    "amax": lambda y: y.amax(1, keepdim=True),
    "min": lambda y: y.min(1, keepdim=True).values,
    "logsumexp": lambda y: y.logsumexp(1, keepdim=True),
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(1),
    "prod": lambda y: y.prod(1),
    "var": lambda y: y.var(1),
    "std": lambda y: y.std(1, keepdim=True, correction=0),
    "vector_norm": lambda y: y.norm(dim=1),
    "normalise": lambda y: F.layer_norm(y.permute(0, 2, 3, 4, 1), y.shape[1:2]).permute(0, 4, 1, 2, 3),
}


class Then(nn.Module):
    """A layer and a function behind it, of the layer's result and of the parameters `g`."""

    def __init__(self, layer: nn.Module, behind: Callable[..., Tensor], *g: Tensor) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind
        self.g = nn.ParameterList([nn.Parameter(t) for t in g])

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(x), *self.g)


def layer(cin: int, cout: int, kernel: int, dtype: torch.dtype = F32, dims: int = 3, **geometry: object) -> nn.Module:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return kinds[dims - 1](cin, cout, kernel, **geometry).to(dtype)  # type: ignore[arg-type]


def run(model: nn.Module, x: Tensor, **how: bool) -> tuple[Tensor, Tensor, str]:
    """As :func:`run_prepared`, with the schedule for the last."""
    got, expected, made = run_prepared(model, x, **how)
    return got, expected, str(made.schedule)


def run_prepared(
    model: nn.Module,
    x: Tensor,
    *,
    last: bool = False,
    exact: bool = False,
    anchored: bool = True,
    **always: bool,
) -> tuple[Tensor, Tensor, Prepared]:
    """What the kernels make of x, the same in float64, and what ran. ``anchored``: they convolve, too; ``always``: more
    of ``kernels_always``."""
    if last:
        memory = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
        x, model = x.contiguous(memory_format=memory), model.to(memory_format=memory)
    fast = fxfuse.optimize(model)
    layout = mock.patch.object(torch._C, "_conv_determine_backend_memory_format", many_chains._as_cudnn)
    with torch.no_grad(), layout if last else contextlib.nullcontext():
        fast(x)  # as a region is made: what torch's convolution gives there is what it is taken to give
        with emulated(), many_chains.kernels_always(anchored, **always):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
                got = fast(x)
            (made,) = [p for p in execute._prepared.values() if p is not None]
        return got.double(), model.double()(x.double()), made


def assert_near(got: Tensor, expected: Tensor, limit: float) -> None:
    """Not finite in the same places; elsewhere off by less than ``limit`` of the largest value."""
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    huge = expected.abs() > 1e20
    assert torch.equal(got.abs()[huge] > 1e20, expected.abs()[huge] > 1e20)
    finite = expected.isfinite() & ~huge
    assert (got - expected)[finite].abs().max() <= limit * expected[finite].abs().max()


def samples(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """The first of them, of float32, is one that 16-bit numbers cannot hold."""
    x = torch.randn(shape)
    if dtype is F32:
        x[0, 0, 0].view(-1)[1], x[0, 0, 1].view(-1)[0] = NAN, 3e30
    return x.to(dtype)


TWO = {"stride": 2, "padding": 1}
#: model, sizes of x, dtype, channels as neighbours, float32's own accuracy, what the one kernel takes
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool, str]] = {
    "softmax, scattered rows": (
        lambda: Then(layer(16, 20, 3, output_padding=1, **TWO), lambda y: y.softmax(1).sigmoid()),
        (2, 16, 3, 4, 5), F32, False, False, "conv_transpose > softmax > sigmoid",
    ),
    "pairs of neighbours, whole sectors": (
        lambda: Then(layer(16, 64, 3, output_padding=1, **TWO), lambda y, r: y.log_softmax(1) + r, torch.rand(16)),
        (2, 16, 2, 3, 8), F32, False, False, "conv_transpose > log_softmax > add",
    ),
    "pairs of so many channels that accumulators move": (
        lambda: Then(layer(8, 121, 2, stride=2), lambda y, r: (y + r).log_softmax(1), torch.rand(6, 1, 16)),
        (2, 8, 3, 5, 8), F32, False, False, "conv_transpose > add > log_softmax",
    ),
    "a number per channel in front, and per position behind": (
        lambda: Then(layer(8, 13, 2), lambda y, g, r: torch.maximum(y, g).logsumexp(1) * r,
                     torch.rand(13, 1, 1, 1), torch.rand(4, 1, 8)),
        (2, 8, 3, 5, 7), F32, False, False, "conv_transpose > maximum > logsumexp > mul",
    ),
    "float16, channels last, two dims": (
        lambda: Then(layer(20, 33, 4, F16, 2, stride=(1, 2)), lambda y, r: F.silu(y).sum(1) + r, torch.rand(9, 1)),
        (2, 20, 6, 5), F16, True, False, "conv_transpose > silu > sum > add",
    ),
    "bfloat16, channels last, many channels": (
        lambda: Then(layer(8, 70, 3, BF16), lambda y: (y * 2).log_softmax(1)),
        (2, 8, 4, 5, 6), BF16, True, False, "conv_transpose > mul > log_softmax",
    ),
    "an instruction of 136 columns": (
        lambda: Then(layer(40, 130, (1, 3, 1), F16), lambda y: y.softmax(1)),
        (1, 40, 2, 5, 9), F16, False, False, "conv_transpose > softmax",
    ),
    "float32's own accuracy": (
        lambda: Then(layer(16, 24, 3, **TWO), lambda y: y.tanh().log_softmax(1)),
        (2, 16, 3, 4, 5), F32, False, True, "conv_transpose > tanh > log_softmax",
    ),
    "behind a pool": (
        lambda: Then(layer(8, 12, 3, stride=2), lambda y, g: F.max_pool3d(y.minimum(g), 2).cos().mean(1, True).exp(),
                     torch.rand(12, 1, 1, 1)),
        (2, 8, 3, 4, 5), F32, False, False, "conv_transpose > minimum > max_pool 2x2x2 > cos > mean > exp",
    ),
    "a softmax behind a pool, channels last": (
        lambda: Then(layer(8, 12, 4, **TWO), lambda y: F.avg_pool3d(F.gelu(y), 2).softmax(1) * 2),
        (2, 8, 3, 4, 5), F32, True, False, "conv_transpose > gelu > avg_pool 2x2x2 > softmax > mul",
    ),
}  # fmt: skip


def over_channels(norm: Callable[..., Tensor], y: Tensor, *parameters: Tensor | float) -> Tensor:
    """As a model has it that wants channels to be the last dim."""
    return norm(y.permute(0, 2, 3, 4, 1), (y.shape[1],), *parameters).permute(0, 4, 1, 2, 3)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool, str]] = {
    "channels last": (
        lambda: Then(layer(8, 24, 3, **TWO), lambda y, w, b: F.gelu(over_channels(F.layer_norm, y, w, b)),
                     torch.rand(24), torch.rand(24)),
        (2, 8, 3, 4, 5), F32, True, False, "conv_transpose > normalise > mul > add > gelu",
    ),
    "columns of padding": (
        lambda: Then(layer(8, 13, 3, **TWO), lambda y, w: over_channels(F.rms_norm, y, w, 1e-3), torch.rand(13)),
        (2, 8, 3, 4, 5), F32, False, False, "conv_transpose > normalise > mul",
    ),
    "float32's own accuracy": (
        lambda: Then(layer(8, 24, 3), lambda y: over_channels(F.layer_norm, y.tanh() + 3)),
        (2, 8, 3, 4, 5), F32, False, True, "conv_transpose > tanh > add > normalise",
    ),
    "float16": (
        lambda: Then(layer(8, 40, 3, F16, **TWO), lambda y, w: over_channels(F.rms_norm, y, w, 1e-3),
                     torch.rand(40).half()),
        (2, 8, 3, 4, 5), F16, False, False, "conv_transpose > cast > normalise > mul > cast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_over_channels(name: str) -> None:
    """Without a sample whose squares float32 cannot hold, which other cases have."""
    model, sizes, dtype, last, exact, stages = NORMS[name]
    torch.manual_seed(1)
    got, expected, made = run(model().to(dtype).eval(), torch.randn(sizes, dtype=dtype), last=last, exact=exact)
    assert made.startswith(f"one kernel: {stages} -> ") and ";" not in made, made
    assert_near(got, expected, 2e-5 if exact else LIMIT[dtype])


@pytest.mark.parametrize("name", CASES)
def test_one_kernel(name: str) -> None:
    model, sizes, dtype, last, exact, stages = CASES[name]
    torch.manual_seed(1)
    got, expected, made = run(model().to(dtype).eval(), samples(*sizes, dtype=dtype), last=last, exact=exact)
    assert made.startswith(f"one kernel: {stages} -> ") and ";" not in made, made
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


def rows(dtype: torch.dtype) -> Tensor:
    """Positions whose channels are all Inf, all -Inf, NaN, of both kinds of Inf, or far from zero, among others."""
    x = torch.randn(1, 2, 1, 4, 8)
    x[0, 0, 0, :, 2] = torch.tensor([INF, -INF, NAN, 2e3])
    x[0, 0, 0, 0, 5], x[0, 1, 0, 1, 5], x[0, 1, 0, 0, 6], x[0, :, 0, 1, 6] = INF, -INF, -2e3, -2e3
    return x.to(dtype)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_rows_that_are_not_finite(fold: str, dtype: torch.dtype) -> None:
    """Of float16 the matrix units make them, in padding columns, too; of float32 the direct kernel does."""
    if dtype is F16 and fold in ("prod", "var"):
        pytest.skip("results that float16 does not hold")
    torch.manual_seed(2)
    convolution = layer(2, 13, 1, dtype)
    with torch.no_grad():
        convolution.weight[0] = convolution.weight[0].abs() + 0.1  # Inf of the first channel reaches all with its sign
        convolution.weight[1, ::2] *= -1
    got, expected, made = run(Then(convolution, FOLDS[fold]).eval(), rows(dtype))
    assert ";" not in made or fold in ("sum", "mean"), made  # those of a convolution alone are another convolution
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("fold", ["logsumexp", "softmax", "log_softmax"])
def test_rows_of_a_reduction_by_itself(fold: str) -> None:
    torch.manual_seed(3)
    model = Then(layer(2, 21, 1), lambda y: FOLDS[fold](F.leaky_relu(y))).eval()
    got, expected, made = run(model, rows(F32), anchored=False)
    assert made.startswith(f"then conv_transpose; then one kernel: leaky_relu > {fold} -> ")
    assert_near(got, expected, 1e-6)


@pytest.mark.parametrize("itself", [False, True], ids=["epilogue", "by_itself"])
def test_a_maximum_beside_which_a_logarithm_is_small(itself: bool) -> None:
    """Of whole numbers, which the convolution makes without an error."""
    torch.manual_seed(4)
    convolution = layer(2, 21, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.randint(-3, 4, convolution.weight.shape))
        convolution.bias.copy_(torch.randint(60000, 60004, (21,)))
    x = torch.randint(-2, 3, (2, 2, 2, 3, 5)).float()
    got, expected, made = run(Then(convolution, lambda y: y.relu().log_softmax(1)).eval(), x, anchored=not itself)
    assert made.startswith(
        "then conv_transpose; then one kernel: relu" if itself else "one kernel: conv_transpose > relu"
    )
    assert_near(got, expected, 1e-6)


#: a factor of whole numbers from -3 to 3 and a shift: float32 holds what they make
LARGE = {
    "1e4": (1.0, 1e4),
    "-1e6": (1.0, -1e6),
    "2^24": (1.0, 2.0**24 - 64),
    "2^30": (64.0, 2.0**30 - 1024),
    "-2^30": (64.0, 1024 - 2.0**30),
    "beyond 2^30": (128.0, 2.0**30 + 2**15),
    "2^36": (2.0**16, 2.0**36),
    "-2^40": (2.0**20, -(2.0**40)),
    "the largest": (2.0**126, 0.0),
}


@pytest.mark.parametrize("itself", [False, True], ids=["epilogue", "by_itself"])
@pytest.mark.parametrize("large", LARGE)
def test_a_softmax_of_large_values(large: str, itself: bool) -> None:
    """The product of a maximum and log2(e) is not rounded to what makes powers of two Inf, or all of them 0."""
    factor, shift = LARGE[large]
    torch.manual_seed(5)
    convolution = layer(1, 21, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.randint(-1, 2, convolution.weight.shape) * factor)
        convolution.bias.copy_(torch.randint(-2, 3, (21,)) * factor + shift)
    x = torch.randint(-1, 2, (2, 1, 2, 3, 5)).float()
    got, expected, made = run(Then(convolution, FOLDS["softmax"]).eval(), x, anchored=not itself)
    assert made.startswith(
        "then conv_transpose; then one kernel: softmax" if itself else "one kernel: conv_transpose >"
    )
    assert_near(got, expected, 1e-6)


@pytest.mark.parametrize("itself", [False, True], ids=["epilogue", "by_itself"])
@pytest.mark.parametrize("shift", [0.0, 100.0, -1e4, 1e4])
def test_a_softmax_is_as_exact_as_its_exponents(shift: float, itself: bool) -> None:
    """Of exponents up to 80 apart, one that is off by half a unit in the last place is all of the error."""
    torch.manual_seed(6)
    convolution = layer(20, 20, 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(20).view(convolution.weight.shape))
        convolution.bias.zero_()
    x = (torch.rand(2, 20, 2, 3, 4) * 80 * 64).round() / 64 + shift  # float32 and two 16-bit numbers hold it
    got, expected, _ = run(Then(convolution, FOLDS["softmax"]).eval(), x, exact=True, anchored=not itself)
    exponents = expected.clamp(min=1e-40).log2().abs() + 20
    assert ((got - expected).abs() <= exponents * 2.0**-24 * expected).all()
