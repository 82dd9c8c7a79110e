"""Results that both warpgroups put into shared memory together, and that go from there as runs, beside float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, emulated, needs_compiler
from orientation import by_channel_never
from test_emulated_folds import BF16, F16, F32, LIMIT, TWO, Then, assert_near, layer, run_prepared, samples
from torch import Tensor, nn

from fxfuse.kernels.convolution import planar
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.tiles import Tiling, positions_over
from fxfuse.kernels.convolution.tiling import Store
from fxfuse.kernels.runtime.convolution_engine import Calls
from fxfuse.kernels.runtime.prepared import Prepared

pytestmark = needs_compiler


def run_joint(
    model: nn.Module, x: Tensor, *, exact: bool = False, **how: bool
) -> tuple[Tensor, Tensor, Prepared, Tiling]:
    """As :func:`run_prepared`, with the tiles last, whose rows both warpgroups share."""
    with by_channel_never():
        got, expected, made = run_prepared(model, x, exact=exact, **how)
    assert made.convolution is not None and made.schedule.kernel is not None
    tiling, store = made.convolution.tiling(made.schedule.kernel.sizes)
    assert store is Store.JOINT and tiling.joint and tiling.over == positions_over(made.convolution.made, x.itemsize)
    return got, expected, made, tiling


#: model, sizes of x, dtype, float32's own accuracy; tiles per plane, residue classes per pass
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool, int, int]] = {
    "tiles that end in a plane": (lambda: layer(8, 70, 3, **TWO), (2, 8, 3, 11, 48), F32, False, 3, 4),
    "planes of two classes along d": (lambda: layer(9, 16, 3, **TWO), (2, 9, 3, 15, 32), F32, False, 3, 8),
    "rows of one tile": (lambda: layer(8, 20, 3, stride=2), (2, 8, 2, 2, 200), F32, False, 3, 4),
    "a border": (lambda: layer(8, 20, 5, stride=2, output_padding=1), (2, 8, 2, 9, 45), F32, False, 3, 4),
    "float16": (lambda: layer(16, 40, 3, F16, **TWO), (2, 16, 3, 11, 48), F16, False, 3, 4),
    "float16, planes of two classes": (lambda: layer(8, 12, 3, F16, **TWO), (2, 8, 2, 8, 47), F16, False, 2, 8),
    "bfloat16, two dims": (lambda: layer(16, 64, 4, BF16, 2, **TWO), (2, 16, 11, 45), BF16, False, 3, 4),
    "classes along w": (lambda: layer(8, 24, 3, F32, 2, stride=(1, 2)), (2, 8, 20, 50), F32, False, 3, 2),
    "classes along h, groups": (
        lambda: layer(12, 40, 3, stride=(1, 3, 1), groups=2), (2, 12, 2, 9, 44), F32, False, 2, 3
    ),
    "numbers per position": (
        lambda: Then(layer(8, 20, 3, **TWO), lambda y, r: y * r, torch.randn(5, 21, 95)),
        (2, 8, 3, 11, 48), F32, False, 3, 4,
    ),
    "float32's own accuracy": (lambda: layer(24, 32, 3, **TWO), (2, 24, 2, 11, 48), F32, True, 3, 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel reads x as it lies."""
    monkeypatch.setattr(planar, "MOST_CHANNELS", 0)


@pytest.mark.parametrize("name", CASES)
def test_runs_of_both_warpgroups(name: str) -> None:
    model, sizes, dtype, exact, tiles, classes = CASES[name]
    torch.manual_seed(1)
    behind = Then(model(), lambda y: F.silu(y) + 1).to(dtype).eval()
    got, expected, made, tiling = run_joint(behind, samples(*sizes, dtype=dtype), exact=exact)
    assert tiling.counts[1] == tiles and made.convolution is not None and made.convolution.made.residues == classes
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_statistics_of_both_warpgroups(dtype: torch.dtype) -> None:
    """What two tiles have is counted once: of means far from zero, a few elements more show."""
    torch.manual_seed(3)
    model = nn.Sequential(layer(8, 24, 3, dtype, **TWO), nn.SiLU(), nn.InstanceNorm3d(24)).train()
    with torch.no_grad():
        model[0].bias.add_(10)  # type: ignore[union-attr, operator]
    got, expected, made, tiling = run_joint(model, torch.randn(2, 8, 3, 11, 48).to(dtype))
    assert "and statistics" in str(made.schedule) and tiling.counts[1] == 3
    assert_near(got, expected, 4 * LIMIT[dtype])


def test_reductions_of_both_warpgroups() -> None:
    torch.manual_seed(4)
    model = Then(layer(8, 24, 3, **TWO), lambda y: y.softmax(1))
    got, expected, made, tiling = run_joint(model, torch.randn(2, 8, 2, 10, 48))
    assert "softmax" in str(made.schedule) and tiling.counts[1] == 2
    assert_near(got, expected, LIMIT[F32])


def convolve() -> None:
    """A convolution alone, whose errors no region meets with torch's operators."""
    sizes, out = (2, 7, 48), (3, 13, 95)
    layer = Layer(8, 40, 1, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    made = Convolution.of.__wrapped__(layer, F32, F32, F32, Epilogue(), extents=out)
    assert made.tiling(out)[1] is Store.JOINT
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g) for s in ((2, 8, *sizes), (8, 40, 3, 3, 3)))
    with emulated() as given:
        got = given.empty((2, 40, *out), (40 * 3705, 3705, 1235, 95, 1), F32)
        Calls(made, out).run(x, w, None, got)
    assert_near(got, F.conv_transpose3d(x, w, stride=2, padding=1), LIMIT[F32])


def test_a_convolution_alone() -> None:
    convolve()


#: what is left out or wrong, where both fill the same blocks
BROKEN = {
    "a block is sent when one has filled it": ("barrier_init(&full[i], 4 * groups)", "barrier_init(&full[i], 4)"),
    "what the next tile begins with is not there": (
        "(t.h + g.box_h) * o.step_h < o.size_h ? align - 1 : 0", "false ? align - 1 : 0"),
    "one sends what the other does": ("mine = outbox.turn == sender", "mine = true"),
    "one sends all": ("outbox.turn = 0;", "outbox.turn = sender;"),
    "what the last pass sends is not known yet": ("__syncwarp();  // what was there has been read", ""),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    with device.broken("conv_outbox.cuh", *BROKEN[why]), pytest.raises((AssertionError, EmulationError)):
        convolve()
