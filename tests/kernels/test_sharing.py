"""What a second run of a convolution takes from the first one: where it lies, what agrees, what it saves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_twice import of_rows, region, ways  # noqa: F401

from fxfuse.kernels.account import account_of
from fxfuse.kernels.convolution.kernels import Convolution, sampled
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Shared, Specialisation
from fxfuse.kernels.convolution.specialise import specialise
from fxfuse.kernels.convolution.tiling import LAUNCHES_WEIGHTS, LAUNCHES_X, ROWS_RATE
from fxfuse.kernels.convolution.workspace import ALIGNMENT, Workspace
from fxfuse.kernels.execute import Candidate
from fxfuse.kernels.planning.estimate import bytes_of
from fxfuse.kernels.planning.schedule import Schedule
from fxfuse.kernels.planning.twice import sharing

F32 = torch.float32
LAYER = Layer(64, 32, 1, (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))
MADE = specialise(LAYER, pooled=False)


# --- where it lies --------------------------------------------------------------------------------
@pytest.mark.parametrize("shares", Shared)
def test_sections_lie_apart(shares: Shared) -> None:
    """Every one of them in its block, none in another one's place, and all where copies may begin."""
    x, weights, statistics = [1000, 4, 129], [77, 1], [300, 0]
    made = Workspace.of(x, weights, statistics, shares)
    assert made.common == {Shared.NOTHING: 0, Shared.ROWS: 3, Shared.ALL: 5}[shares]
    handed, own = 1 << 20, 1 << 30
    taken = set[int]()
    for i, (at, size) in enumerate(zip(made.addresses(handed, own), [*x, *weights, *statistics], strict=True)):
        first, room = (handed, made.handed) if i < made.common else (own, made.own)
        assert at % ALIGNMENT == 0 and first <= at and at + size <= first + room
        assert taken.isdisjoint(range(at, at + size))
        taken.update(range(at, at + size))


def test_both_runs_agree_where_it_lies() -> None:
    """Whatever the first one keeps for itself."""
    for shares in (Shared.ROWS, Shared.ALL):
        first, second = (Workspace.of([999, 8], [555], own, shares) for own in ([4096, 64], [0, 0]))
        count = first.common
        assert first.handed == second.handed and first.offsets[:count] == second.offsets[:count]
    assert second.own == 0


# --- what agrees ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changed", "shares"),
    [
        ({}, Shared.ALL),
        ({"m_tiles": 1, "stages": 3, "x_buffers": 1}, Shared.ALL),
        ({"pooled": True, "one": True}, Shared.ALL),
        ({"columns": 16}, Shared.ROWS),
        ({"chunk": 32}, Shared.ROWS),
        ({"passes": MADE.passes[:1]}, Shared.ROWS),
        ({"merged": True}, Shared.ROWS),
        ({"exact": True}, Shared.NOTHING),
        ({"layer": dataclasses.replace(LAYER, groups=2)}, Shared.NOTHING),
        ({"layer": dataclasses.replace(LAYER, in_channels=48)}, Shared.NOTHING),
    ],
    ids=str,
)
def test_what_kernels_have_in_common(changed: dict[str, object], shares: Shared) -> None:
    assert len(MADE.passes) > 1
    other: Specialisation = dataclasses.replace(MADE, **changed)  # type: ignore[arg-type]
    assert MADE.shared(other) is shares and other.shared(MADE) is shares


def test_rows_of_two_parts_have_their_chunk() -> None:
    """Second parts lie behind the first ones of a chunk."""
    made = specialise(LAYER, pooled=False, exact=True)
    less = dataclasses.replace(made, chunk=made.chunk // 2)
    assert made.shared(less) is less.shared(made) is Shared.NOTHING
    assert made.shared(dataclasses.replace(made, columns=16)) is Shared.ROWS


def twice(name: str, dtype: torch.dtype = F32) -> tuple[Candidate, Schedule, Specialisation]:
    found = next(c for c in ways(name, dtype) if c.name == "twice")
    assert found.schedule is not None and found.convolution is not None
    return found, found.schedule, found.convolution.made


@pytest.mark.parametrize(
    ("changed", "shares"),
    [
        ({}, Shared.ALL),
        ({"weight": "other"}, Shared.ROWS),
        ({"bias": "other"}, Shared.ROWS),
        ({"bias_dtype": torch.float16}, Shared.ROWS),
        ({"x": "other"}, Shared.NOTHING),
        ({"dtype": torch.float16}, Shared.NOTHING),
    ],
    ids=str,
)
def test_what_launches_have_in_common(changed: dict[str, object], shares: Shared) -> None:
    """The same tensors, in the same dtypes."""
    _, made, kernel = twice("instance_norm")
    assert made.measuring is not None and made.kernel is not None
    plain = dataclasses.replace(made.kernel, shares=Shared.NOTHING)
    early = dataclasses.replace(made.measuring, **changed)  # type: ignore[arg-type]
    found = sharing(dataclasses.replace(made, measuring=early, kernel=plain), kernel, kernel)
    assert found.kernel is not None and found.kernel.shares is shares


# --- what it saves --------------------------------------------------------------------------------
def test_plans_say_so(of_rows: None) -> None:  # noqa: F811
    one, pooled = (twice(name)[0] for name in ("instance_norm", "batch_norm_pools"))
    assert str(one.schedule).endswith("-> f32[2, 32, 128, 128, 128], from the first run's rows and packed weights")
    assert ", from the first run's rows; then one kernel" in str(pooled.schedule)
    products = ways("batch_norm_pools", F32)[0]
    assert products.name == "products" and "from the first run's" not in str(products)


@pytest.mark.parametrize("name", ["instance_norm", "batch_norm_pools"])
def test_the_account(name: str, of_rows: None) -> None:  # noqa: F811
    """Bytes, launches and seconds of the second run, and of one that would prepare all for itself."""
    found, made, kernel = twice(name)
    assert made.kernel is not None and isinstance(found.convolution, Convolution)
    shares = {"instance_norm": Shared.ALL, "batch_norm_pools": Shared.ROWS}[name]
    assert made.kernel.shares is shares
    alone = dataclasses.replace(made, kernel=dataclasses.replace(made.kernel, shares=Shared.NOTHING))
    told, whole = (
        [p for p in account_of(region(name, F32), dataclasses.replace(found, schedule=s)).parts if p.macs][-1]
        for s in (made, alone)
    )
    assert "made before" not in dict(whole.facts)
    assert dict(told.facts)["made before"] == f"{shares.value}, by the first run"
    types = dict(region(name, F32).rewritten.inputs)
    n, channels, *sizes = (size or 0 for size in types[made.kernel.x].shape)
    x, rows = (each * n * math.prod(sizes) for each in (4 * channels, 2 * kernel.padded_channels))
    weights = bytes_of(types, [made.kernel.weight, *([made.kernel.bias] if made.kernel.bias else [])])
    packed = kernel.weight_bytes * kernel.column_tiles
    every = sampled(n, channels * math.prod(sizes))
    assert every > 1
    both = shares is Shared.ALL
    assert whole.read - told.read == x + x // every + (weights if both else 0)
    assert whole.written - told.written == rows + (packed if both else 0)
    assert whole.launches - told.launches == (3 if both else 1)
    seconds = (x + rows) / ROWS_RATE + LAUNCHES_X + (LAUNCHES_WEIGHTS if both else 0)
    assert whole.seconds - told.seconds == pytest.approx(seconds)
