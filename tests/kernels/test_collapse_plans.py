"""How collapsed means are planned and emitted; tests/gpu/test_collapsed.py runs them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from harness import program

from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.chains import dense
from fxfuse.kernels.compilation.jit import compile_cubin
from fxfuse.kernels.convolution.arguments import Divisor
from fxfuse.kernels.planning.estimate import works
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.kernels.stages import collapsed
from fxfuse.kernels.stages.collapsed import Sums, sums_of
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.emit_collapsed import emit_contraction, emit_sums
from fxfuse.kernels.stages.sources import kind_of, source_of
from fxfuse.kernels.stages.steps import Step, Torch
from fxfuse.vocabulary import lookup

F32 = torch.float32
Boxes = tuple[tuple[tuple[int, int], ...], ...]


def sums(
    shape: tuple[int, ...], dims: tuple[int, ...], boxes: Boxes, layout: str = "contiguous", dtype: torch.dtype = F32
) -> Sums | None:
    """The step for a dense value of a shape."""
    x = torch.empty_strided(shape, dense(shape, layout), dtype=dtype, device="meta")
    made = lookup("tap_sums")(x, dims=dims, boxes=boxes)
    attributes = tuple(lookup("tap_sums").complete({"dims": dims, "boxes": boxes}).items())
    instr = Instr(("s",), "tap_sums", (Ref("x"),), attributes)
    return sums_of(instr, TensorType(dtype, shape), x.stride(), TensorType(made.dtype, tuple(made.shape)))


def planned(*shape: int, dims: tuple[int, ...], boxes: Boxes, **more: Any) -> Sums:
    found = sums(shape, dims, boxes, **more)
    assert found is not None
    return found


SPACE = (2, 3, 4)
WHOLE = ((0, 16),), ((0, 32),), ((0, 32),)
#: those of a kernel of 3 with a padding of 1
PADDED = ((1, 16), (0, 16), (0, 15)), ((1, 32), (0, 32), (0, 31)), ((1, 32), (0, 32), (0, 31))


# --- sums -----------------------------------------------------------------------------------------
def test_a_row_per_channel_where_there_are_many() -> None:
    made = planned(16, 64, 16, 32, 32, dims=SPACE, boxes=WHOLE)
    assert (made.launches, made.blocks, made.cells) == (1, 1024, 1)
    assert (made.rows, made.count, made.columns, 1 << made.team) == ((1, 1024), 4, 128, 8)
    assert made.inner.bounds == (0, 16384) and made.units == 128
    assert str(made) == "one kernel: tap_sums of x over 1 box -> f32[16, 64, 1, 1, 1]"


def test_slots_where_there_are_few() -> None:
    made = planned(2, 8, 64, 64, 64, dims=SPACE, boxes=(((0, 64),),) * 3)
    assert made.launches == 2 and made.slots == 32 and made.blocks == 512
    assert made.outer.bounds[:3] == (0, 1, 2) and made.outer.stride == 8192
    assert str(made) == (
        "one kernel: tap_sums of x over 1 box, in 32 slots that a second one adds -> f32[2, 8, 1, 1, 1]"
    )


def test_borders_of_boxes_cut_dims_in_segments() -> None:
    made = planned(16, 64, 16, 32, 32, dims=SPACE, boxes=PADDED)
    assert made.launches == 1 and made.cells == 27
    assert [d.bounds for d in (made.b, made.c, made.inner)] == [(0, 1, 15, 16), (0, 1, 31, 32), (0, 1, 31, 32)]
    assert (made.inner.firsts, made.inner.lasts) == ((1, 0, 0), (3, 3, 2))
    assert made.units == 0 and made.count == 4


def test_channels_that_are_neighbours_are_kept() -> None:
    made = planned(16, 64, 16, 32, 32, dims=SPACE, boxes=PADDED, layout="channels_last")
    assert made.keeps and made.size == 64 and made.outer.firsts == (1, 0, 0) and made.inner_out == 9
    assert made.cells * collapsed.WARPS * 4 <= collapsed.MOST_SHARED
    # and positions along dims that are not summed
    made = planned(4, 8, 6, 10, 12, dims=(2,), boxes=(((0, 6),),))
    assert made.keeps and made.size == 120 and made.rows == (1, 32)


@pytest.mark.parametrize(("dtype", "size", "count"), [
    (F32, 32, 4), (F32, 30, 2), (F32, 31, 1), (torch.float16, 32, 8), (torch.bfloat16, 36, 4), (torch.float16, 33, 1),
])  # fmt: skip
def test_what_a_thread_reads_at_once(dtype: torch.dtype, size: int, count: int) -> None:
    boxes = (((0, 3),), ((0, size), (1, size)))
    assert planned(2, 5, 3, size, dims=(2, 3), boxes=boxes, dtype=dtype).count == count


def test_sums_that_torch_makes() -> None:
    boxes = (((0, 5),),)
    assert sums((2, 3, 5), (2,), boxes) is not None
    assert sums((2, 3, 5), (2,), boxes, dtype=torch.float64) is None
    assert sums((2, 3, 60), (2,), (tuple((i, 60) for i in range(16)),)) is not None
    assert sums((2, 3, 60), (2,), (tuple((i, 60) for i in range(17)),)) is None  # boxes
    assert sums((2, 3, 60), (2,), (tuple((i, 60 - i) for i in range(13)),)) is None  # segments
    sliced = Instr(("s",), "tap_sums", (Ref("x"),), (("dims", (2,)), ("boxes", boxes)))
    assert sums_of(sliced, TensorType(F32, (2, 3, 5)), (30, 10, 2), TensorType(F32, (2, 3, 1))) is None


def test_many_short_rows_are_left_to_torch() -> None:
    assert sums((16, 64, 16, 32, 32), (4,), (((0, 32),),)) is None
    assert sums((16, 64, 16, 32, 32), (3, 4), (((0, 32),), ((0, 32),))) is not None
    assert sums((16, 512, 4, 4, 4), SPACE, (((0, 4),),) * 3) is not None


def _box(pick: random.Random, size: int) -> tuple[int, int]:
    low, high = sorted(pick.sample(range(size + 1), 2))
    return low, high


def test_plans_fit_what_a_block_has() -> None:
    pick = random.Random(5)
    for _ in range(300):
        shape = tuple(pick.choice([1, 2, 3, 8, 30, 64, 257]) for _ in range(5))
        dims = tuple(sorted(pick.sample(SPACE, pick.randint(1, 3))))
        boxes = tuple(tuple(_box(pick, shape[d]) for _ in range(pick.choice([1, 3, 7]))) for d in dims)
        made = sums(shape, dims, boxes, pick.choice(["contiguous", "channels_last"]))
        if made is None:
            continue
        assert made.cells * collapsed.WARPS * 4 <= collapsed.MOST_SHARED and made.slots <= collapsed.MOST_SLOTS
        assert made.blocks < 2**31 and 0 <= made.across <= 5 and 0 <= made.team <= 3
        read = [made.outer, made.b, made.c, *([] if made.keeps else [made.inner])]
        assert all(a < b for d in read for a, b in zip(d.bounds, d.bounds[1:], strict=False))


def test_divisions_by_multiplication() -> None:
    pick = random.Random(6)
    for _ in range(3000):
        by, n = pick.randint(1, 2 ** pick.randint(1, 31) - 1), pick.randint(0, 2 ** pick.randint(1, 31) - 1)
        made = Divisor.of(by)
        for value in (n, n // by * by, max(n // by * by - 1, 0), 2**31 - 1):
            assert value * made.multiplier >> made.shift == value // by, (value, by)


# --- the whole chain --------------------------------------------------------------------------------
GEOMETRY = "stride=(), padding=(), output_padding=(), dilation=()"
TAPS = "taps=((0, 1, 2), (0, 1, 2), (0, 1, 2))"


def steps(x: str, w: str, boxes: Boxes, rest: str, result: str = "r", groups: int = 1, more: str = "") -> list[Step]:
    inputs = f"x: {x}, w: {w}, b: f32[128], m: f32[128], v: f32[128], g: f32[128], h: f32[128]{more}"
    body = f"s = tap_sums(x, dims=(2, 3, 4), boxes={boxes})\n"
    body += f"z = contract_taps(s, w, dims=(2, 3, 4), {TAPS}, {GEOMETRY}, groups={groups})\n{rest}\n{result}"
    made = program(inputs, body)
    return list(schedule(made, examples(made), anchored=False).steps)


CHAIN = (
    "y = mul(z, 0.25)\nc = reshape(b, shape=(-1, 1, 1, 1))\na = add(y, c)\n"
    "n = batch_norm(a, m, v, g, h, eps=0.1)\nr = reshape(n, shape=(16, 128))"
)


def test_two_kernels() -> None:
    found = steps("f32[16, 64, 16, 32, 32]", "f32[64, 128, 3, 3, 3]", PADDED, CHAIN)
    assert [kind_of(s) for s in found] == ["sums", "contraction"]
    made = found[1]
    assert isinstance(made, Contraction)
    assert str(made) == ("one kernel: contract_taps > mul > add > sub > mul > mul > add > reshape -> f32[16, 128]")
    assert (made.factor, made.rows, made.across, made.blocks, made.width) == (0.25, 8, 2, 128, 27)
    assert made.table[5] == (5, 5) and made.reads[:2] == ("s", "w") and {*made.reads[2:]} == {"b", "m", "v", "g", "h"}


def test_operands_in_16_bits() -> None:
    rest = "y = mul(z, 0.5)\nc = reshape(d, shape=(-1, 1, 1, 1))\nd32 = cast(c, dtype=f32)\na = add(y, d32)\n"
    rest += "r = cast(a, dtype=f16)"
    more = ", d: f16[128]"
    found = steps("f16[16, 64, 16, 32, 32]", "f16[64, 128, 3, 3, 3]", WHOLE_TAPS, rest, more=more)
    assert [kind_of(s) for s in found] == ["sums", "contraction"]
    assert "one kernel: contract_taps > mul > add > cast -> f16" in str(found[1])


WHOLE_TAPS = (((0, 16),) * 3, ((0, 32),) * 3, ((0, 32),) * 3)


@pytest.mark.parametrize(("x", "w", "groups"), [
    ("f64[2, 64, 16, 32, 32]", "f64[64, 128, 3, 3, 3]", 1),
    ("f32[64, 1024, 16, 32, 32]", "f32[1024, 1024, 3, 3, 3]", 1),  # a product of large matrices
])  # fmt: skip
def test_contractions_that_torch_makes(x: str, w: str, groups: int) -> None:
    found = steps(x, w, PADDED, "", "z", groups)
    assert isinstance(found[-1], Torch) and "contract_taps" in str(found[-1])


def test_a_new_size_compiles_nothing() -> None:
    """Sizes and the factor of a mean are parameters."""
    small = (((1, 6), (0, 6), (0, 5)), ((1, 8), (0, 8), (0, 7)), ((1, 12), (0, 12), (0, 11)))
    texts = [
        [source_of(s) for s in steps(f"f32[16, 64, {size}]", "f32[64, 128, 3, 3, 3]", boxes, CHAIN.replace("0.25", by))]
        for size, boxes, by in (
            ("16, 32, 32", PADDED, "0.25"),
            ("6, 8, 12", small, "0.1"),
            ("16, 32, 32", PADDED, "0.25"),
        )
    ]
    assert texts[0] == texts[1] == texts[2]


def test_what_they_do() -> None:
    made = program(
        "x: f32[16, 64, 16, 32, 32], w: f32[64, 128, 3, 3, 3]",
        f"s = tap_sums(x, dims=(2, 3, 4), boxes={PADDED})\n"
        f"z = contract_taps(s, w, dims=(2, 3, 4), {TAPS}, {GEOMETRY}, groups=1)\nz",
    )
    plan = schedule(made, examples(made), anchored=False)
    (_, first), (_, second) = works(dict(made.inputs), plan, None, exact=False)
    x, s, w, z = 16 * 64 * 16384 * 4, 16 * 64 * 27 * 4, 64 * 128 * 27 * 4, 16 * 128 * 4
    assert (first.read, first.written, first.macs) == (x, s, 0)
    assert (second.read, second.written, second.macs) == (s + w, z, 16 * 64 * 27 * 128)


# --- every kernel compiles ------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize(("dtype", "counts"), [("f32", (4, 1)), ("f16", (8, 1)), ("bf16", (8,))])
def test_kernels_compile_without_spills(dtype: str, counts: tuple[int, ...], arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    sources = [emit_sums(dtype, count, keeps=keeps) for count in counts for keeps in (False, True)]
    forms = ((8, 2), (4, 8), (1, 1)) if dtype == "f32" else ((8, 2),)
    sources += [emit_contraction(dtype, dtype, None, rows=r, across=a, taps=125) for r, a in forms]
    if dtype == "f32":
        sources.append(source_of(steps("f32[16, 64, 16, 32, 32]", "f32[64, 128, 3, 3, 3]", PADDED, CHAIN)[1]))
    for source in sources:
        cubin = compile_cubin(source, arch)
        assert not {name: used.spills for name, used in cubin.kernels.items() if used.spills}
        assert all(used.registers <= (128 if name == "contract_taps" else 80) for name, used in cubin.kernels.items())
