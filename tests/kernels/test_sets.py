"""Kernels of which samples lie side by side in the rows of a matrix instruction: their tiles, and who has them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from orientation import of_sets, sets_always
from test_convolution import layers
from torch import nn

import fxfuse
from fxfuse.kernels.convolution import adapted
from fxfuse.kernels.convolution import specialise as specialising
from fxfuse.kernels.convolution.adapted import may_have_sets, with_sets
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.sets import SETS, copy_cycles, may_be_wide, outer_inner, set_tilings
from fxfuse.kernels.convolution.specialisation import CONSUMERS, ROWS, Shared, Specialisation, Unsupported
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiles import region_stride
from fxfuse.kernels.convolution.tiling import Store, seconds
from fxfuse.kernels.runtime.convolution_engine import Calls

F32, F16 = torch.float32, torch.float16
ONE, TWO = (1, 1, 1), (2, 2, 2)
#: of the generator: 512 channels of 4 x 4 x 4 positions
GENERATOR = Layer(512, 256, 1, (4, 4, 4), TWO, ONE, ONE)


def of_generator(dtype: torch.dtype = F32, samples: int = 64, layout: str = "contiguous", **more: Any) -> Convolution:
    epilogue = more.pop("epilogue", Epilogue())
    return Convolution.of(GENERATOR, dtype, dtype, dtype, epilogue, layout, extents=(8, 8, 8), samples=samples, **more)


# --- which kernels --------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_the_generator_has_sets(dtype: torch.dtype, layout: str) -> None:
    """Every row is one of an output's; passes are tiles of their own, or half of a GPU would have none."""
    made = of_generator(dtype, layout=layout).made
    tiling, store = of_generator(dtype, layout=layout).tiling((8, 8, 8))
    assert made.samples == 16 and made.by_pass and made.x_buffers == 2 and made.m_tiles == 2
    assert tiling.fit((4, 4, 4)) == 1.0
    assert store is (Store.WIDE if layout == "contiguous" else Store.CHANNELS)
    tiles = 4 * made.column_tiles * math.prod(tiling.counts) * len(made.passes)
    assert tiles == 256  # two for nearly each of 132
    usual = specialise(GENERATOR, pooled=False, contiguous=True, finite=True, stored=(8, 8, 8))
    row = 8 if layout == "contiguous" else 0
    assert seconds(made, 64, (4, 4, 4), (8, 8, 8), row, 4) < 1.5e-4 < seconds(usual, 64, (4, 4, 4), (8, 8, 8), 8, 4)


def test_the_generator_runs_as_a_kernel() -> None:
    model = nn.Sequential(
        nn.ConvTranspose3d(512, 256, 4, stride=2, padding=1, bias=False), nn.BatchNorm3d(256), nn.ReLU()
    ).eval()
    (region,) = fxfuse.explain(model, torch.zeros(64, 512, 4, 4, 4)).regions
    assert "one kernel" in region.plan
    facts = dict(next(p for p in region.account.parts if p.facts).facts)
    assert "of 16 samples side by side" in facts["tile"] and facts["tiles"] == "256"
    assert "each a tile of its own" in facts["residue classes"]


@pytest.mark.parametrize(
    ("why", "made"),
    [
        ("few samples", of_generator(samples=7)),
        ("unknown samples", of_generator(samples=0)),
        ("statistics", of_generator(epilogue=Epilogue(gathers=("statistics",)))),
        ("no values", of_generator(epilogue=Epilogue(gathers=("statistics",), keeps=False))),
        ("a pool", of_generator(epilogue=Epilogue(combine="Maximum"))),
        ("many positions", Convolution.of(GENERATOR, F32, F32, F32, Epilogue(), extents=(64, 64, 64), samples=64)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_has_no_sets(why: str, made: Convolution) -> None:
    assert made.made.samples == 1 and not made.made.by_pass, why


@pytest.mark.parametrize(
    "kind", [{"by_channel": True}, {"planar": 4}, {"pooled": True}, {"one": True}, {"merged": True}], ids=str
)
def test_kinds_of_kernels_that_have_none(kind: dict[str, Any]) -> None:
    usual = specialise(GENERATOR, pooled=False, contiguous=True, finite=True, stored=(8, 8, 8))
    assert may_have_sets(usual) and not may_have_sets(dataclasses.replace(usual, **kind))
    other = dataclasses.replace(usual, **kind)
    assert with_sets(other, 64, (8, 8, 8), 8, 4, keeps=True, finite=True) is other


def test_positions_side_by_side_have_none() -> None:
    layer = Layer(3, 16, 1, (3, 3, 3), TWO, ONE, ONE).side_by_side((2,))
    assert not may_have_sets(specialise(layer, pooled=False, contiguous=True, finite=True))


def test_sets_must_be_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = specialise(GENERATOR, pooled=False, contiguous=True, finite=True, stored=(8, 8, 8))
    assert with_sets(usual, 64, (8, 8, 8), 8, 4, keeps=True, finite=True).samples == 16
    monkeypatch.setattr(adapted, "WORTH_SETS", 1e3)
    assert with_sets(usual, 64, (8, 8, 8), 8, 4, keeps=True, finite=True) is usual


def test_outputs_that_fill_rows_by_themselves_have_none() -> None:
    """32 x 32 positions: of a plane an instruction has all."""
    layer = Layer(64, 64, 1, (1, 4, 4), (1, 2, 2), (0, 1, 1), ONE)
    assert Convolution.of(layer, F32, F32, F32, Epilogue(), extents=(1, 64, 64), samples=16).made.samples == 1


@given(layers(channels=20))
@example(Layer(16, 5, 1, TWO, TWO, (1, 0, 1), (1, 1, 2)))
def test_wide_stores_have_all_classes_along_w(layer: Layer) -> None:
    """In whichever order a pass has them: those of a position are one thread's, or stored one by one."""
    usual = specialise(layer, pooled=False, contiguous=True, finite=True, exact=True)
    for k in specialising.kernels_of_sets(usual, True) if may_have_sets(usual) else ():
        made = dataclasses.replace(k, samples=8, inner=1)
        along = [[r.at[2] for r in p.residues] for p in made.passes]
        paired = all(sorted(a[i : i + 2]) == [0, 1] for a in along for i in range(0, len(a), 2))
        if may_be_wide(made):
            assert layer.stride[2] == 1 or (layer.stride[2] == 2 and paired and made.pair != 0)


def test_samples_that_are_too_far_apart_are_refused() -> None:
    of = of_generator()
    calls = Calls(of, (8, 8, 8))
    x = torch.empty(64, 512, 4, 4, 4, device="meta")
    out = torch.empty_strided((64, 256, 8, 8, 8), (2**28, 512, 64, 8, 1), device="meta")
    with pytest.raises(Unsupported, match="further apart"):
        calls.run(x, torch.empty(512, 256, 4, 4, 4, device="meta"), None, out)


def test_a_second_run_uses_the_rows_of_a_first_one_without_sets() -> None:
    usual = specialise(GENERATOR, pooled=False, contiguous=True, finite=True, stored=(8, 8, 8))
    ours = with_sets(usual, 64, (8, 8, 8), 8, 4, keeps=True, finite=True)
    assert ours.shared(usual) is Shared.ROWS and dataclasses.replace(usual, samples=8).shared(usual) is Shared.ALL


# --- tiles ----------------------------------------------------------------------------------------
@given(layers(channels=20), st.tuples(*[st.integers(1, 6)] * 3), st.data())
def test_tiles_of_sets(layer: Layer, sizes: tuple[int, int, int], data: st.DataObject) -> None:
    """Every position of an output is in one tile, once; what its taps read is in the tile's region."""
    usual = specialise(layer, pooled=False, contiguous=False, finite=True)
    if not may_have_sets(usual):
        return
    stored = tuple(n * s for n, s in zip(sizes, layer.stride, strict=True))
    ways = of_sets(usual, True, stored, 0)  # type: ignore[arg-type]
    if not ways:
        return
    made = data.draw(st.sampled_from(ways))
    tiling = data.draw(st.sampled_from([*set_tilings(made, sizes)]))
    region = tiling.region
    box = {(z, o, i) for z, o, i in _positions(made, tiling.tile)}
    found = []
    for base in tiling.row_base:
        assert base % made.samples == 0 and len(tiling.row_base) == CONSUMERS * made.m_tiles
        for row in range(base, base + ROWS, made.samples):
            at = row // made.samples
            found.append((at // (region[1] * region[2]), at // region[2] % region[1], at % region[2]))
    assert sorted(found) == sorted(box)
    assert all(
        tiling.counts[i] * tiling.tile[i] >= sizes[i] > (tiling.counts[i] - 1) * tiling.tile[i] for i in range(3)
    )
    assert region_stride(made, tiling) >= math.prod(region) * made.samples * made.row_bytes
    for one, low in zip(made.passes, made.lows, strict=True):
        for step in one.steps:
            d, h, w = (a - b for a, b in zip(step.delta, low, strict=True))
            outer, inner = outer_inner(made, (d, h, w))
            assert all(
                0 <= z + d < region[0] and 0 <= o + outer < region[1] and 0 <= i + inner < region[2] for z, o, i in box
            )
    assert copy_cycles(made, tiling, sizes) > 0


def _positions(made: Specialisation, tile: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    outer, inner = outer_inner(made, tile)
    return [*itertools.product(range(tile[0]), range(outer), range(inner))]


def test_neighbours_along_w_are_a_threads() -> None:
    of = of_generator()
    tiling, store = of.tiling((8, 8, 8))
    assert store is Store.WIDE and of.made.inner == 1
    each = tiling.region[2] * of.made.samples
    assert all(b - a == each for a, b in zip(tiling.row_base[::2], tiling.row_base[1::2], strict=True))


def test_sets_are_those_of_an_instructions_rows() -> None:
    assert all(ROWS % size == 0 and size % 8 == 0 for size in SETS)


def test_sets_always_is_undone() -> None:
    with sets_always():
        assert Convolution.of(GENERATOR, F32, F32, F32, Epilogue(), extents=(64, 64, 64), samples=2).made.samples > 1
    assert Convolution.of(GENERATOR, F32, F32, F32, Epilogue(), extents=(64, 64, 64), samples=2).made.samples == 1
