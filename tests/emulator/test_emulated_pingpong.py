"""Tiles for each warpgroup: what the kernels give, and that what they wait for and choose is needed."""

from __future__ import annotations

import pytest
import torch
from emulator import device
from emulator.device import EmulationError, needs_compiler
from orientation import pingpong_always
from test_emulated_folds import LIMIT, assert_near, run_prepared
from torch import nn

pytestmark = needs_compiler

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Up = nn.ConvTranspose3d
#: modules, sizes of x
CASES: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "runs of classes": ([Up(32, 48, 3, 2, 1), nn.Hardtanh()], (3, 32, 5, 6, 19)),
    "chunks of channels": ([Up(48, 48, 3, bias=False), nn.ReLU()], (2, 48, 6, 7, 18)),
    "tiles of channels": ([Up(16, 136, 2, 2), nn.Tanh()], (2, 16, 4, 8, 12)),
    "groups": ([Up(64, 64, 3, 2, 1, groups=2), nn.ReLU()], (3, 64, 4, 6, 17)),
    "a softmax": ([Up(16, 32, 3, 2, 1, 1), nn.Softmax(1)], (2, 16, 4, 8, 8)),
    "a sum of channels": ([Up(16, 24, 3, 2), nn.LogSoftmax(1)], (2, 16, 3, 5, 9)),
    "a max pool": ([Up(16, 32, 3, 2, 1, 1), nn.SiLU(), nn.MaxPool3d(2)], (3, 16, 6, 8, 16)),
    "a mean": ([Up(24, 32, 3, 2, 1, 1), nn.AvgPool3d(2)], (3, 24, 6, 8, 16)),
    "statistics": ([Up(16, 16, 3, 2, 1), nn.SiLU(), nn.GroupNorm(4, 16)], (3, 16, 5, 6, 17)),
    "classes without taps": ([Up(16, 20, (3, 1, 2), (2, 2, 3)), nn.ReLU()], (2, 16, 4, 5, 9)),
    "one tile": ([Up(16, 24, 3, 2, 1), nn.ReLU()], (1, 16, 2, 3, 4)),
}


def check(name: str, dtype: torch.dtype, *, last: bool = False) -> None:
    modules, sizes = CASES[name]
    if name == "a mean" and dtype is not F32:
        pytest.skip("torch's CPU operators have no pool of 16-bit numbers")
    torch.manual_seed(0)
    model, x = nn.Sequential(*modules).to(dtype).eval(), torch.randn(*sizes).to(dtype)
    with pingpong_always():
        got, expected, made = run_prepared(model, x, last=last)
    assert made.convolution is not None and made.convolution.made.pingpong
    assert_near(got, expected, LIMIT[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_warpgroup_has_tiles(name: str, dtype: torch.dtype, last: bool) -> None:
    check(name, dtype, last=last)


TILES, COPIES, WGMMA = "conv_tiles.cuh", "conv_copies.cuh", "conv_wgmma.cuh"
GROUP = "if (Problem::pingpong) t.group = next(g.by_groups, g.groups);"
WEIGHTS = "copy_bytes(stages, weights + (int64_t)(t.group * g.column_tiles + t.column) * g.weight_bytes"
SLOT = "return number * kSharing<Problem> + group % kSharing<Problem>;"
#: the case that should see it, header, text, what stands there instead
BROKEN: dict[str, tuple[str, str, str, str]] = {
    "weights too early": ("runs of classes", WGMMA, "barrier_wait(&common.weights, 0);", ";"),
    "another chunk's": ("chunks of channels", WGMMA, "chunk * Problem::chunk_weights, pass", "0, pass"),
    "another group's": ("groups", TILES, GROUP, GROUP.replace("t.group = ", "t.group = 0 * ")),
    "other channels'": ("tiles of channels", COPIES, WEIGHTS, "copy_bytes(stages, weights"),
    "the same tiles": ("runs of classes", TILES, "blockIdx.x + team * gridDim.x", "blockIdx.x"),
    "not all tiles": ("runs of classes", TILES, "kTeams<Problem> * gridDim.x;", "4 * gridDim.x;"),
    "the other team's x": ("runs of classes", WGMMA, "outbox(group), x + team * x_bytes,", "outbox(group), x,"),
    "slots of statistics": ("statistics", TILES, SLOT, "return number * kConsumers + group;"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str) -> None:
    name, *how = BROKEN[why]
    with device.broken(*how), pytest.raises((AssertionError, EmulationError)):
        _some(name)


def _some(name: str) -> None:
    for dtype in (F16, F32):
        check(name, dtype)


@pytest.mark.parametrize(
    ("text", "instead", "why"),
    [
        ("lane == 0 && awaited-- > 0", "lane == 0", "nobody has waited for the one before"),
        ("awaited = left - team;", "awaited = left - 1;", "nothing goes on"),
    ],
    ids=["told and not waited for", "waited for and not told"],
)
def test_as_many_turns_are_told_as_are_waited_for(text: str, instead: str, why: str) -> None:
    with device.broken(COPIES, text, instead), pytest.raises(EmulationError, match=why):
        _some("runs of classes")
