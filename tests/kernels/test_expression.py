"""Every pointwise operator as C++ for the host, against torch; what is refused; how numbers are written."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Mapping

import pytest
import torch
from expression_cases import ALL, CASES, Case
from expressions import INPUTS, SHAPE, TYPES, compiled, eager, emit, needs_compiler, parse, run, source
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.arithmetic import NotEmittable, literal
from fxfuse.kernels.codegen.expression import Expression, Field, emit_expression

# --- every operator -------------------------------------------------------------------------------
NAMES = {id(case): f"E{i}" for i, (_, case) in enumerate(ALL)}

#: where torch's own kernels (CPU and CUDA, vectorised or not) differ in the sign of a zero
UNSIGNED = (
    *("r = minimum(a, y)", "r = maximum(a, y)", "r = elu(y, alpha=-2)"),
    *("r = gelu(y, approximate='none')", "r = softshrink("),
)


@functools.cache
def emitted() -> dict[str, Expression]:
    return {name: emit(case.lines, name) for (_, case), name in zip(ALL, NAMES.values(), strict=True)}


def test_no_operator_is_forgotten() -> None:
    assert sorted(CASES) == vocabulary.names(vocabulary.Kind.POINTWISE)
    for op, case in ALL:
        assert any(i.op == op for i in parse(case.lines).body)


@needs_compiler
@pytest.mark.parametrize(("op", "case"), ALL, ids=lambda v: v.lines if isinstance(v, Case) else v)
def test_an_operator(op: str, case: Case) -> None:
    """NaN, Inf and signs of zeros in the same places as in torch; close to the float64 value elsewhere."""
    e = emitted()[NAMES[id(case)]]
    got = run(compiled(source(list(emitted().values()))), e, INPUTS["y"], INPUTS)
    expected = eager(case.lines, INPUTS)
    assert got.shape == expected.shape
    expected = expected.float()
    if case.ulps == 0:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        return
    truth = eager(case.lines, INPUTS, torch.float64).double()
    agree(got, expected, truth, case, INPUTS)


def agree(got: Tensor, expected: Tensor, truth: Tensor, case: Case, tensors: Mapping[str, Tensor]) -> None:
    # torch's own kernels of float32 may be wrong, as that of gelu(Inf) on CPUs with AVX-512, which is NaN
    exact = truth.to(expected.dtype)
    right = ((got == exact) | (got.isnan() & exact.isnan())) & ~(expected.isfinite() & exact.isfinite())
    expected = torch.where(right, exact, expected)
    finite = expected.isfinite()
    torch.testing.assert_close(got[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    assert got[finite].isfinite().all()
    zeros = (got == 0) & (expected == 0)
    signs = torch.equal(got[zeros].signbit(), expected[zeros].signbit())
    assert signs or case.lines.startswith(UNSIGNED)
    error = (got.double() - truth)[finite].abs()
    allowed = case.ulps * 2.0**-23 * truth[finite].abs() + 1e-37
    if case.near:
        reads = {n for i in parse(case.lines).body for n in i.reads()} & tensors.keys()
        sizes = [tensors[n].double().abs().expand(SHAPE) for n in sorted(reads) if tensors[n].is_floating_point()]
        largest = functools.reduce(torch.maximum, sizes)[finite]
        allowed += case.near * 2.0**-23 * largest.clamp(max=3e38)
    wrong = error > allowed
    assert not wrong.any(), (got[finite][wrong], truth[finite][wrong], expected[finite][wrong])


# --- operands, dtypes, ranks ----------------------------------------------------------------------
def test_fields() -> None:
    """A pointer per operand, however often it is read, and strides where it varies."""
    e = emit("q = mul(y, ch5); k = add(q, plane); k2 = add(k, ch5); r = mul(k2, s)")
    assert e.fields == (
        Field("p0", "ch5", "pointer"),
        Field("s0c", "ch5", "stride", 1, 1),
        Field("p1", "plane", "pointer"),
        Field("s1n", "plane", "stride", 0, 0),
        Field("s1d", "plane", "stride", 2, 2),
        Field("s1w", "plane", "stride", 4, 4),
        Field("p2", "s", "pointer"),
    )
    assert e.code.count("const float* p") == 3 and e.flops == 4


def test_only_what_the_result_needs() -> None:
    program = parse("q = relu(y); dead = pow(y, double_); r = neg(q)")
    e = emit_expression("E", program.body, value="q", result="r", types={**TYPES, "q": TYPES["y"]})
    assert "const float v0 = -y;" in e.code and e.fields == () and "v1" not in e.code
    assert "return y;" not in e.code


def test_the_value_itself_is_no_expression_of_it() -> None:
    e = emit_expression("E", (), value="y", result="y", types=TYPES)
    assert "return y;" in e.code and e.flops == 0


@needs_compiler
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 4, 5)])
def test_ranks_and_unknown_sizes(shape: tuple[int, ...], known: bool) -> None:
    """Missing spatial dims are the leading ones; sizes may be found out at the call."""
    g = torch.Generator().manual_seed(1)
    n, c, *spatial = shape
    ones = (1,) * len(spatial)
    shapes = {
        "y": shape,
        "same": shape,
        "ch": (c, *ones),
        "samples": (n, 1, *ones),
        "w": spatial[-1:],
        "k": (c,),
        "s": (),
    }
    tensors = {name: torch.randn(size, generator=g) for name, size in shapes.items()}
    types = {k: TensorType(t.dtype, tuple(t.shape if known else [None] * t.dim())) for k, t in tensors.items()}
    lines = (
        "a0 = prelu(y, k); a1 = add(a0, ch); a2 = mul(a1, same); a3 = add(a2, w); a4 = sub(samples, a3); r = div(a4, s)"
    )
    e = emit(lines, types=types)
    strides = [f.name for f in e.fields if f.kind == "stride"]
    operands = [t for name, t in tensors.items() if name != "y"]
    assert len(strides) == sum(not known or size != 1 for t in operands for size in t.shape)
    got = run(compiled(source([e])), e, tensors["y"], tensors)
    torch.testing.assert_close(got, eager(lines, tensors), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_halves_are_kept_in_float32_unless_each_is_rounded() -> None:
    tensors = {"y": torch.tensor([[[1000.0, 1.0, 3.3, 1e-7]]]).half(), "b": torch.tensor([300.0, 1.0, 0.1, 7.0]).half()}
    types = {k: TensorType(t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    lines = "q = mul(y, b); r = div(q, b)"
    kept, rounded = emit(lines, "E0", types), emit(lines, "E1", types, round_each=True)
    library = compiled(source([kept, rounded]))
    torch.testing.assert_close(run(library, kept, tensors["y"], tensors), tensors["y"].float(), rtol=1e-6, atol=0)
    got = run(library, rounded, tensors["y"], tensors)
    assert got[0, 0, 0] == math.inf and torch.equal(got, eager(lines, tensors).float())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_every_half(dtype: torch.dtype) -> None:
    """Casts of every 16-bit value there and back, and of the midpoints between neighbours, are torch's."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = words.view(dtype).float()
    between = (exact[:-1] + exact[1:]) / 2
    nudged = [torch.nextafter(between, torch.tensor(s)) for s in (-math.inf, math.inf)]
    y = torch.cat([exact, between, *nudged])[None, None]
    tensors = {"y": y, "x": words.view(dtype)[:, None, None]}
    types = {"y": TensorType(torch.float32, (1, 1, y.shape[2])), "x": TensorType(dtype, (65536, 1, 1))}
    name = "f16" if dtype is torch.float16 else "bf16"
    cast = emit(f"r = cast(y, dtype={name})", "E0", types)
    load = emit(
        "r = where(m, y, x)",
        "E1",
        {**types, "m": TensorType(torch.bool, ()), "y": TensorType(torch.float32, (65536, 1, 1))},
    )
    library = compiled(source([cast, load]))
    torch.testing.assert_close(run(library, cast, y, tensors), y.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    tensors["m"] = torch.tensor(False)
    got = run(library, load, torch.zeros(65536, 1, 1), tensors)
    torch.testing.assert_close(got, tensors["x"].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("lines", "local", "ahead"),
    [
        ("q = mul(y, ch); r = add(q, ch)", False, ["x0"]),
        ("q = rsqrt(ch); twice = mul(q, 2.0); r = mul(y, twice)", False, ["v2"]),
        ("q = exp(y); r = add(q, a)", True, []),
        ("q = mul(ch, a); r = add(y, q)", True, ["x0"]),
        ("r = relu(y)", False, []),
    ],
)
def test_what_belongs_to_a_channel_is_had_ahead(lines: str, local: bool, ahead: list[str]) -> None:
    code = emit(lines).code
    assert f"static constexpr bool local = {str(local).lower()};" in code
    (kept,) = re.findall(r"struct Channel \{\n(.*?)  \};", code, re.DOTALL)
    assert re.findall(r"float (\w+);", kept) == ahead
    first = code[code.index("Channel channel") : code.index("float operator()")]
    assert f"return {{{', '.join(ahead)}}};" in first
    if not local:
        assert "load_" not in code[code.index("float operator()") :]


# --- refusals -------------------------------------------------------------------------------------
REFUSED = {
    "q = add(ni32, 1); r = mul(y, q)": r"`q = add\(ni32, 1\)`: arithmetic of torch.int32",
    "q = relu(ni64); r = mul(y, q)": r"arithmetic of torch.int64",
    "q = add(m, mw); r = mul(y, q)": r"arithmetic of torch.bool",
    "r = add(y, big64)": r"`r = add\(y, big64\)`: float64 arithmetic",
    "q = cast(y, dtype=f64); r = exp(q)": r"float64 arithmetic",
    "q = lt(y, big64); r = where(q, y, 1)": r"float64 arithmetic",
    "r = add(y, nu64)": r"nu64.*no elements of torch.uint64 are read or made here",
    "r = cast(y, dtype=c64)": r"no elements of torch.complex64 are read or made here",
    "r = add(y, large)": r"large: f32\[3, 3, 5, 7\] does not broadcast to f32\[2, 4, 3, 5, 7\]",
    "r = add(y, deep)": r"deep: .* has more dims than y",
    "q = mul(row, 2); r = prelu(y, q)": r"q is computed here, and not in the place of a channel",
    "q = sum(y, dims=(1,), keepdim=True); r = add(y, q)": r"sum is not pointwise",
    "r = mul(ch, 2)": r"r does not depend on y",
    "q = gt(y, 0); r = where(q, ni64, 1)": r"r: a float does not hold every torch.int64",
    "r = celu(y, alpha=0.0)": r"`r = celu\(y, alpha=0.0\)`: torch refuses it: alpha cannot be 0",
}  # fmt: skip


@pytest.mark.parametrize("lines", REFUSED)
def test_a_refusal(lines: str) -> None:
    extra = {"large": (3, 3, 5, 7), "deep": (1, *SHAPE)}
    types = {
        **TYPES,
        **{k: TensorType(torch.float32, s) for k, s in extra.items()},
        "big64": TensorType(torch.float64, SHAPE),
    }
    with pytest.raises(NotEmittable, match=REFUSED[lines]):
        emit(lines, types=types)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3, 4, 5, 6)])
def test_a_value_without_one_to_three_spatial_dims(shape: tuple[int, ...]) -> None:
    with pytest.raises(NotEmittable, match="one to three spatial dims"):
        emit("r = relu(y)", types={"y": TensorType(torch.float32, shape)})


def test_a_float64_value() -> None:
    with pytest.raises(NotEmittable, match=r"y: an incoming element is float32, float16 or bfloat16"):
        emit("r = relu(y)", types={"y": TensorType(torch.float64, SHAPE)})


def test_an_unknown_operand() -> None:
    program = parse("r = add(y, ch)")
    with pytest.raises(NotEmittable, match="the type of ch is not known"):
        emit_expression("E", program.body, value="y", result="r", types={"y": TYPES["y"]})


def test_channels_only() -> None:
    assert emit("q = mul(y, ch); q2 = add(q, s); r = prelu(q2, weight)", channels_only=True).fields
    for other in ("row", "plane", "a"):
        with pytest.raises(NotEmittable, match=f"{other}: .* varies with more than the channel"):
            emit(f"r = mul(y, {other})", channels_only=True)


# --- numbers --------------------------------------------------------------------------------------
@given(st.floats(width=32) | st.floats() | st.integers(-(2**63), 2**63 - 1))
def test_literals_are_read_back(number: float) -> None:
    held = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64).float().item()
    text = literal(number, torch.float32).strip("()")
    if not math.isfinite(held):
        name = "not_a_number" if math.isnan(held) else "infinity"
        assert text.strip("-(") == f"fxfuse::pw::{name}" and text.startswith("-") == (held == -math.inf)
        return
    assert text.endswith("f") and any(mark in text for mark in ".e")
    assert struct.pack("<f", float(text[:-1])) == struct.pack("<f", held)


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_are_read_back(number: int) -> None:
    assert eval(literal(number, torch.int64).replace("LL", "")) == number
