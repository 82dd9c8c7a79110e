"""Convolutions whose matrix rows are output channels: what they store by whole sectors, and statistics of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from emulator import device
from emulator.device import EmulationError, needs_compiler
from orientation import by_channel_always
from test_emulated_folds import BF16, F16, F32, INF, LIMIT, NAN, Then, assert_near, layer, run_prepared, samples
from torch import nn

from fxfuse.kernels.convolution.tiles import Tiling
from fxfuse.kernels.convolution.tiling import Store
from fxfuse.kernels.runtime.prepared import Prepared

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def by_channel() -> Iterator[None]:
    with by_channel_always():
        yield


def tiling_of(made: Prepared) -> Tiling:
    """The tiles of what ran, which is stored by sectors."""
    assert made.convolution is not None and made.schedule.kernel is not None
    assert made.convolution.made.by_channel
    tiling, store = made.convolution.tiling(made.schedule.kernel.sizes)
    assert store in (Store.SECTORS, Store.STREAM)
    return tiling


#: model, sizes of x, dtype, float32's own accuracy, how many elements of rows follow each other: planes, rows
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool]] = {
    "planes, an odd channel size": (lambda: layer(8, 64, 3), (3, 8, 3, 5, 9), F32, False),
    "planes, an even channel size": (lambda: layer(8, 64, 3), (2, 8, 4, 6, 30), F32, False),
    "rows of several planes": (lambda: layer(8, 64, 2, stride=2), (2, 8, 3, 3, 9), F32, False),
    "rows that fill no tile": (lambda: layer(20, 48, 5, bias=False), (2, 20, 2, 3, 41), F32, False),
    "many tiles": (lambda: layer(3, 128, (1, 3, 3), padding=(0, 1, 1)), (2, 3, 2, 40, 37), F32, False),
    "float16": (lambda: layer(16, 100, 3, F16), (2, 16, 3, 6, 29), F16, False),
    "float16, rows of an odd size": (lambda: layer(16, 64, 4, F16), (2, 16, 3, 6, 30), F16, False),
    "bfloat16, two dims": (lambda: layer(40, 64, 3, BF16, 2), (2, 40, 9, 21), BF16, False),
    "one dim": (lambda: layer(8, 64, 5, F32, 1, padding=2), (2, 8, 300), F32, False),
    "classes along w, whole sectors": (lambda: layer(8, 64, 2, stride=2), (2, 8, 3, 5, 32), F32, False),
    "classes along w, two rows at once": (lambda: layer(8, 64, 2, stride=2), (2, 8, 5, 3, 16), F32, False),
    "classes along w, planes": (lambda: layer(8, 64, (3, 3, 2), stride=(2, 1, 2)), (2, 8, 3, 5, 17), F32, False),
    "three classes along w": (lambda: layer(8, 64, 3, F32, 2, stride=(1, 3)), (2, 8, 5, 24), F32, False),
    "classes along w, float16": (lambda: layer(8, 64, 2, F16, stride=2), (2, 8, 3, 5, 32), F16, False),
    "groups, dilation": (lambda: layer(12, 128, 2, groups=2, dilation=(1, 2, 3)), (2, 12, 4, 5, 11), F32, False),
    "taps far apart": (
        lambda: layer(8, 64, (1, 1, 3), dilation=(1, 1, 100), padding=(0, 0, 99)), (2, 8, 2, 9, 7), F32, False,
    ),
    "rows of which a part has few elements": (
        lambda: layer(8, 64, (1, 1, 3), dilation=(1, 1, 120), padding=(0, 0, 118)), (2, 8, 2, 9, 13), F32, True,
    ),
    "a row whose last part has few elements": (
        lambda: layer(8, 64, (1, 1, 3), F16, dilation=(1, 1, 120), padding=(0, 0, 118)), (2, 8, 1, 1, 13), F16, False,
    ),
    "float32's own accuracy": (lambda: layer(24, 64, 3), (3, 24, 3, 5, 9), F32, True),
    "float32's own accuracy, classes": (lambda: layer(24, 64, 2, stride=2), (3, 24, 2, 5, 16), F32, True),
    "numbers per channel": (
        lambda: Then(layer(8, 64, 3), lambda y, g, h: F.relu(y * g + h), torch.randn(64, 1, 1, 1),
                     torch.randn(64, 1, 1, 1)),
        (2, 8, 3, 5, 9), F32, False,
    ),
    "more numbers per channel than are kept": (
        lambda: Then(layer(8, 64, 3), lambda y, *g: (((y * g[0] + g[1]) * g[2] + g[3]).tanh() * g[4] + g[5]) * g[4],
                     *(torch.randn(64, 1, 1, 1) for _ in range(6))),
        (2, 8, 3, 5, 9), F32, False,
    ),
    "numbers per position": (
        lambda: Then(layer(8, 64, 3), lambda y, g, r: F.silu(y + g) * r, torch.randn(5, 7, 11),
                     torch.randn(2, 64, 5, 7, 11)),
        (2, 8, 3, 5, 9), F32, False,
    ),
    "numbers per position, classes along w": (
        lambda: Then(layer(8, 64, 2, stride=2), lambda y, g: y * g, torch.randn(6, 10, 32)),
        (2, 8, 3, 5, 16), F32, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sectors(name: str) -> None:
    model, sizes, dtype, exact = CASES[name]
    torch.manual_seed(1)
    x = samples(*sizes, dtype=dtype) if len(sizes) > 3 else torch.randn(sizes)
    got, expected, made = run_prepared(model().to(dtype).eval(), x, exact=exact)
    tiling_of(made)
    assert_near(got, expected, 1e-6 if exact else LIMIT[dtype])


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("left", [1, 2, 3, 5])
def test_a_part_of_less_than_a_unit(left: int, dtype: torch.dtype) -> None:
    """Of the last tile of a plane one warpgroup stores `left` elements: they lie anywhere in 16 bytes."""
    torch.manual_seed(2)
    sizes = ((h, w) for h in range(6, 60) for w in range(16, 40) if (h * w - 1) % 64 + 1 == left)
    for height, width in sizes:
        model = layer(8, 64, (1, 1, 1), dtype).eval()
        got, expected, made = run_prepared(model, torch.randn(2, 8, 3, height, width).to(dtype))
        assert_near(got, expected, LIMIT[dtype])
        tiling, part = tiling_of(made), len(tiling_of(made).row_base) // 2 * 64
        if tiling.linear and (height * width - 1) % part + 1 == left:
            return
    raise AssertionError("no such size")


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics(stride: int, dtype: torch.dtype) -> None:
    """Means far from zero; samples that 16-bit numbers cannot hold; what is stored is what they are of."""
    torch.manual_seed(3)
    model = nn.Sequential(layer(8, 100, 4 - stride, dtype, stride=stride), nn.ReLU(), nn.InstanceNorm3d(100)).train()
    with torch.no_grad():
        model[0].bias.mul_(10)  # type: ignore[union-attr, operator]
    x = torch.randn(3, 8, 3, 5, 16).to(dtype)
    got, expected, made = run_prepared(model, x)
    tiling_of(made)
    assert "and statistics" in str(made.schedule)
    assert_near(got, expected, 4 * LIMIT[dtype])


@pytest.mark.parametrize("sizes", [(3, 8, 3, 5, 16), (2, 8, 4, 7, 9), (2, 8, 2, 3, 41)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_alone(stride: int, sizes: tuple[int, ...]) -> None:
    """Nothing is stored: tiles need fill no sectors."""
    torch.manual_seed(5)
    mean = Then(layer(8, 100, 4 - stride, stride=stride), lambda y: F.silu(y).mean((2, 3, 4), keepdim=True))
    norm = nn.Sequential(layer(8, 100, 4 - stride, stride=stride), nn.BatchNorm3d(100), nn.AdaptiveAvgPool3d(1))
    for model in (mean.eval(), norm.train()):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            x = torch.randn(sizes).contiguous(memory_format=layout)
            got, expected, made = run_prepared(copy.deepcopy(model), x)
            kernel = made.schedule.kernel
            assert made.convolution is not None and made.convolution.made.by_channel
            assert kernel is not None and kernel.gathers and not kernel.keeps
            assert_near(got, expected, 4 * LIMIT[F32])


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize(("of", "dtype"), [("x", F32), ("x", F16), ("weight", F32)], ids=str)
def test_values_that_are_not_finite(of: str, dtype: torch.dtype, value: float) -> None:
    torch.manual_seed(4)
    convolution, x = layer(8, 64, 3, dtype, 2), torch.randn(2, 8, 7, 18).to(dtype)
    with torch.no_grad():
        (x if of == "x" else convolution.weight)[1, 5, 2, 1] = value  # type: ignore[index]
    got, expected, made = run_prepared(Then(convolution, F.relu), x)
    tiling_of(made)
    assert 0 < (~expected.isfinite()).sum() < expected.numel() / 4 or value == -INF
    assert torch.equal(got.isposinf(), expected.isposinf())
    assert_near(got, expected, LIMIT[dtype])


#: a wait that is left out, or a sum that is wrong
BROKEN = {
    "read before it is written": (
        "__syncwarp();\n          send(sent", "send(sent"),
    "written before it is read": (
        "          }\n          __syncwarp();\n        }\n      }\n  }", "          }\n        }\n      }\n  }"),
    "a run of another tile": (" && known[3] == t.skip) return;", ") return;"),
    "incomplete sectors are forgotten": ("if (turn + 1 < Table::turns) {", "if (false) {"),
    "elements outside count": (
        "results(value(at), q, k), within(at))", "results(value(at), q, k), true)"),
    "a run is read before it is written": (
        "          __syncwarp();\n#pragma unroll\n          for (int h", "#pragma unroll\n          for (int h"),
    "a run is written before it is read": (
        "          __syncwarp();  // it has been read, and what was sent\n", ""),
    "what a run's sector has is forgotten": (
        "          if (turn > 0) ((uint2*)(mine + (begin + shift & ~(align - 1)) - frame))[part] = rest;\n", ""),
    "a run begins with its sector": ("from = max(sector, sent.shift)", "from = sector"),
    "where a run ends is forgotten": ("end = i == 0 ? from : to", "end = from"),
}  # fmt: skip


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    """Each of these, left out, gives a wrong value for some model above."""
    header = "conv_lines.cuh" if "another tile" in why else "conv_sectors.cuh"
    with device.broken(header, *BROKEN[why]), pytest.raises((AssertionError, EmulationError)):
        _some(why)


def _some(why: str) -> None:
    """Of the tests above those that should see it."""
    if "count" in why:
        test_statistics(1, F32)
    else:
        of_runs = ("many tiles", "planes, an odd channel size", "taps far apart")
        for name in of_runs if "run" in why else ("rows of several planes", "classes along w, two rows at once"):
            test_sectors(name)
