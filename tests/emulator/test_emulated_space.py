"""Maxima, softmaxes and logsumexps over all of space, gathered by the convolution's kernel, as emitted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import needs_compiler
from orientation import by_channel_always
from test_emulated_folds import BF16, F16, F32, INF, LIMIT, NAN, Then, assert_near, layer, run_prepared
from torch import Tensor, nn

from fxfuse.kernels.runtime.prepared import Prepared

pytestmark = needs_compiler

SPACE = (2, 3, 4)
TWO = {"stride": 2, "padding": 1}
Behind = Callable[..., Tensor]


def softmax(y: Tensor) -> Tensor:
    return y.flatten(2).softmax(-1).view(y.shape)


def log_softmax(y: Tensor) -> Tensor:
    return y.reshape(*y.shape[:2], -1).log_softmax(2).reshape(y.shape)


def attended(y: Tensor) -> Tensor:
    return y * torch.sigmoid(y.amax(SPACE, True) + y.mean(SPACE, keepdim=True))


#: what is behind the convolution, what is gathered, and whether its value has no other use
BEHIND: dict[str, tuple[Behind, str, bool]] = {
    "softmax": (lambda y: softmax(y.clamp(-1, 1)) * 2, "exponentials", False),
    "log_softmax": (log_softmax, "exponentials", False),
    "logsumexp": (lambda y: F.relu(y).logsumexp(SPACE), "exponentials", True),
    "less the logsumexp": (lambda y: y - y.logsumexp(SPACE, True), "exponentials", False),
    "a maximum": (lambda y: y.amax(SPACE), "extremes", True),
    "a minimum": (lambda y: torch.tanh(y).amin(SPACE, True), "extremes", True),
    "one window": (lambda y: F.adaptive_max_pool3d(F.leaky_relu(y), 1), "extremes", True),
    "both ends": (
        lambda y: (y - y.amin(SPACE, True)) / (y.amax(SPACE, True) - y.amin(SPACE, True) + 1), "extremes", False,
    ),
    "maximum and mean": (attended, "statistics and extremes", False),
    "all kinds": (
        lambda y: attended(y) - y.logsumexp(SPACE, True), "statistics and exponentials and extremes", False,
    ),
}  # fmt: skip
#: layer, sizes of x, dtype, channels as neighbours, float32's own accuracy
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, bool]] = {
    "odd sizes, columns of padding": (lambda: layer(8, 20, 3, **TWO), (3, 8, 3, 4, 9), F32, False, False),
    "float16": (lambda: layer(8, 24, 3, F16, output_padding=1, **TWO), (2, 8, 3, 5, 6), F16, False, False),
    "bfloat16, channels last": (lambda: layer(16, 40, 2, BF16, stride=2), (2, 16, 3, 4, 7), BF16, True, False),
    "float32's own accuracy": (lambda: layer(8, 16, (1, 3, 3)), (2, 8, 2, 5, 9), F32, False, True),
    "three channels, as they lie": (lambda: layer(3, 16, 3, **TWO), (2, 3, 4, 6, 16), F32, False, False),
}


def check(model: nn.Module, x: Tensor, gathers: str, alone: bool, limit: float, **how: bool) -> Prepared:
    got, expected, made = run_prepared(model, x, gathered=True, **how)
    plan = str(made.schedule)
    assert f"{gathers} of" in plan and "gathered on the way" in plan
    assert ("the convolution again" in plan) == (how.get("twice", False) and not alone), plan
    assert_near(got, expected, limit)
    return made


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("of", LAYERS)
@pytest.mark.parametrize("name", BEHIND)
def test_over_space(name: str, of: str, twice: bool) -> None:
    behind, gathers, alone = BEHIND[name]
    make, sizes, dtype, last, exact = LAYERS[of]
    torch.manual_seed(len(name))
    x = torch.randn(sizes).to(dtype)
    limit = 2 * LIMIT[dtype] if not exact else 1e-5
    made = check(Then(make(), behind), x, gathers, alone, limit, twice=twice, last=last, exact=exact)
    assert made.convolution is not None
    assert (made.convolution.made.planar > 0) == (of == "three channels, as they lie")


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["softmax", "maximum and mean", "all kinds"])
def test_channels_as_rows(name: str, stride: int, dtype: torch.dtype, keeps: bool) -> None:
    behind, gathers, alone = BEHIND[name]
    torch.manual_seed(3)
    model = Then(layer(8, 100, 4 - stride, dtype, stride=stride), behind)
    with by_channel_always():
        made = check(model, torch.randn(2, 8, 3, 5, 16).to(dtype), gathers, alone, 2 * LIMIT[dtype], twice=not keeps)
    engine = made.convolution if keeps else made.measuring
    assert engine is not None and engine.made.by_channel  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["softmax", "logsumexp", "both ends"])
def test_behind_a_pool(name: str) -> None:
    """Of the pool's results, which the same kernel makes."""
    behind, gathers, alone = BEHIND[name]
    torch.manual_seed(7)
    model = Then(layer(8, 16, 3, **TWO), lambda y: behind(F.max_pool3d(y, 2)))
    made = check(model, torch.randn(3, 8, 4, 5, 7), gathers, alone, 2 * LIMIT[F32])
    assert "max_pool 2x2x2" in str(made.schedule.kernel)


@pytest.mark.parametrize("dims", [1, 2])
def test_fewer_dims(dims: int) -> None:
    """A softmax over the only dim of space needs no flattening."""
    torch.manual_seed(8)
    behind: Behind = (lambda y: y.softmax(2)) if dims == 1 else softmax
    model = Then(layer(8, 16, 4, dims=dims, **TWO), behind)
    check(model, torch.randn(3, 8, 9, 11)[:, :, : 9 if dims == 2 else 1].squeeze(2), "exponentials", False, 4e-3)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize(
    ("name", "twice"),
    [("softmax of all", False), ("softmax of all", True), ("log_softmax", True), ("logsumexp", False),
     ("both ends", False), ("all kinds", True)],
)  # fmt: skip
def test_values_that_are_not_finite(name: str, value: float, dtype: torch.dtype, twice: bool) -> None:
    """Behind the convolution, in some places; where a relu is, nothing is left of -Inf."""
    behind, gathers, _ = BEHIND.get(name, (softmax, "exponentials", False))
    torch.manual_seed(6)
    mask = torch.zeros(16, 4, 5, 9)
    mask[::3, 1, 2, 3] = 1
    odd = torch.where(mask > 0, value, 0.0).to(dtype)
    model = Then(layer(8, 16, 1, dtype), lambda y, r: behind(y + r), odd)
    got, expected, made = run_prepared(model, torch.randn(3, 8, 4, 5, 9).to(dtype), gathered=True, twice=twice)
    assert f"{gathers} of" in str(made.schedule)
    assert not expected.isfinite().all() or value == -INF
    assert_near(got, expected, 4e-3)


@pytest.mark.parametrize(
    "name", ["softmax of all", "log_softmax", "less the logsumexp", "both ends", "logsumexp of all"]
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_nothing_but_minus_infinity(name: str, dtype: torch.dtype) -> None:
    """In some channels: a softmax has NaN there, the logarithm of the sum is -Inf."""
    alone = {"softmax of all": softmax, "logsumexp of all": lambda y: y.logsumexp(SPACE)}
    behind: Behind = alone.get(name) or BEHIND[name][0]
    torch.manual_seed(6)
    odd = torch.zeros(16, 1, 1, 1)
    odd[::3] = -INF
    model = Then(layer(8, 16, 3, dtype, **TWO), lambda y, r: behind(y + r), odd.to(dtype))
    got, expected, made = run_prepared(model, torch.randn(3, 8, 3, 4, 5).to(dtype), gathered=True)
    assert "gathered on the way" in str(made.schedule)
    assert (~expected.isfinite()).any()
    assert_near(got, expected, 4e-3)


@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e30])
@pytest.mark.parametrize("name", ["softmax of all", "logsumexp", "both ends", "all kinds"])
def test_samples_that_16_bit_numbers_cannot_hold(name: str, value: float) -> None:
    """The elements of marked samples are made once more, and their parts of those."""
    behind = softmax if name == "softmax of all" else BEHIND[name][0]
    torch.manual_seed(4)
    x = torch.randn(3, 8, 3, 4, 9)
    x[1, 5, 2, 1, 3] = value
    for twice in (False, True):
        got, expected, made = run_prepared(Then(layer(8, 16, 3, **TWO), behind), x, gathered=True, twice=twice)
        assert "gathered on the way" in str(made.schedule)
        assert_near(got[:1], expected[:1], 4e-3)
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isposinf(), expected.isposinf())


@pytest.mark.parametrize("shift", [-3e4, 3e4, 1e6])
def test_far_from_zero(shift: float) -> None:
    """Only differences count; all values of a channel may be negative, and zeros are none of them."""
    torch.manual_seed(2)
    convolution = layer(8, 16, 3, **TWO)
    with torch.no_grad():
        convolution.bias.fill_(shift)  # type: ignore[union-attr, operator]
    x = torch.randn(2, 8, 3, 4, 9)
    for behind in (BEHIND["a maximum"][0], lambda y: -y.amin(SPACE), lambda y: y.logsumexp(SPACE)):
        got, expected, _ = run_prepared(Then(convolution.float(), behind), x, gathered=True)
        assert (got - expected).abs().max() <= abs(shift) * 2e-7 + 1e-2
    got, expected, _ = run_prepared(Then(convolution.float(), softmax), x, gathered=True, twice=True)
    torch.testing.assert_close(got.sum(SPACE), torch.ones(2, 16).double(), rtol=1e-5, atol=0)


def test_a_softmax_is_as_accurate_as_torchs() -> None:
    """Of what a convolution makes without an error."""
    torch.manual_seed(1)
    convolution = layer(16, 16, 1, F16)
    with torch.no_grad():
        convolution.weight.copy_(torch.eye(16).view(16, 16, 1, 1, 1))  # type: ignore[union-attr, operator]
        convolution.bias.zero_()  # type: ignore[union-attr, operator]
    x = (torch.randn(2, 16, 4, 9, 10) * 4).to(F16)
    for twice in (False, True):
        model = Then(convolution.half(), lambda y: softmax(y.float()))
        got, expected, _ = run_prepared(model, x, gathered=True, twice=twice)
        assert ((got - expected) / expected).abs().max() < 3e-6
        model = Then(convolution.half(), lambda y: log_softmax(y.float()))
        got, expected, _ = run_prepared(model, x, gathered=True, twice=twice)
        assert (got - expected).abs().max() < 4e-6


def test_what_a_kernel_gathers_is_a_choice() -> None:
    """Rows of a small value are read once more at little cost."""
    model = Then(layer(8, 16, 3, **TWO), softmax)
    _, _, made = run_prepared(model, torch.randn(2, 8, 3, 4, 9))
    assert "softmax_over" in str(made.schedule)


STATISTICS, GATHER, SECTORS = "statistics.cuh", "conv_gather.cuh", "conv_sectors.cuh"
OF_BOTH = "x.y * exponential(x.x - shift) + y.y * exponential(y.x - shift)"
#: what tests should see: a header, what stands there, what stands there instead
BROKEN = {
    "outside the tensor": (STATISTICS, "max_or_nan(m, inside(k) ? made : nothing)", "max_or_nan(m, made)"),
    "sums outside": (
        STATISTICS,
        "exponential((inside(k) ? value(k) : nothing) - shift)",
        "exponential(value(k) - shift)",
    ),
    "minima outside": (STATISTICS, "inside(k) ? -made : nothing", "-made"),
    "maxima outside": (STATISTICS, "max_or_nan(p.x, inside(k) ? made : nothing)", "max_or_nan(p.x, made)"),
    "nothing but -Inf": (STATISTICS, "return m == -pw::infinity() ? 0.f : m;", "return m;"),
    "nothing but -Inf, later": (STATISTICS, "shift = m == -pw::infinity() ? 0 : m;", "shift = m;"),
    "a logarithm beside Inf": (STATISTICS, "x - x == 0 ? x + log(y) : x", "x + log(y)"),
    "another maximum": (STATISTICS, OF_BOTH, "x.y + y.y"),
    "kinds that lie behind each other": (
        GATHER,
        "slot * Problem::Kinds::count + number",
        "slot * Problem::Kinds::count",
    ),
    "kinds of channels as rows": (SECTORS, "slot * Problem::Kinds::count + number", "slot * Problem::Kinds::count"),
    "kinds that are merged": (STATISTICS, "n * p.slots * step + number * p.channels", "n * p.slots * step"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_seen(what: str) -> None:
    with device.broken(*BROKEN[what]), pytest.raises((AssertionError, device.EmulationError)):
        _some(what)


def _some(what: str) -> None:
    """Of the tests above those that should see it."""
    if "-Inf" in what:
        for name in ("less the logsumexp", "logsumexp of all"):
            test_nothing_but_minus_infinity(name, F32)
    elif "Inf" in what:
        test_values_that_are_not_finite("logsumexp", INF, F32, False)
    elif "rows" in what:
        test_channels_as_rows("all kinds", 1, F32, True)
    elif "kinds" in what:
        test_over_space("all kinds", "float16", False)
    else:
        test_far_from_zero(-3e4)
        test_over_space("softmax", "odd sizes, columns of padding", True)
        test_far_from_zero(3e4)


SAME_BITS: dict[str, tuple[Behind, bool]] = {
    "a softmax": (softmax, False),
    "a softmax of small values": (lambda y: softmax(y.tanh()), True),
    "equal to a maximum": (lambda y: torch.where(y == y.amax(SPACE, True), y, 0.0), False),
    "less a maximum": (lambda y: y - y.amax(SPACE, True), True),
}


@pytest.mark.parametrize("name", SAME_BITS)
def test_what_asks_for_the_same_bits_has_one_run(name: str) -> None:
    """A last bit of 1e28 is more than an exponential allows, and two runs may differ in it."""
    torch.manual_seed(3)
    behind, twice = SAME_BITS[name]
    x = torch.randn(2, 6, 3, 5, 8)
    x[1, 0, 0, 0, 0] = 1e30
    got, expected, made = run_prepared(Then(layer(6, 20, 3, **TWO), behind).eval(), x, gathered=True, twice=True)
    assert ("the convolution again" in str(made.schedule)) == twice, made.schedule
    assert torch.equal(got.isnan(), expected.isnan())
    if "softmax" in name:
        sums = got.flatten(2).sum(-1)
        assert ((sums - expected.flatten(2).sum(-1)).abs() <= 1e-3 * sums.abs()).all()
