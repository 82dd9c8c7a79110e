"""Between which bounds values lie, against what torch makes of them; and the formulas that small arguments get."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from expressions import SPECIAL, compiled, emit, needs_compiler, run, source
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Draw
from test_schedule import conv, cut
from torch import Tensor

from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.formulas import SMALL_NUMBER
from fxfuse.kernels.codegen.ranges import ALL, APPROXIMATE, Range, ranges_of
from fxfuse.program import Program

SHAPE = (2, 3, 4, 4, 6)
INF, ONE = math.inf, 1.0 + APPROXIMATE
POOL = "kernel=(2, 2, 2), stride=(2, 2, 2)"
MAX = f"max_pool({{}}, {POOL}, padding={{}}, dilation={{}}, ceil_mode=False)"
AVG = f"avg_pool({{}}, {POOL}, padding={{}}, ceil_mode=True, count_include_pad=True, divisor_override={{}})"


def program(lines: str, dtype: str = "f32") -> Program:
    """Lines ``name = op(...)``, separated by ``;``, of ``x`` and of ``m``, which is bool; all values are results."""
    shape = f"[{', '.join(map(str, SHAPE))}]"
    statements = [line.strip() for line in lines.split(";")]
    head = f"def f(x: {dtype}{shape}, m: b1{shape}):"
    results = ", ".join(s.split(" = ")[0] for s in statements)
    return Program.parse("\n".join([head, *(f"    {s}" for s in statements), f"    return {results}"]))[1]


def data(dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Small, large, and special numbers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=g) * torch.tensor([0.3, 3.0, 300.0])[torch.randint(3, SHAPE, generator=g)]
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), SHAPE, generator=g)]
    x = torch.where(torch.rand(SHAPE, generator=g) < 0.2, special, x)
    return [x.to(dtype), torch.rand(SHAPE, generator=g) < 0.5]


def observed(made: Program, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    given = data(dtype, seed)
    names = [n for n, _ in made.inputs]
    return {**dict(zip(names, given, strict=True)), **dict(zip(made.outputs, made.run(given), strict=True))}


def ranges(made: Program, values: dict[str, Tensor]) -> dict[str, Range]:
    return ranges_of(made, {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()})


def assert_inside(made: Program, dtype: torch.dtype, seed: int) -> None:
    values = observed(made, dtype, seed)
    for name, (low, high) in ranges(made, values).items():
        numbers = values[name].double()
        numbers = numbers[~numbers.isnan()]
        outside = numbers[(numbers < low) | (numbers > high)]
        assert not len(outside), f"{made}\n{name}: {outside} not in {low} to {high}"


# --- every rule -----------------------------------------------------------------------------------
#: of the last value, which reaches both bounds, or nearly
RULES = {
    "r = sigmoid(x)": (0, ONE),
    "r = hardsigmoid(x)": (0, ONE),
    "a = masked_fill(x, m, 9e9); b = clamp(a, -9e4, 9e9); r = softmax(b, dim=1)": (0, ONE),
    "r = tanh(x)": (-ONE, ONE),
    "r = softsign(x)": (-ONE, ONE),
    "r = sin(x)": (-ONE, ONE),
    "r = cos(x)": (-ONE, ONE),
    "r = erf(x)": (-ONE, ONE),
    "r = sign(x)": (-ONE, ONE),
    "r = relu(x)": (0, INF),
    "a = tanh(x); r = relu(a)": (0, ONE),
    "r = relu6(x)": (0, 6),
    "r = hardtanh(x, min_val=-2, max_val=0.5)": (-2, 0.5),
    "r = clamp(x, -3, 2)": (-3, 2),
    "r = clamp(x, None, 2)": (-INF, 2),
    "r = clamp(x, -3, None)": (-3, INF),
    "r = clamp(x, 3, 2)": (2, 2),
    "a = tanh(x); r = clamp(a, -3, 0.5)": (-ONE, 0.5),
    "a = sigmoid(x); r = clamp(x, None, a)": (-INF, ONE),
    "a = clamp(x, -1, 3); r = neg(a)": (-3, 1),
    "a = clamp(x, -1, 3); r = abs(a)": (0, 3),
    "a = clamp(x, 1, 3); r = abs(a)": (1, 3),
    "a = clamp(x, -3, -1); r = abs(a)": (1, 3),
    "a = clamp(x, -3, 2); r = square(a)": (0, 9),
    "a = clamp(x, -3, -2); r = square(a)": (4, 9),
    "r = exp(x)": (0, INF),
    "a = clamp(x, -9, 0); r = exp(a)": (0, ONE),
    "a = clamp(x, -1, 3); r = add(a, 2)": (1, 5),
    "a = clamp(x, -1, 3); r = sub(a, 2)": (-3, 1),
    "a = clamp(x, -1, 3); r = sub(2, a)": (-1, 3),
    "a = clamp(x, -1, 3); r = mul(a, -2)": (-6, 2),
    "a = clamp(x, -1, 3); r = mul(a, x)": (-INF, INF),
    "a = sigmoid(x); b = relu(x); r = mul(a, b)": (0, INF),
    "a = sigmoid(x); b = minimum(x, 0.0); r = mul(a, b)": (-INF, 0),
    "a = clamp(x, -1, 3); b = neg(a); r = mul(a, b)": (-9, 3),
    "a = clamp(x, -1, 3); r = div(a, -2)": (-1.5, 0.5),
    "a = clamp(x, -1, 3); b = clamp(x, 2, 4); r = div(a, b)": (-0.5, 1.5),
    "a = clamp(x, -1, 3); r = div(a, x)": (-INF, INF),
    "a = clamp(x, -1, 3); r = div(a, 0)": (-INF, INF),
    "a = clamp(x, -1, 3); b = exp(x); r = div(a, b)": (-INF, INF),
    "a = clamp(x, -1, 3); r = maximum(a, 2.0)": (2, 3),
    "a = clamp(x, -1, 3); r = minimum(a, x)": (-INF, 3),
    "a = clamp(x, -1, 3); r = minimum(2.0, a)": (-1, 2),
    "a = clamp(x, -1, 3); b = clamp(x, -2, 2); r = where(m, a, b)": (-2, 3),
    "a = clamp(x, -1, 3); r = masked_fill(a, m, 5.0)": (-1, 5),
    "a = clamp(x, -1, 3); r = clone(a)": (-1, 3),
    "a = clamp(x, -1, 3); r = contiguous(a)": (-1, 3),
    "a = clamp(x, -1, 3); r = detach(a)": (-1, 3),
    "a = clamp(x, -1, 3); r = cast(a, dtype=f16)": (-1, 3),
    "a = clamp(x, -1, 3); r = cast(a, dtype=i32)": (-INF, INF),
    "r = cast(m, dtype=f32)": (0, 1),
    "r = cast(x, dtype=b1)": (0, 1),
    "a = clamp(x, -1, 3); r = reshape(a, shape=(2, 3, 96))": (-1, 3),
    "a = clamp(x, -1, 3); r = permute(a, dims=(1, 0, 2, 3, 4))": (-1, 3),
    "a = clamp(x, -1, 3); r = amax(a, dims=(1,), keepdim=True)": (-1, 3),
    "a = clamp(x, -1, 3); r = amin(a, dims=(1,), keepdim=True)": (-1, 3),
    "a = clamp(x, -1, 3); r = max(a, dim=1, keepdim=True)": (-1, 3),
    "a = clamp(x, -1, 3); r = min(a, dim=1, keepdim=True)": (-1, 3),
    "a = clamp(x, -1, 3); r = sum(a, dims=(1,), keepdim=True)": (-INF, INF),
    f"a = clamp(x, -1, 3); r = {MAX.format('a', (0,) * 3, (1,) * 3)}": (-1, 3),
    f"a = clamp(x, -1, 3); r = {MAX.format('a', (1,) * 3, (1,) * 3)}": (-1, 3),
    f"a = clamp(x, -1, 3); r = {MAX.format('a', (0,) * 3, (2,) * 3)}": (-1, 3),
    f"a = clamp(x, -1, 3); r = {MAX.format('a', (1, 0, 0), (5, 1, 1))}": (-INF, 3),
    f"a = clamp(x, -1, 3); r = {MAX.format('a', (2, 0, 0), (1, 1, 1))}": (-INF, 3),
    "a = clamp(x, -1, 3); r = adaptive_max_pool(a, size=(2, 3, None))": (-1, 3),
    f"a = clamp(x, -1, 3); r = {AVG.format('a', (1,) * 3, None)}": (-1, 3),
    f"a = clamp(x, 1, 3); r = {AVG.format('a', (1,) * 3, None)}": (0, 3),
    f"a = clamp(x, 1, 3); r = {AVG.format('a', (0,) * 3, 2)}": (-INF, INF),
    "a = clamp(x, -1, 3); r = adaptive_avg_pool(a, size=(4, None, 5))": (-1, 3),
    "a = clamp(x, -1, 3); r = mean(a, dims=(1,), keepdim=True)": (-1, 3),
    "a = clamp(x, 0, 3); r = mean(a, dims=(1, 2), keepdim=False)": (0, 3),
    "a = clamp(x, -inf, inf); r = sub(a, inf)": (-INF, INF),
    "r = clamp(x, nan, 1.0)": (-INF, 1),
    "r = mish(x)": (-INF, INF),
}


@pytest.mark.parametrize("lines", RULES)
def test_a_rule(lines: str) -> None:
    """What it says, and that it is so."""
    made = program(lines)
    low, high = ranges(made, observed(made, torch.float32, 0))["r"]
    assert (low, high) == pytest.approx(RULES[lines], rel=2e-5, abs=2e-5)
    for seed in range(20):
        assert_inside(made, torch.float32, seed)


def test_bounds_are_rounded_outward() -> None:
    """A bound that bfloat16 has not is one in float32, too, where kernels keep values."""
    assert bounds("r = clamp(x, -0.999, 0.999)", "bf16") == (-1.0, 1.0)
    assert bounds("r = clamp(x, -0.999, 0.999)") == (-held(0.999), held(0.999))
    assert bounds("a = clamp(x, -1, 1.003); r = cast(a, dtype=bf16)") == (-1.0, held(1.003))
    assert bounds("a = clamp(x, -1, 1.0055); r = cast(a, dtype=bf16)") == (-1.0, 1.0078125)
    assert bounds("a = clamp(x, 0, 6e4); r = add(a, a)", "f16") == (0.0, INF)
    assert bounds("a = clamp(x, 0, 3); r = mul(a, 0.3)") == (0.0, 3 * held(0.3))
    assert bounds("a = clamp(x, 0, 5); r = mul(a, 0.1)") == (0.0, 5 * held(0.1))  # rounded, it is less
    assert bounds("a = clamp(x, 0, 3); r = mul(a, 0.1)") == (0.0, held(3 * held(0.1)))  # rounded, it is more
    assert bounds("a = clamp(x, 0, 3e38); r = square(a)") == (0.0, INF)


DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def bounds(lines: str, dtype: str = "f32") -> Range:
    made = program(lines, dtype)
    return ranges(made, observed(made, DTYPES[dtype], 0))["r"]


def held(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


@pytest.mark.parametrize(
    "mean", ["mean(a, dims=(2,), keepdim=True)", "adaptive_avg_pool(a, size=(1,))"], ids=lambda m: m.split("(")[0]
)
def test_a_mean_of_many_has_more_room(mean: str) -> None:
    text = f"def f(x: f32[1, 1, 1048576]):\n    a = clamp(x, 0.5, 1.0)\n    r = {mean}\n    return r"
    shapes = {"x": (1, 1, 2**20), "a": (1, 1, 2**20), "r": (1, 1, 1)}
    found = ranges_of(Program.parse(text)[1], {n: TensorType(torch.float32, s) for n, s in shapes.items()})["r"]
    assert found == pytest.approx((0.375, 1.125), abs=1e-3) and not found.within(SMALL_NUMBER)


def test_integers_have_no_bounds() -> None:
    """They wrap around."""
    shape = "[2, 3, 4]"
    made = Program.parse(f"def f(i: i8{shape}):\n    a = abs(i)\n    r = cast(a, dtype=f32)\n    return r")[1]
    types = {"i": torch.int8, "a": torch.int8, "r": torch.float32}
    found = ranges_of(made, {n: TensorType(t, (2, 3, 4)) for n, t in types.items()})
    assert found == {"i": ALL, "a": ALL, "r": ALL}


BOUNDED = ("sigmoid", "tanh", "hardsigmoid", "relu", "relu6", "neg", "abs", "square", "exp", "sin", "softsign", "sign")
NUMBERS = st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.1, 0.999, 1.0, 3.0, 1e-39, 6e4, 7])


@st.composite
def chains(draw: Draw, *, pointwise: bool = False) -> str:
    """Lines of up to eight operators, each of values before it."""
    values, lines = ["x"], []

    def number() -> float:
        return draw(NUMBERS)

    for i in range(draw(st.integers(1, 8))):
        v, u = (draw(st.sampled_from([values[-1], *values])) for _ in "vu")
        one = [f"{op}({v})" for op in BOUNDED] + [
            f"clamp({v}, {number()}, {number()})",
            f"hardtanh({v}, min_val=-1.5, max_val={abs(number())})",
            *(f"{op}({v}, {number()})" for op in ("add", "sub", "mul", "div")),
            *(f"{op}({v}, {u})" for op in ("add", "sub", "mul", "div", "maximum", "minimum")),
            f"sub({number()}, {v})",
            f"where(m, {v}, {u})",
            f"masked_fill({v}, m, {number()})",
        ]
        wide = [
            *(f"cast({v}, dtype={dtype})" for dtype in ("f16", "bf16", "f32")),
            *(f"{op}({v}, dims=(1,), keepdim=True)" for op in ("amax", "amin", "mean")),
            f"softmax({v}, dim=1)",
        ]
        lines.append(f"v{i} = {draw(st.sampled_from(one if pointwise else one + wide))}")
        values.append(f"v{i}")
    return "; ".join(lines)


@settings(max_examples=150)
@given(chains(), st.sampled_from([*DTYPES]), st.integers(0, 99))
def test_random_chains_stay_inside(lines: str, dtype: str, seed: int) -> None:
    assert_inside(program(lines, dtype), DTYPES[dtype], seed)


# --- formulas of small arguments ------------------------------------------------------------------
def sigmoid(x: Tensor) -> Tensor:
    return torch.special.expit(x)


#: the function, and the error that is allowed, absolute and relative
FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "sigmoid": (sigmoid, 1.1e-7, 0.0),
    "silu": (lambda x: x * sigmoid(x), 1e-44, 4e-7),
    "tanh": (torch.tanh, 1e-44, 1.7e-7),
}


def dense() -> Tensor:
    """Every 37th float32 of a size between 2^-10 and the largest, either sign; and what is special."""
    low, high = (int(torch.tensor(v).view(torch.int32)) for v in (2.0**-10, SMALL_NUMBER))
    sizes = torch.arange(high, low, -37, dtype=torch.int32).view(torch.float32)
    special = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 1e-7, 1.0, SMALL_NUMBER, math.nan])
    x = torch.cat([sizes, special])
    return torch.cat([x, -x]).view(1, 1, 1, 1, -1)


@needs_compiler
@pytest.mark.parametrize("op", FORMULAS)
def test_a_formula_of_small_arguments(op: str) -> None:
    function, absolute, relative = FORMULAS[op]
    x = dense()
    types = {"y": TensorType(torch.float32, tuple(x.shape))}
    e = emit(f"r = {op}(y)", types=types, small_numbers=["y"])
    plain = emit(f"r = {op}(y)", types=types)
    assert f"{op}_of_small(y)" in e.code and "_of_small" not in plain.code and e.flops < plain.flops
    got, truth = run(compiled(source([e])), e, x, {}), function(x.double())
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.signbit()[x == 0], truth.signbit()[x == 0])
    error, allowed = (got - truth).abs(), absolute + relative * truth.abs()
    assert not (error > allowed).any(), (error / allowed).nan_to_num().max()


#: of what leads to it, whether the argument of a last sigmoid is small
ARGUMENTS = {
    "v0 = sigmoid(x)": True,
    "v0 = tanh(x)": True,
    "v0 = clamp(x, 0, 1)": True,
    "v0 = clamp(x, -1.007, 1.007)": True,
    "v0 = clamp(x, -1.01, 0)": False,
    "v0 = clamp(x, -1, None)": False,
    "v0 = relu(x)": False,
    "v0 = sigmoid(x); v1 = mul(v0, 2)": False,
    "v0 = sigmoid(x); v1 = mul(v0, 2); v2 = sub(v1, 1)": True,
}


@pytest.mark.parametrize("lines", ARGUMENTS)
@pytest.mark.parametrize("op", FORMULAS)
def test_which_arguments_are_small(lines: str, op: str) -> None:
    last = lines.split("; ")[-1].split(" = ")[0]
    made = cut(conv(), *lines.replace("(x", "(y").split("; "), f"r = {op}({last})")
    assert made.kernel.before is not None
    assert (f"{op}_of_small({last})" in made.kernel.before.code) == ARGUMENTS[lines], made.kernel.before.code


def test_small_arguments_wherever_chains_are_emitted() -> None:
    """Behind a reduction over channels, behind a pool, and in kernels behind the convolution."""
    behind = cut(conv(), "u = softmax(y, dim=1)", "v = sigmoid(u)").kernel.behind
    assert behind is not None and "sigmoid_of_small(y)" in behind.code
    pool = MAX.format("z", (0,) * 3, (1,) * 3)
    after = cut(conv(), "a = sigmoid(y)", "z = mul(a, y)", f"p = {pool}", "q = tanh(p)", "t = sigmoid(q)").kernel.after
    assert after is not None and "sigmoid_of_small(v0)" in after.code and "tanhf(y)" in after.code
    norm = "u = instance_norm(y, None, None, eps=1e-05)"
    steps = cut(conv(), norm, "v = tanh(u)", "z = sigmoid(v)", "q = softmax(z, dim=1)", "r = silu(q)").steps
    texts = [e.code for s in steps for e in (getattr(s, "before", None), getattr(s, "after", None)) if e is not None]
    assert any("sigmoid_of_small(" in t and "tanhf(" in t for t in texts)
    assert any("silu_of_small(y)" in t for t in texts)


@needs_compiler
@settings(max_examples=8)
@given(st.lists(chains(pointwise=True), min_size=8, max_size=8), st.integers(0, 99))
def test_random_chains_with_formulas_of_small_arguments(lines: list[str], seed: int) -> None:
    """Of what is emitted the results lie in the ranges, too, and are torch's."""
    made = []
    for i, text in enumerate(lines):
        text += "; s = sigmoid(v0); t = tanh(v0); r = add(s, t)"
        p = program(text)
        values = observed(p, torch.float32, seed)
        found = ranges(p, values)
        small = [n for n, r in found.items() if r.within(SMALL_NUMBER)]
        types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items() if n in "xm"}
        named = text.replace("(x", "(y").replace(", x", ", y")
        types["y"] = types.pop("x")
        e = emit(named, f"E{i}", types, small_numbers=["y" if n == "x" else n for n in small])
        made.append((e, p, values, found))
    library = compiled(source([e for e, *_ in made]))
    for e, p, values, found in made:
        got = run(library, e, values["x"], {"y": values["x"], **values})
        truth = p.run([t.double() if t.is_floating_point() else t for t in data(torch.float32, seed)])[-1].float()
        settled = torch.isclose(values["r"], truth, rtol=1e-5, atol=1e-5, equal_nan=True)
        wrong = settled & ~torch.isclose(got, values["r"], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert not wrong.any(), f"{p}\n{e.code}\n{got[wrong]}\n{values['r'][wrong]}"
        assert (got[~got.isnan()] >= found["r"].low).all() and (got[~got.isnan()] <= found["r"].high).all()
