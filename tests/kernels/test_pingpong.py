"""Tiles for each warpgroup: for which layers, how many thread blocks, and what their kernels have in shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.kernels.convolution import adapted
from fxfuse.kernels.convolution.adapted import as_pingpong, may_pingpong
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import CONSUMERS, Shared, Specialisation
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiling import PROCESSORS, Store

F32, F16 = torch.float32, torch.float16
ONE, TWO, NONE = (1, 1, 1), (2, 2, 2), (0, 0, 0)
#: of a decoder: 32 channels to 16, of twice the size
DECODER = Layer(32, 16, 1, (3, 3, 3), TWO, ONE, ONE)


def kernels(layer: Layer, stored: tuple[int, int, int], dtype: torch.dtype = F32, **more: Any) -> Convolution:
    return Convolution.of(layer, dtype, dtype, dtype, Epilogue(), extents=stored, samples=16, **more)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_rows_of_whole_sectors_are_stored_from_registers(dtype: torch.dtype) -> None:
    made = kernels(DECODER, (32, 64, 64), dtype).made
    assert made.pingpong and made.x_buffers == 2 and made.stages == 1
    assert made.weight_bytes <= made.stage_bytes < made.weight_bytes + 1024
    assert kernels(DECODER, (32, 64, 64), dtype).stores == (Store.DIRECT,)
    # the rows that each warpgroup has, as it had half of a tile's
    assert made.rows * CONSUMERS == dataclasses.replace(made, pingpong=False).rows


@pytest.mark.parametrize(
    ("why", "layer", "stored", "more"),
    [
        ("results go through shared memory", DECODER, (31, 63, 63), {}),
        ("and of a stride of one", Layer(16, 32, 1, (3, 3, 3), ONE, NONE, ONE), (34, 34, 34), {}),
        ("too many weights", dataclasses.replace(DECODER, in_channels=256, out_channels=64), (32, 64, 64), {}),
        (
            "channels are rows",
            dataclasses.replace(DECODER, out_channels=64, kernel=TWO, padding=NONE),
            (32, 64, 64),
            {},
        ),
        ("float32's own accuracy", DECODER, (32, 64, 64), {"exact": True}),
    ],
)
def test_others_share_tiles(why: str, layer: Layer, stored: tuple[int, int, int], more: dict[str, Any]) -> None:
    assert not kernels(layer, stored, **more).made.pingpong, why


def test_what_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made = specialise(DECODER, pooled=False, finite=True)
    assert may_pingpong(made) and not may_pingpong(dataclasses.replace(made, exact=True))
    assert not may_pingpong(dataclasses.replace(made, samples=16))
    chunks = specialise(dataclasses.replace(DECODER, in_channels=80, stride=ONE), pooled=False)
    assert len(chunks.passes) == 1 and not chunks.resident and may_pingpong(chunks)
    several = specialise(dataclasses.replace(DECODER, in_channels=80, out_channels=64), pooled=False)
    assert len(several.passes) > 1 and not several.resident and not may_pingpong(several)
    groups = specialise(dataclasses.replace(DECODER, groups=PROCESSORS + 1), pooled=False)
    assert not may_pingpong(groups) and may_pingpong(dataclasses.replace(groups, layer=DECODER))
    # and only where it is worth it
    how = {"samples": 16, "stored": (32, 64, 64), "row": 64, "itemsize": 4, "keeps": True}
    assert as_pingpong(made, **how).pingpong  # type: ignore[arg-type]
    monkeypatch.setattr(adapted, "WORTH_A_TILE_EACH", 2.0)
    assert as_pingpong(made, **how) is made  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (136, 1), (64, 4)])
@pytest.mark.parametrize("tiles", [1, 2, 50, 10000])
@pytest.mark.parametrize("processors", [132, 7, 3])
def test_thread_blocks_keep_their_weights(channels: int, groups: int, tiles: int, processors: int) -> None:
    """Their tiles are those of one group and tile of channels; as many blocks as there are multiprocessors, about."""
    layer = dataclasses.replace(DECODER, out_channels=channels, groups=groups)
    shared = specialise(layer, pooled=False)
    made = dataclasses.replace(shared, pingpong=True, stages=1)
    apart = groups * made.column_tiles
    blocks = made.blocks(tiles * apart, processors)
    assert blocks % apart == 0 and apart <= blocks <= max(tiles * apart, apart)
    assert blocks <= max(processors, apart) < blocks + apart or tiles * apart < processors
    assert shared.blocks(tiles * apart, processors) == min(tiles * apart, processors)


def test_two_runs_share_packed_weights() -> None:
    """What lies in shared memory, and for how long, leaves them as they are."""
    shared = specialise(DECODER, pooled=False, finite=True)
    assert dataclasses.replace(shared, pingpong=True, stages=1).shared(shared) is Shared.ALL


def test_a_report_says_so() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(32, 16, 3, stride=2, padding=1, output_padding=1), nn.ReLU()).eval()
    (region,) = fxfuse.explain(model, torch.zeros(16, 32, 16, 32, 32)).regions
    facts = dict(next(p for p in region.account.parts if p.facts).facts)
    assert "each warpgroup has its own; 100 % of the rows" in facts["tile"]
    assert facts["shared memory"].endswith("all weights, 2 of x for each warpgroup")


def test_weights_lie_where_steps_find_them() -> None:
    """One behind the other, those of all passes: steps count from the first."""
    layer = dataclasses.replace(DECODER, out_channels=64)
    made: Specialisation = kernels(layer, (32, 64, 64)).made
    assert made.pingpong and len(made.passes) > 1
    source = kernels(layer, (32, 64, 64)).source()
    (line,) = [line for line in source.splitlines() if "kSteps[]" in line]
    steps = [tuple(map(int, s.split(", "))) for s in line[line.index("{{") + 2 : line.rindex("}}")].split("}, {")]
    expected, at = [], 0
    for step in (s for p in made.passes for s in p.steps):
        expected.append(at)
        at += made.step_bytes(step) // 16
    assert [s[4] for s in steps] == expected and at * 16 == made.weight_bytes
