"""Rows of 16-bit numbers, eight neighbours read together: the bits of those made one by one."""

from __future__ import annotations

import math

import pytest
import torch
from emulator import device
from emulator.device import EmulationError, needs_compiler
from test_emulated_folds import run_prepared
from torch import Tensor, nn

from fxfuse.kernels.convolution.lies import at_once_of
from fxfuse.kernels.runtime import convolution_engine

pytestmark = needs_compiler

F16, BF16 = torch.float16, torch.bfloat16
#: channels of x, of the output, groups, positions per dim
CASES = {
    "whole blocks": (32, 16, 1, (8, 8, 8)),
    "a part of a block": (16, 24, 1, (3, 5, 8)),
    "padding": (33, 16, 1, (2, 4, 5)),
    "two blocks of channels": (72, 16, 1, (4, 2, 9)),
    "groups": (40, 32, 2, (3, 4, 6)),
    "many positions": (16, 16, 1, (9, 16, 16)),
}


def made(name: str, dtype: torch.dtype, at_once: bool, monkeypatch: pytest.MonkeyPatch, odd: float = 1.0) -> Tensor:
    channels, out, groups, sizes = CASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose3d(channels, out, 3, 2, 1, groups=groups), nn.ReLU()).to(dtype).eval()
    x = torch.randn(3, channels, *sizes).to(dtype)
    x[1, 2, 1, 1, 1] = odd
    assert at_once_of(x) == 8
    with monkeypatch.context() as patch:
        if not at_once:
            patch.setattr(convolution_engine, "at_once_of", lambda _: 0)
        got, expected, _ = run_prepared(model, x)
    assert torch.equal(got.isnan(), expected.isnan())
    return got


@pytest.mark.parametrize("odd", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("watched", [False, True])
def test_the_same_bits(
    name: str, dtype: torch.dtype, odd: float, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if watched:
        monkeypatch.setattr("fxfuse.kernels.convolution.kernels.WATCHING", -math.inf)
    together, apart = (made(name, dtype, at_once, monkeypatch, odd) for at_once in (True, False))
    assert torch.equal(together.nan_to_num(7), apart.nan_to_num(7))


def test_what_is_read_together() -> None:
    x = torch.zeros(2, 8, 4, 4, 8, dtype=F16)
    assert at_once_of(x) == 8 and at_once_of(x.float()) == 4
    assert at_once_of(x[..., :4]) == 0  # rows apart
    assert at_once_of(torch.zeros(2, 8, 3, 3, 4)) == 4 and at_once_of(torch.zeros(2, 8, 3, 3, 4, dtype=F16)) == 0
    assert at_once_of(torch.zeros(2 * 8 * 64 + 1, dtype=F16)[1:].view(2, 8, 4, 4, 4)) == 0
    assert at_once_of(x.contiguous(memory_format=torch.channels_last_3d)) == 0


BROKEN = {
    "neighbours": ("q % 2 ? 0x7632 : 0x5410", "q % 2 ? 0x5410 : 0x7632"),
    "padding": ("(const uint4*)from : make_uint4(0, 0, 0, 0);", "(const uint4*)from : make_uint4(~0u, 0, 0, 0);"),
    "another block of channels": ("row0 = (block_rest - n * blocks_y) * 64;", "row0 = 0;"),
    "another group": ("const int channel = group * g.channels + c;", "const int channel = c;"),
    "too few": ("positions - first) / 8;", "positions - first) / 8 - 1;"),
}


@pytest.mark.parametrize("why", BROKEN)
def test_what_is_broken_shows(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"padding": "padding", "another group": "groups", "another block of channels": "two blocks of channels"}
    name = cases.get(why, "a part of a block")
    right = made(name, F16, True, monkeypatch)
    with device.broken("prepare.cuh", *BROKEN[why]), pytest.raises((AssertionError, EmulationError)):
        assert torch.equal(made(name, F16, True, monkeypatch), right)
