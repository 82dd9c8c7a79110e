"""Partial statistics that are merged in pieces, and what is made of these, beside float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from emulator.device import Device, emulated, needs_compiler
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.kernels.runtime import tail_engine
from fxfuse.kernels.runtime.launch import Kernel, sender
from fxfuse.kernels.runtime.tail_engine import FINISH_BLOCK, PARTIALS
from fxfuse.kernels.stages.emit_tail import emit_statistics
from fxfuse.kernels.stages.merge import MERGE_BLOCK, MERGED, pieces

pytestmark = needs_compiler

EPS = 1e-5


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated() as found:
        yield found


def partials(elements: Tensor, counts: Tensor) -> Tensor:
    """(N, slots, C, 2) of the mean and squares of ``elements`` (N, slots, most, C), of which slots have ``counts``."""
    inside = torch.arange(elements.shape[2])[:, None] < counts[..., None, None]
    held = elements.double().where(inside, 0.0)
    mean = held.sum(2) / counts.clamp(min=1)[..., None]
    mean = mean.float()  # squares are around what is stored
    around = (elements.double() - mean.double()[:, :, None]).where(inside, 0.0)
    return torch.stack([mean, around.square().sum(2).float()], -1).contiguous()


def merged(parts: Tensor, counts: Tensor, count: int) -> Tensor:
    """(N, count, C, 3), by the kernel."""
    n, slots, c, _ = parts.shape
    found = torch.full((n, count, c, 3), math.nan, dtype=torch.float64)
    launch = sender(kernel("merge", "statistics"), n * count * -(-c // MERGED), MERGE_BLOCK, PARTIALS, "i", "q")
    launch(0, parts.data_ptr(), counts.data_ptr(), slots, c, count, found.data_ptr())
    return found


def kernel(name: str, kind: str) -> Kernel:
    source = emit_statistics("f32", "contiguous" if name == "merge" else "", (kind,))
    found: Kernel = tail_engine._module(source, (name,), 0, "sm_90a").kernels[name]
    return found


def finished(kind: str, given: Tensor, results: int, groups: int, batch: bool) -> Tensor:
    """(results, N, C), or (results, 1, C) where ``batch``, by the kernel."""
    n, count, c, _ = given.shape
    rows = 1 if batch else n
    found = torch.full((results, rows, c), math.nan)
    launch = sender(kernel(f"finish_{kind}", kind), rows * groups, FINISH_BLOCK, *"qqiiiiid")
    launch(0, given.data_ptr(), found.data_ptr(), n, c, c // groups, int(batch), count, EPS)
    return found


def whole(found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and squares (N, C) of all pieces."""
    count = found[..., 0].sum(1)
    mean = (found[..., 0] * found[..., 1]).sum(1) / count
    squares = (found[..., 2] + found[..., 0] * (found[..., 1] - mean[:, None]).square()).sum(1)
    return count, mean, squares


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("slots", [5, 255, 257, 700])
def test_pieces(device: Device, slots: int, count: int) -> None:
    """One element up to eight, slots without any, channels that fill no block; a mean of 1000 standard deviations."""
    torch.manual_seed(slots)
    n, most, c = 2, 8, 11
    elements = torch.randn(n, slots, most, c) + 1000
    counts = torch.randint(0, most + 1, (n, slots), dtype=torch.int32)
    counts[:, 0] = most
    parts = partials(elements, counts)
    got = merged(parts, counts, count)
    found, mean, squares = whole(got)
    inside = torch.arange(most)[:, None] < counts[..., None, None]
    truth = elements.double().where(inside, math.nan).flatten(1, 2)
    assert torch.equal(found, counts.sum(1)[:, None].expand(n, c).double())
    torch.testing.assert_close(mean, truth.nanmean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(squares, (truth - truth.nanmean(1, keepdim=True)).square().nansum(1), rtol=1e-4, atol=0)
    bounds = [min(slots, -(-slots // count) * i) for i in range(count + 1)]
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):  # each of them has its slots, in order
        alone = merged(parts[:, a:b].contiguous(), counts[:, a:b].contiguous(), 1)
        assert torch.equal(alone[:, 0], got[:, i])


def test_a_mean_far_from_zero(device: Device) -> None:
    """Means of slots that differ in their last bits: float64 alone would lose the squares around a mean."""
    torch.manual_seed(0)
    base, (n, slots, c) = 2.0**23, (1, 300, 8)
    counts = torch.randint(1, 9, (n, slots), dtype=torch.int32)
    steps = torch.randint(-2, 3, (n, slots, c)).double()
    parts = torch.stack([(steps + base).float(), torch.rand(n, slots, c)], -1).contiguous()
    _, mean, squares = whole(merged(parts, counts, 1))
    k = counts[..., None].double()
    centre = (k * steps).sum(1) / k.sum(1)
    torch.testing.assert_close(mean - base, centre, rtol=0, atol=1e-7)
    around = (parts[..., 1].double() + k * (steps - centre[:, None]).square()).sum(1)
    torch.testing.assert_close(squares, around, rtol=1e-9, atol=0)


def test_values_that_are_not_finite(device: Device) -> None:
    """They stay in their channel; of Inf the mean is Inf."""
    parts, counts = torch.zeros(1, 600, 9, 2), torch.ones(1, 600, dtype=torch.int32)
    parts[0, :, :, 0] = torch.randn(600, 9)
    plain = merged(parts, counts, 2)
    parts[0, 500, 3, 0], parts[0, 10, 5, 0] = math.inf, math.nan
    got = merged(parts, counts, 2)
    assert got[0, 1, 3, 1] == math.inf and got[0, 0, 5, 1:].isnan().all()
    kept = torch.ones(1, 2, 9, dtype=torch.bool)
    kept[0, 1, 3] = kept[0, 0, 5] = False
    assert torch.equal(got[kept], plain[kept])


def test_the_order_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    parts, counts = torch.randn(2, 700, 11, 2).abs(), torch.randint(0, 9, (2, 700), dtype=torch.int32)
    found = []
    for seed in range(3):
        with emulated(seed):
            found.append(merged(parts, counts, 2))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("groups", "batch"), [(12, False), (3, False), (1, False), (12, True), (4, True)], ids=str)
def test_what_is_made_of_pieces(device: Device, groups: int, batch: bool, count: int) -> None:
    """Mean, biased variance and scale, of samples and pieces of different counts; of one piece with no element."""
    torch.manual_seed(0)
    n, c = 3, 12
    counts = torch.randint(1, 50, (n, count, 1)).double().expand(n, count, c).contiguous()
    if count > 1:
        counts[0, 1] = 0
    mean, squares = torch.randn(n, count, c).double() + 1e7, torch.rand(n, count, c).double() * counts
    given = torch.stack([counts, mean.where(counts > 0, 0.0), squares], -1).contiguous()
    found = finished("statistics", given, 3, groups, batch)

    def grouped(t: Tensor) -> Tensor:
        """(rows, groups, whatever statistics are of)"""
        apart = t.reshape(n, count, groups, -1)
        return apart.permute(2, 0, 1, 3).reshape(1, groups, -1) if batch else apart.transpose(1, 2).flatten(2)

    k, m, s = map(grouped, (counts, mean, squares))
    centre = (k * m).sum(2) / k.sum(2)
    var = (s + k * (m - centre[..., None]).square()).sum(2) / k.sum(2)
    for got, expected in zip(found, (centre, var, (var + EPS).rsqrt()), strict=True):
        each = expected.repeat_interleave(c // groups, 1)
        torch.testing.assert_close(got.double(), each, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 5, 200])
@pytest.mark.parametrize("kind", ["exponentials", "extremes"])
def test_what_is_made_of_pieces_of_other_kinds(device: Device, kind: str, count: int) -> None:
    """As the operator has it, of Inf and NaN and nothing but -Inf as well; of one piece with no element."""
    torch.manual_seed(0)
    n, c = 2, 7
    elements = torch.randn(n, c, count, 6) * 30
    elements[:, 1, 0, 2], elements[:, 2, -1, 3], elements[:, 3], elements[:, 4, 0, 0] = (
        math.inf,
        -math.inf,
        -math.inf,
        math.nan,
    )
    elements[:, 5, 0], elements[:, 6, :, 0] = -1e30, -math.inf
    x, y = elements.amax(3).double(), -elements.amin(3).double()
    if kind == "exponentials":
        y = torch.where(x == -math.inf, 0.0, (elements.double() - x[..., None]).exp().sum(3))
    given = torch.stack([x, y], -1).transpose(1, 2).contiguous()
    if count > 1:
        given[:, 1, 0] = torch.tensor([-math.inf, 0.0 if kind == "exponentials" else -math.inf])
        elements[:, 0, 1] = -math.inf if kind == "exponentials" else elements[:, 0, 0]
    expected = vocabulary.lookup(kind)(elements.flatten(2))
    found = finished(kind, given, len(expected), c, False)
    torch.testing.assert_close(found, torch.stack(expected)[..., 0], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_how_many_pieces() -> None:
    """Enough for two blocks per multiprocessor, of 256 slots at least, and none without slots."""
    assert pieces(2, 32, 4096) == 16  # instance_norm of the benchmark
    assert pieces(16, 128, 340) == pieces(1, 1, 255) == pieces(128, 16, 128) == 1
    for slots in (1, 256, 600, 4097, 67585, 10**6):
        for samples in (1, 3, 64):
            for channels in (1, 8, 9, 512):
                found = pieces(samples, channels, slots)
                size = -(-slots // found)
                assert found >= 1 and (found - 1) * size < slots
                assert found == 1 or (size >= 256 and samples * found * -(-channels // 8) <= 264)
