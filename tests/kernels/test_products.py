"""Statistics from products of a convolution's input: where x is cut, what is compiled, what is chosen and why not."""

from __future__ import annotations

import itertools
import math
import random
import re
from typing import Any

import pytest
import torch
from test_twice import region, ways

from fxfuse.instr import TensorType
from fxfuse.kernels.account import account
from fxfuse.kernels.compilation.jit import MissingPackage, compile_cubin
from fxfuse.kernels.compilation.sass import sass
from fxfuse.kernels.convolution.correlation import (
    ALONE,
    CHANNELS,
    ENOUGH_JOBS,
    FEW_STEPS,
    MOST_CUTS,
    MOST_PARTS,
    MOST_PATCH,
    PRODUCTS,
    TILE_ELEMENTS,
    WARPS,
    Correlation,
)
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.planning.estimate import BANDWIDTH, DOUBLE_RATE, LAUNCH, SQUARED, works
from fxfuse.kernels.planning.twice import from_products
from fxfuse.kernels.runtime.correlation_engine import BLOCK, MOMENTS_BLOCK

F32 = torch.float32


Sizes = int | tuple[int, int, int]


def layer(
    channels: int = 3, kernel: Sizes = 3, stride: Sizes = 2, padding: Sizes = 1, dilation: Sizes = 1, groups: int = 1
) -> Layer:
    sizes = ((s, s, s) if isinstance(s, int) else s for s in (kernel, stride, padding, dilation))
    return Layer(channels, 16, groups, *sizes)


def correlation(*args: Any, **more: Any) -> Correlation:
    return Correlation.of(layer(*args, **more), F32, F32, F32)


# --- the plan -------------------------------------------------------------------------------------
def test_lags() -> None:
    """Of two taps per dim at most: half of the 27 neighbours, and none. Along one dim alone, two."""
    made = correlation()
    assert len(made.lags) == 14 and (made.columns, made.patch, made.entries) == (42, 24, 256)
    assert made.lags[:5] == ((0, 0, 0), (0, 0, 1), (0, 1, -1), (0, 1, 0), (0, 1, 1))
    assert made.reach == ((0, 1, 1), (1, 2, 2))
    assert correlation(kernel=2, padding=0).lags == ((0, 0, 0),)  # no two taps of a class
    flat = correlation(kernel=(1, 1, 5), stride=(1, 1, 2), dilation=(1, 1, 2), padding=(0, 0, 0))
    assert flat.lags == ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4))


def test_parts_of_the_benchmark() -> None:
    """Classes of odd outputs have a position less, and read x from its second element on."""
    parts = correlation().parts((32, 32, 32), (63, 63, 63))
    assert parts.cuts == ((0, 1, 31, 32),) * 3 and len(parts.all) == 27
    whole, *_ = sorted(parts.all, key=lambda p: -p.jobs)
    assert (whole.at, whole.size, whole.tile, whole.jobs) == ((1, 1, 1), (30, 30, 30), (6, 10, 30), 15)
    # a block for each face, a warp for each edge and corner
    assert [p.alone for p in parts.all] == [p.size.count(1) > 1 for p in parts.all] == [False] * 7 + [True] * 20
    assert (parts.wide, parts.jobs, parts.blocks, parts.several) == (21, 41, 26, 1)
    even = correlation(kernel=2, padding=0).parts((32, 32, 32), (64, 64, 64))
    assert even.cuts == ((0, 32),) * 3  # no border


@pytest.mark.parametrize("seed", range(30))
def test_no_border_runs_through_a_part(seed: int) -> None:
    """In one dim: what a class reads by a tap, position by position, is whole parts."""
    pick = random.Random(seed)
    kernel, stride, dilation, size = (pick.randint(1, top) for top in (4, 3, 3, 9))
    padding = pick.randint(0, dilation * (kernel - 1))
    out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + pick.randint(0, stride - 1)
    if out < 1:
        return
    along = layer(1, (1, 1, kernel), (1, 1, stride), (0, 0, padding), (1, 1, dilation))
    made = Correlation(along, F32, F32, F32)
    cuts = made.cuts(2, size, out)
    parts = list(itertools.pairwise(cuts))
    for residue in made.layer.residues:
        deltas = [t.delta[2] for t in residue.taps]
        count = len(range(residue.at[2], out, stride))
        for delta in deltas:
            reads = {q + delta for q in range(count) if 0 <= q + delta < size}
            whole = [set(range(*part)) for part in parts]
            assert all(part <= reads or part.isdisjoint(reads) for part in whole)
            assert reads <= set().union(*whole)


@pytest.mark.parametrize("size", [(32, 32, 32), (1, 1, 4000), (3, 700, 2), (128, 256, 256)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_tiles_fit(channels: int, size: tuple[int, int, int]) -> None:
    made = correlation(channels, 4)
    parts = made.parts(size, tuple(2 * s for s in size))  # type: ignore[arg-type]
    assert parts.jobs <= ENOUGH_JOBS + len(parts.all)
    assert [*parts.all] == sorted(parts.all, key=lambda p: p.alone)
    for part in parts.all:
        assert all(1 <= t <= b for t, b in zip(part.tile, part.size, strict=True))
        assert made.elements(part.tile) <= made.room(part.tile) <= (ALONE if part.alone else TILE_ELEMENTS)
        assert 1 <= part.jobs <= math.prod(-(-b // t) for t, b in zip(part.tile, part.size, strict=True))
        if part.alone:
            assert part.tile == part.size and made.steps(part.tile) <= FEW_STEPS


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (layer(8), "8 input channels (at most 7)"),
        (layer(3, 5, padding=2), "81 elements of a patch (at most 64)"),
        (layer(4, 3, 1), "252 at distances (at most 192)"),
        (layer(1, 2, 1, 0, 20), "taps reach too far"),
    ],
    ids=["channels", "patch", "distances", "reach"],
)  # fmt: skip
def test_layers_that_have_too_many_products(made: Layer, why: str) -> None:
    with pytest.raises(Unsupported, match=re.escape(why)):
        Correlation.of(made, F32, F32, F32)


def test_borders_that_cut_too_often() -> None:
    with pytest.raises(Unsupported, match=r"343 parts \(at most 128"):
        Correlation(layer(1, 7, 1, 3), F32, F32, F32).parts((32, 32, 32), (32, 32, 32))
    assert len(correlation(1, 3, 1, 1).parts((32, 32, 32), (32, 32, 32)).all) == 27
    assert len(correlation(1, 3, 1, 0).parts((32, 32, 32), (34, 34, 34)).all) == 1  # every output that x reaches


def test_more_tiles_than_are_divided() -> None:
    with pytest.raises(Unsupported, match="more tiles than 1048576"):
        correlation().parts((4096, 4096, 1024), (8191, 8191, 2047))


# --- what is compiled -----------------------------------------------------------------------------
SOURCES = {
    "benchmark": correlation(),
    "one_channel": correlation(1, 4),
    "six_channels": correlation(6),
    "seven_channels": correlation(7, 4),
    "stride_1": correlation(2, 3, 1, 1),
    "windows": correlation(7, (1, 3, 3), 2, (0, 1, 1)),
    "two_rows_of_windows": correlation(6, 2, 1),
    "many_lags": correlation(1, 4, 1, 1),
    "groups": correlation(2, 3, groups=5),
    "half": Correlation.of(layer(), torch.float16, torch.float16, torch.float32),
    "bfloat": Correlation.of(layer(), torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("name", SOURCES)
def test_kernels_do_not_spill(name: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    made = SOURCES[name]
    limits = made.parts((9, 9, 9), (17, 17, 17)).packed()
    source = made.source() + "\n".join([
        f"static_assert(sizeof(fxfuse::Parts) == {len(limits)});",
        f"static_assert(fxfuse::kTileElements == {TILE_ELEMENTS} && fxfuse::kAlone == {ALONE});",
        f"static_assert(fxfuse::kMostCuts == {MOST_CUTS} && fxfuse::kMostParts == {MOST_PARTS});",
        f"static_assert(fxfuse::kMostPatch == {MOST_PATCH} && fxfuse::kChannels == {CHANNELS});",
        f"static_assert(fxfuse::kResult == {PRODUCTS} && fxfuse::kCorrelationThreads == {32 * WARPS});",
        f"static_assert(fxfuse::kCorrelationThreads == {BLOCK} && fxfuse::kMomentsThreads == {MOMENTS_BLOCK});",
    ])  # fmt: skip
    for kernel, used in compile_cubin(source).kernels.items():
        assert used.spills == 0 and used.shared <= 48 * 1024, (kernel, used)


def machine_code(made: Correlation, kernel: str) -> str:
    pytest.importorskip("cuda.bindings.nvrtc")
    try:
        return sass(compile_cubin(made.source()), kernel)
    except MissingPackage as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(
    ("name", "kernel", "load"),
    [("half", "correlate", r"LDG\.E\.U16 "), ("benchmark", "moments", r"LDG?\.E\.64 ")],
)
def test_loads_are_on_their_way_together(name: str, kernel: str, load: str) -> None:
    """Eight of a thread, with no branch among them: one after the other they would be most of the time."""
    runs = [len(re.findall(load, run)) for run in re.split(r"\bBRA\b", machine_code(SOURCES[name], kernel))]
    assert max(runs) >= 8, runs


def test_all_of_a_tile_is_on_its_way_together() -> None:
    """Of float32, which goes through no register: a block's copies are waited for once, a warp's too."""
    text = machine_code(SOURCES["benchmark"], "correlate")
    assert "LDG.E" not in text and "LDGSTS.E" in text
    assert text.count("LDGDEPBAR") == text.count("DEPBAR.LE") == 2
    for loop in loops(text):
        assert "LDGSTS" not in loop or "DEPBAR" not in loop


def loops(text: str) -> list[str]:
    """What lies between a label and a jump back to it, without another jump."""
    found = []
    for match in re.finditer(r"^(\.L_x_\d+):\n((?:(?!^\.L_x|\bBRA\b).*\n)*).*BRA `\((\.L_x_\d+)\)", text, re.MULTILINE):
        if match[1] == match[3]:
            found.append(match[2])
    return found


def test_what_a_step_takes() -> None:
    """Where all columns have a position: three numbers are read and become float64, two instructions multiply; fewer
    than sixteen instructions in all. A multiprocessor issues 32 while it makes those products."""
    text = machine_code(SOURCES["benchmark"], "correlate")
    steps = [run for run in re.split(r"^\.L_x_\d+:", text, flags=re.MULTILINE) if run.count("DMMA") == 8]
    assert len(steps) == 2  # of a block, of a warp; four at a time
    for run in steps:
        assert run.count(" LDS ") == run.count("F2F.F64.F32") == 12
        assert len(re.findall(r"^ +/\*[0-9a-f]{4}\*/", run, re.MULTILINE)) < 64


# --- what is chosen -------------------------------------------------------------------------------
def test_the_account() -> None:
    plan = account(region("batch_norm_pools", F32))
    assert plan is not None
    first, second = (p for p in plan.parts if "conv_transpose" in p.what)
    assert (first.what, first.by, first.launches) == ("statistics of conv_transpose", "kernel", 2)
    assert dict(first.facts)["products"] == "3 x 42 per position: of 3 channels with themselves at 14 distances"
    assert second.what == "conv_transpose > avg_pool 4x4x4 > sub > mul > mul > add"
    parts = correlation().parts((32, 32, 32), (63, 63, 63))
    kept = 8 * (64 * parts.jobs * 256 + 64 * parts.several * 256)
    x, w = 4 * 64 * 3 * 32**3, 4 * 3 * 16 * 27
    assert first.read == x + w + kept and first.written == kept + 64 * 16 * 24
    # two instructions for four positions, of which there are more than x has: a walk of 30 positions has 31 steps
    steps = 15 * 15 * 31 + 2 * 8 * 30 + 2 * 8 * 30 + 2 * 225 * 2 + 4 * 9 + 8 * 16 + 8 * 2
    assert first.macs == 64 * steps * 4 * 2 * 128 < 1.2 * 64 * 32**3 * 256
    assert first.floor == max((first.read + first.written) / BANDWIDTH, first.macs / DOUBLE_RATE) < first.seconds
    assert first.source == correlation().source()


def test_the_plan_and_its_sources() -> None:
    found, again = ways("batch_norm_pools", F32)[:2]
    assert str(found).startswith(
        "first one kernel on small tensors: sub > add; two kernels: statistics of conv_transpose from products of x0 "
        "with itself; then statistics of v0, gathered "
        "on the way; then the convolution: conv_transpose > avg_pool 4x4x4 > sub > mul > mul > add -> "
    )
    assert [name for name, _ in found.sources()][:4] == ["bundle", "correlation", "statistics", "convolution"]
    assert again.name == "twice" and found.convolution is again.convolution


def test_where_statistics_are_of_something_else() -> None:
    """A pointwise chain in front of the norm, an input that is made by other operators."""
    found = next(c for c in ways("batch_norm_pools", F32) if c.name == "twice")
    made = region("batch_norm_pools", F32).rewritten
    assert found.schedule is not None
    with pytest.raises(Unsupported, match="is not given"):
        from_products(found.schedule, {})
    given = dict(made.inputs)
    assert str(from_products(found.schedule, given)[1].layer) == str(layer())
    chain = next(c for c in ways("swish_group_norm_hardswish", F32) if c.name == "twice")
    with pytest.raises(Unsupported, match=r"more than the convolution: conv_transpose > sigmoid"):
        from_products(chain.schedule, given)  # type: ignore[arg-type]


def test_work_follows_the_batch() -> None:
    """Seconds do but for launches, and for what sums of a class take at least."""
    one, many = (correlation().work(n, (32, 32, 32), (63, 63, 63)) for n in (1, 64))
    assert [64 * v for v in vars(one).values()] == [*vars(many).values()]
    found = ways("batch_norm_pools", F32)[0]
    assert found.schedule is not None
    seconds = []
    for n in (64, 128):
        given = {**dict(region("batch_norm_pools", F32).rewritten.inputs), "x0": TensorType(F32, (n, 3, 32, 32, 32))}
        parts = works(given, found.schedule, found.convolution, found.measuring, exact=False)
        work = next(work for part, work in parts if part is found.schedule.measuring)
        seconds.append(work.seconds - 2 * LAUNCH - SQUARED)
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=1e-3) and 3e-5 < seconds[0] < 2e-4
