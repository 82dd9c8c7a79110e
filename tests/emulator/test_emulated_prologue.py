"""Pointwise chains in front of a convolution, in the kernels that read x: rows, their scales, samples made apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, emulated, needs_compiler
from test_emulated_folds import BF16, F32, LIMIT, assert_near, layer, run_prepared, samples
from torch import Tensor, nn

import fxfuse
from fxfuse.kernels import convolution_kernels, execute
from fxfuse.kernels.prepared import Prepared
from fxfuse.kernels.steps import Map

pytestmark = needs_compiler

F16 = torch.float16
TWO = {"stride": 2, "padding": 1}


class Behind(nn.Module):
    """A layer behind a function of x and of the parameters `g`."""

    def __init__(self, front: Callable[..., Tensor], layer: nn.Module, *g: Tensor) -> None:
        super().__init__()
        self.front, self.layer = front, layer
        self.g = nn.ParameterList([nn.Parameter(t) for t in g])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.front(x, *self.g))


def of_numbers(x: Tensor) -> Tensor:
    return F.silu(x) * 1.5 + 0.25


def of_channels(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.leaky_relu(x * scale + shift, 0.1)


def of_places(x: Tensor, other: Tensor) -> Tensor:
    return F.gelu(x) + other


def parameters(front: Callable[..., Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    ones = (1,) * (len(sizes) - 2)
    shapes = {of_channels: [(1, sizes[1], *ones)] * 2, of_places: [(1, *sizes[1:])]}
    return [torch.randn(s) for s in shapes.get(front, [])]


FEW = "several positions in a row"
#: a layer of so many input channels, sizes of x, dtype, channels as neighbours, float32's own accuracy
FORMS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], torch.dtype, bool, bool]] = {
    "four at once": (lambda c: layer(c, 24, 3, **TWO), (3, 16, 3, 4, 8), F32, False, False),
    "padding of channels": (lambda c: layer(c, 8, 3, **TWO), (2, 37, 2, 4, 4), F32, False, False),
    "one by one": (lambda c: layer(c, 16, 3, **TWO), (3, 20, 3, 5, 7), F32, False, False),
    "channels last": (lambda c: layer(c, 16, 3, **TWO), (3, 32, 3, 4, 5), F32, True, False),
    "channels last, padding": (lambda c: layer(c, 16, 2), (3, 20, 3, 4, 5), F32, True, False),
    "exact": (lambda c: layer(c, 16, 3, **TWO), (3, 16, 3, 4, 5), F32, False, True),
    "groups": (lambda c: layer(c, 32, 3, groups=4, **TWO), (3, 32, 3, 4, 5), F32, False, False),
    FEW: (lambda c: layer(c, 16, 3, **TWO), (3, 3, 4, 5, 8), F32, False, False),
    "several positions in a row, odd": (lambda c: layer(c, 16, 3, **TWO), (3, 3, 4, 5, 7), F32, True, False),
    "eight at once": (lambda c: layer(c, 24, 3, **TWO), (3, 24, 2, 4, 8), F16, False, False),
    "eight at once, bfloat16": (lambda c: layer(c, 24, 3, groups=2, **TWO), (3, 32, 2, 4, 8), BF16, False, False),
    "16 bits, one by one": (lambda c: layer(c, 24, 3, **TWO), (3, 24, 3, 5, 7), F16, False, False),
    "two dims": (lambda c: layer(c, 16, 3, dims=2, **TWO), (3, 24, 9, 12), F32, False, False),
    "one dim": (lambda c: layer(c, 16, 4, dims=1, **TWO), (3, 24, 37), BF16, False, False),
}


def absorbed(model: nn.Module, x: Tensor, **how: bool) -> tuple[Tensor, Tensor, Prepared]:
    """As of `run_prepared`; no kernel on x ran in front of the convolution's."""
    got, expected, made = run_prepared(model.eval(), x, **how)
    kernel = made.schedule.kernel
    assert kernel is not None and kernel.front is not None
    assert not any(isinstance(s, Map) for s in made.schedule.ahead)
    assert made.convolution is not None and not made.convolution.made.planar
    return got, expected, made


def made(name: str, front: Callable[..., Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, sizes, dtype, _, _ = FORMS[name]
    return Behind(front, make(sizes[1]), *parameters(front, sizes)).to(dtype), samples(*sizes, dtype=dtype)


def check(name: str, front: Callable[..., Tensor]) -> None:
    *_, dtype, last, exact = FORMS[name]
    with mock.patch.object(convolution_kernels.planar, "as_planes", side_effect=convolution_kernels.Unsupported):
        got, expected, _ = absorbed(*made(name, front), last=last, exact=exact)
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


@pytest.mark.parametrize("front", [of_numbers, of_channels, of_places], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, front: Callable[..., Tensor]) -> None:
    check(name, front)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_is_not_finite(dtype: torch.dtype, value: float, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in eager mode: also where the chain makes a number of it."""
    if watched:
        monkeypatch.setattr(convolution_kernels, "WATCHING", -math.inf)
    torch.manual_seed(0)
    x = torch.randn(3, 40, 3, 4, 8)
    x[1, 5, 1, 2, 3] = value
    model = Behind(lambda x: F.hardtanh(x, -2, 3), layer(40, 16, 3, groups=2, **TWO)).to(dtype)
    got, expected, _ = absorbed(model, x.to(dtype))
    assert bool(expected.isnan().any()) == math.isnan(value)
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 24, 3, 4, 8), (2, 20, 3, 5, 7)], ids=str)
def test_a_cast(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """x of float32 becomes one of 16 bits: what autocast makes of it."""
    torch.manual_seed(0)
    made = layer(sizes[1], 16, 3, dtype, **TWO)
    got, expected, prepared = absorbed(Behind(lambda x: F.silu(x).to(made.weight.dtype), made), torch.randn(sizes))
    assert prepared.schedule.kernel is not None and prepared.schedule.kernel.given is F32
    assert_near(got, expected, LIMIT[dtype])


def test_samples_whose_scale_was_guessed_too_low() -> None:
    """The chain makes the largest value of one that few look at."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 4, 8, 8)
    x[1, 7, 2, 3, 3] = -30.0
    with mock.patch.multiple(convolution_kernels, SAMPLED_EACH=64, SAMPLED=64):
        got, expected, _ = absorbed(Behind(lambda x: x * x * x, layer(16, 16, 3, **TWO)), x)
    assert_near(got, expected, LIMIT[F32])


def scaled_by_channel(last: bool) -> None:
    """x itself is far from half's range, and so are most channels of what the chain makes."""
    torch.manual_seed(0)
    scales = 10.0 ** -torch.linspace(12, 0, 16).view(1, 16, 1, 1, 1)
    model = Behind(lambda x, g: x * g, layer(16, 16, 3, **TWO), scales)
    got, expected, _ = absorbed(model, torch.randn(2, 16, 4, 5, 8) * 1e7, last=last)
    assert_near(got, expected, LIMIT[F32])


@pytest.mark.parametrize("last", [False, True])
def test_the_scale_is_that_of_what_the_chain_makes(last: bool) -> None:
    scaled_by_channel(last)
    with (
        device.broken("prepare.cuh", "along(g.stride_c, g.channels * g.groups)", "0"),
        pytest.raises((AssertionError, EmulationError)),
    ):
        scaled_by_channel(last)


@pytest.mark.parametrize("runs", [1, 2])
def test_statistics_of_what_follows(runs: int) -> None:
    """Both runs of a convolution have the chain; what the first one made of x, the second one uses."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LeakyReLU(0.2), layer(16, 16, 3, **TWO), nn.InstanceNorm3d(16, affine=True), nn.ReLU(), nn.MaxPool3d(2)
    )
    with mock.patch.multiple(execute, WORTH_TWICE=1e-9 if runs == 1 else 1e9, HOPELESS=1e9):
        got, expected, made = absorbed(model, samples(3, 16, 4, 5, 6))
    assert (made.schedule.measuring is not None) == (runs == 2)
    assert made.schedule.measuring is None or made.schedule.measuring.front is not None
    assert_near(got, expected, 2e-3)


def test_a_norm_in_front() -> None:
    """Statistics are gathered in a pass of their own; what is made of them is in the kernels that read x."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU(0.1, inplace=True), layer(16, 8, 2, stride=2)
    )
    got, expected, made = run_prepared(model.eval(), torch.randn(3, 16, 4, 5, 6) * 3 + 5)
    assert made.schedule.kernel is not None and made.schedule.kernel.front is not None
    assert [type(s).__name__ for s in made.schedule.ahead][:1] == ["Gather"]
    assert_near(got, expected, LIMIT[F32])


def test_a_pool_in_front() -> None:
    """It stores what the convolution reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool3d(2), nn.Tanh(), layer(16, 8, 2, stride=2))
    got, expected, made = run_prepared(model.eval(), torch.randn(3, 16, 4, 6, 6))
    assert made.schedule.kernel is not None and made.schedule.kernel.front is None
    assert [str(s) for s in made.schedule.ahead] == ["one kernel: avg_pool 2x2x2 > tanh -> f32[3, 16, 2, 3, 3]"]
    assert_near(got, expected, LIMIT[F32])


def test_x_that_is_read_where_it_lies() -> None:
    """Where no rows are made of it the chain stays a kernel of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GELU(), layer(16, 8, 2, stride=2)).half()
    got, expected, made = run_prepared(model.eval(), torch.randn(3, 16, 4, 6, 6).half(), last=True)
    assert made.schedule.kernel is not None and made.schedule.kernel.front is None
    assert [str(s) for s in made.schedule.ahead] == ["one kernel: gelu -> f16[3, 16, 4, 6, 6]"]
    assert_near(got, expected, LIMIT[F16])


def test_weights_that_are_made_of_the_same() -> None:
    """They need what the chain stores."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sigmoid() - 0.5
            return F.conv_transpose3d(y, y).relu()

    torch.manual_seed(0)
    got, expected, made = run_prepared(Twice(), torch.randn(8, 8, 3, 3, 3))
    assert made.schedule.kernel is not None and made.schedule.kernel.front is None
    assert_near(got, expected, LIMIT[F32])


def test_planes() -> None:
    """Nor is there a place for it where x is multiplied as it lies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GELU(), layer(3, 16, 3, **TWO))
    got, expected, made = run_prepared(model.eval(), torch.randn(16, 3, 4, 8, 32))
    assert made.convolution is not None and made.convolution.made.planar
    assert [str(s) for s in made.schedule.ahead] == ["one kernel: gelu -> f32[16, 3, 4, 8, 32]"]
    assert_near(got, expected, LIMIT[F32])


def test_a_cast_to_a_wider_dtype() -> None:
    """It is a kernel of its own: those that measure x read float32."""
    torch.manual_seed(0)
    made = layer(16, 8, 2, stride=2)
    model = Behind(lambda x: x.to(made.weight.dtype), made)
    got, expected, prepared = run_prepared(model.eval(), torch.randn(3, 16, 4, 6, 6).half())
    assert [str(s) for s in prepared.schedule.ahead] == ["one kernel: cast -> f32[3, 16, 4, 6, 6]"]
    assert_near(got, expected, LIMIT[F32])


#: header, text and what is there instead, form
BROKEN = {
    "another channel": (
        "prepare.cuh", "channel = group * channels + c + k, at", "channel = c, at", "four at once",
    ),
    "another position": (
        "prepare.cuh", "read[k].w, channel, at + 3)", "read[k].w, channel, at)", "four at once",
    ),
    "one by one": ("prepare.cuh", "to_float(source(channel)[at]), channel, at)", "0.f, channel, at)", "one by one"),
    "neighbours": (
        "prepare.cuh", "values[k], channel + k, at)", "values[k], channel, at)", "channels last",
    ),
    "a line": ("rows_beside.cuh", "before + channel, z, y, at);", "before + channel, d, h, w);", FEW),
    "octs": ("prepare.cuh", "const int position = at + i,", "const int position = at,", "eight at once"),
    "samples apart": ("conv_direct.cuh", "first + c, at_d, at_h, at_w);", "c, at_h, at_d, at_w);", "four at once"),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    header, text, instead, form = BROKEN[why]
    with device.broken(header, text, instead), pytest.raises((AssertionError, EmulationError)):
        check(form, of_places)


def test_an_empty_batch() -> None:
    model = nn.Sequential(nn.GELU(), layer(16, 8, 2, stride=2))
    fast, nothing = fxfuse.optimize(model, (torch.randn(2, 16, 4, 4, 4),)), torch.randn(0, 16, 4, 4, 4)
    with torch.no_grad(), emulated():
        assert fast(nothing).shape == model(nothing).shape
