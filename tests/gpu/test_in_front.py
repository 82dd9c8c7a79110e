"""Chains in front of a convolution, on a GPU or an emulated one: in the kernels that read x, or ahead of them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from unittest import mock

import many_chains
import pytest
import torch
import torch.nn.functional as F
from fronts import BF16, F16, F32, FORMS, FRONTS, TWO, Behind, behind
from place import DEVICE, kernels_always, needs, what_torch_has
from stages import LAST, LIMIT, NORMS, Stages, check, made, sample, spread, steps_run
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.convolution import kernels as convolution_kernels
from fxfuse.kernels.plan import Path

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))


@pytest.fixture
def rows() -> Iterator[None]:
    """No kernel reads x where it lies in planes."""
    with kernels_always(planes=False):
        yield


def inside() -> bool:
    """Whether the chain of what ran is in the kernels that read x."""
    kernels = [p.schedule.kernel for p in execute._prepared.values() if p is not None]
    assert kernels
    return all(k is not None and k.front is not None for k in kernels)


def results(model: nn.Module, x: Tensor, *, last: bool = False, exact: bool = False) -> tuple[Tensor, Tensor]:
    """What the kernels make of x, and the same in float64. ``last``: channels are neighbours."""
    model = model.to(DEVICE).eval()
    chosen: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if last:
        x, model = x.contiguous(memory_format=LAST[x.dim()]), model.to(memory_format=LAST[x.dim()])
        if DEVICE == "cpu":  # results in the format that cuDNN would choose
            chosen = mock.patch.object(torch._C, "_conv_determine_backend_memory_format", many_chains._as_cudnn)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact), what_torch_has(), chosen:
        fast = fxfuse.optimize(copy.deepcopy(model), (x,))
        with ops.watch() as runs:
            got = fast(x)
        assert [r.path for r in runs] == [Path.KERNEL], fast.fxfuse_report
        return got, model.double()(x.double())


def assert_near(got: Tensor, expected: Tensor, limit: float) -> None:
    """Sample by sample: a large one hides no other. Values near the largest of float32 are large, and say no more."""
    for one, like in zip(got.double(), expected, strict=True):
        huge = like.abs() > 1e20
        assert torch.equal(one[huge].abs() > 1e20, torch.ones_like(one[huge], dtype=torch.bool))
        assert relative_error(one[~huge], like[~huge]) <= limit, steps_run()


@pytest.mark.parametrize("front", FRONTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, front: Callable[..., Tensor], rows: None) -> None:
    torch.manual_seed(3)
    _, sizes, dtype, last, exact = FORMS[name]
    x = sample(*sizes, dtype=dtype)
    if dtype is F32:  # a sample that 16-bit numbers cannot hold
        x[0, 0, 0].view(-1)[1], x[0, 0, 1].view(-1)[0] = math.nan, 3e30
    got, expected = results(behind(name, front), x, last=last, exact=exact)
    assert inside(), steps_run()
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_is_not_finite(
    dtype: torch.dtype, value: float, watched: bool, rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in eager mode: also where the chain makes a number of it."""
    if watched:
        monkeypatch.setattr(convolution_kernels, "WATCHING", -math.inf)
    torch.manual_seed(0)
    x = sample(3, 40, 3, 4, 8, dtype=dtype)
    x[1, 5, 1, 2, 3] = value
    model = Behind(lambda x: F.hardtanh(x, -2, 3), made(3, 40, 16, 3, groups=2, dtype=dtype, **TWO))
    got, expected = results(model, x)
    assert inside() and bool(expected.isnan().any()) == math.isnan(value)
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 24, 3, 4, 8), (2, 20, 3, 5, 7)], ids=str)
def test_a_cast(sizes: tuple[int, ...], dtype: torch.dtype, rows: None) -> None:
    """x of float32 becomes one of 16 bits: what autocast makes of it."""
    torch.manual_seed(0)
    layer = made(3, sizes[1], 16, 3, dtype=dtype, **TWO)
    got, expected = results(Behind(lambda x: F.silu(x).to(layer.weight.dtype), layer), sample(*sizes))
    assert inside()
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("runs", [1, 2])
def test_statistics_of_what_follows(runs: int) -> None:
    """Both runs of a convolution have the chain; what the first one made of x, the second one uses."""
    torch.manual_seed(0)
    model = Stages(nn.LeakyReLU(0.2), made(3, 16, 16, 3, **TWO), NORMS["instance"](16, 3).to(DEVICE), F.relu)
    with kernels_always(twice=runs == 2, planes=False):
        check(spread(model), sample(3, 16, 4, 5, 6))
        (ran,) = [p.schedule for p in execute._prepared.values() if p is not None]
        assert inside() and (ran.measuring is not None) == (runs == 2)
        assert ran.measuring is None or ran.measuring.front is not None


def test_runs_that_read_x_in_one_way_without_the_chain_and_in_two_with_it() -> None:
    """The second one uses of the first what both have with the chain in them."""
    torch.manual_seed(0)
    layer = made(3, 64, 16, 4, stride=3, padding=1, groups=8, output_padding=(0, 2, 1), dtype=F16)
    model = Stages(nn.GELU(), layer, nn.InstanceNorm3d(16))
    with kernels_always(twice=True):
        got, expected = results(model, sample(1, 64, 11, 5, 5, dtype=F16), last=True)
        (ran,) = [p for p in execute._prepared.values() if p is not None]
        assert ran.measuring is not None and ran.convolution is not None and inside()
        assert ran.schedule.kernel is not None
        assert ran.schedule.kernel.shares is ran.convolution.made.shared(ran.measuring.made)
        assert_near(got, expected, LIMIT[F16])


def ahead() -> list[str]:
    """What ran ahead of the convolution's kernel, which has no chain in it."""
    (ran,) = [p.schedule for p in execute._prepared.values() if p is not None]
    assert ran.kernel is not None and ran.kernel.front is None
    return [str(s) for s in ran.ahead]


def test_a_norm() -> None:
    """Statistics are gathered in a pass of their own; what is made of them is in the kernels that read x."""
    torch.manual_seed(0)
    model = Stages(NORMS["instance"](16, 3).to(DEVICE), nn.LeakyReLU(0.1, inplace=True), made(3, 16, 8, 2, stride=2))
    with kernels_always():
        check(spread(model), sample(3, 16, 4, 5, 6) * 3 + 5, "statistics of x", "leaky_relu > conv_transpose")
        assert inside()


def test_a_pool() -> None:
    """It stores what the convolution reads."""
    torch.manual_seed(0)
    with kernels_always():
        check(Stages(nn.AvgPool3d(2), torch.tanh, made(3, 16, 8, 2, stride=2)), sample(3, 16, 4, 6, 6))
        assert ahead() == ["one kernel: avg_pool 2x2x2 > tanh -> f32[3, 16, 2, 3, 3]"]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rows_that_lie_in_x(dtype: torch.dtype) -> None:
    """Others are made of them."""
    torch.manual_seed(0)
    model = Stages(nn.GELU(), made(3, 16, 8, 2, stride=2, dtype=dtype))
    with kernels_always():
        assert_near(*results(model, sample(3, 16, 4, 6, 6, dtype=dtype), last=True), LIMIT[dtype])
        assert inside()


def test_planes() -> None:
    """Nor is there a place for it where x is multiplied as it lies."""
    torch.manual_seed(0)
    with kernels_always():
        check(Stages(nn.GELU(), made(3, 3, 16, 3, **TWO)), sample(16, 3, 4, 8, 32))
        assert ahead() == ["one kernel: gelu -> f32[16, 3, 4, 8, 32]"]


def test_a_cast_to_a_wider_dtype() -> None:
    """It is a kernel of its own: those that measure x read float32."""
    torch.manual_seed(0)
    layer = made(3, 16, 8, 2, stride=2)
    with kernels_always():
        got, expected = results(Behind(lambda x: x.to(layer.weight.dtype), layer), sample(3, 16, 4, 6, 6, dtype=F16))
        assert ahead() == ["one kernel: cast -> f32[3, 16, 4, 6, 6]"]
        assert_near(got, expected, LIMIT[F32])


def test_weights_that_are_made_of_the_same() -> None:
    """They need what the chain stores."""

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sigmoid() - 0.5
            return F.conv_transpose3d(y, y).relu()

    torch.manual_seed(0)
    with kernels_always():
        check(Twice(), sample(8, 8, 3, 3, 3))
        ahead()


def test_an_empty_batch(rows: None) -> None:
    model = Stages(nn.GELU(), made(3, 16, 8, 2, stride=2))
    fast, nothing = fxfuse.optimize(model, (sample(2, 16, 4, 4, 4),)), sample(0, 16, 4, 4, 4)
    with torch.no_grad():
        assert fast(nothing).shape == model(nothing).shape
