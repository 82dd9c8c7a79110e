"""Programs on small tensors as one kernel: which there are, and, by the emulated GPU, the bits that torch gives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from emulator.device import emulated, needs_compiler
from harness import program
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.instr import DTYPES, TensorType
from fxfuse.kernels.codegen.arithmetic import NotEmittable
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.codegen.operands import Place
from fxfuse.kernels.compilation import jit
from fxfuse.kernels.convolution.arguments import MOST_PARAMETERS
from fxfuse.kernels.planning.candidate import convolution_of
from fxfuse.kernels.planning.observe import examples, observe
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.kernels.runtime.prepared import Prepared, _in_rooms
from fxfuse.kernels.runtime.tail_engine import prepare
from fxfuse.kernels.stages.bundle import Bundler
from fxfuse.kernels.stages.emit_bundle import MOST_ELEMENTS, Emitted, emit_bundle
from fxfuse.kernels.stages.steps import Bundle, Schedule, Step, Torch
from fxfuse.program import Program

Draw = st.DrawFn


# --- one kernel -----------------------------------------------------------------------------------
def observed(chain: Program, inputs: list[Tensor]) -> tuple[dict[str, TensorType], dict[str, tuple[int, ...]]]:
    values = observe(chain, inputs)
    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}
    return types, {n: t.stride() for n, t in values.items()}


def emitted(chain: Program, inputs: list[Tensor] | None = None) -> Emitted:
    return emit_bundle(chain, *observed(chain, examples(chain) if inputs is None else inputs))


def bundle_of(chain: Program, inputs: list[Tensor]) -> Bundle:
    types, strides = observed(chain, inputs)
    outputs = chain.outputs
    made = emit_bundle(chain, types, strides)
    return Bundle(chain, made, tuple(types[n] for n in outputs), tuple(strides[n] for n in outputs))


def run(chain: Program, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, by the kernel."""
    values = dict(zip((n for n, _ in chain.inputs), inputs, strict=True))
    with emulated() as device:
        prepare(bundle_of(chain, inputs), torch.device("cpu"), {}, set())(values)
        assert device.launches == ["bundle"]
    return [values[n] for n in chain.outputs]


def check(chain: Program, inputs: list[Tensor], *, rtol: float = 0.0) -> None:
    before = [t.clone() for t in inputs]
    got, expected = run(chain, inputs), chain.run(inputs)
    strides = observed(chain, inputs)[1]
    for name, mine, torchs in zip(chain.outputs, got, expected, strict=True):
        assert mine.stride() == strides[name]
        torch.testing.assert_close(mine, torchs, rtol=rtol, atol=rtol, equal_nan=True)
        if not rtol and mine.dtype.is_floating_point:
            assert torch.equal(mine.signbit() & ~mine.isnan(), torchs.signbit() & ~torchs.isnan())
    memories = [{t.untyped_storage().data_ptr() for t in each} for each in (got, inputs)]
    assert len(memories[0]) == len(got) and memories[0].isdisjoint(memories[1])
    for old, new in zip(before, inputs, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + math.prod(shape))
    if dtype is torch.bool:
        return torch.rand(shape, generator=g) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=g).to(dtype)
    return (torch.randn(shape, generator=g) * 3).to(dtype)


FOLD = (
    "a = add(v, 1e-05)", "r = rsqrt(a)", "s = mul(r, g)", "f = scale_weight(w, s, groups=1)", "c = sub(b, m)",
    "d = mul(c, s)", "e = add(d, h)",
)  # fmt: skip
FOLDED = "w: f32[6, 8, 3, 2, 2], b: f32[8], m: f32[8], v: f32[8], g: f32[8], h: f32[8]"


@needs_compiler
def test_a_folded_norm() -> None:
    """Bits as of torch's operators, one by one: no multiplication joins an addition."""
    chain = program(FOLDED, "\n".join([*FOLD, "f, e"]))
    inputs = [tensor(*t.shape, seed=i).abs() for i, t in enumerate(examples(chain))]
    check(chain, inputs)


def test_no_operators_are_contracted() -> None:
    source = emitted(program(FOLDED, "\n".join([*FOLD, "f, e"]))).text
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs the extra fxfuse[cuda]")
    from fxfuse.kernels.compilation.sass import sass

    lines = sass(jit.compile_cubin(source), "bundle").splitlines()
    loose = sass(jit.compile_cubin(source.split("\n", 1)[1]), "bundle").splitlines()
    multiplied = [sum("FMUL" in line for line in each) for each in (lines, loose)]
    assert multiplied[0] > multiplied[1]


SAMPLES = [
    program("a: f16[3, 4], b: i64[4], m: b1[3, 1]", "x = mul(a, b)\ny = where(m, x, 0.5)\nz = isnan(y)\ny, z"),
    program("a: bf16[6, 4, 3], s: f64[()]", "w = scale_weight(a, s, groups=2)\nv = reshape(w, shape=(8, 9))\nw, v"),
]


@needs_compiler
def test_layouts_of_inputs_and_outputs() -> None:
    chain = program(
        "a: f32[3, 4, 5, 6], b: f32[4, 1, 1], c: f32[3, 4, 5, 6]",
        "x = mul(a, b)\ny = add(x, c)\nz = permute(y, dims=(3, 0, 2, 1))\nu = reshape(z, shape=(18, 20))\nu, y, x",
    )
    last = tensor(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    holes = torch.randn(3, 8, 5, 12)[:, ::2, :, 1::2]
    for a in (last, holes, tensor(6, 5, 4, 3).permute(3, 2, 1, 0), tensor(1, 4, 1, 6).expand(3, 4, 5, 6)):
        for c in (last, holes):
            check(chain, [a, torch.randn(8)[::2].reshape(4, 1, 1), c])


@needs_compiler
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_weights_of_groups(groups: int) -> None:
    chain = program(
        f"w: f16[6, 4, 3], s: f16[{4 * groups}, 1], t: f16[1], n: f16[()]",
        f"""f = scale_weight(w, s, groups={groups})
one = scale_weight(f, t, groups={groups})
none = scale_weight(one, n, groups={groups})
number = scale_weight(none, 0.7, groups={groups})
v = to_channels(s, w, channels={4 * groups})
u = to_channels(t, n, channels=5)
k = to_channels(0.3, w, channels=7)
f, one, none, number, v, u, k""",
    )
    check(chain, [tensor(*t.shape, dtype=t.dtype) for t in examples(chain)])


@needs_compiler
def test_every_dtype() -> None:
    floats = ("f16", "bf16", "f32")
    numbers = ("i8", "i16", "i32", "i64", "u8", "b1", "f64", *floats)
    head = ", ".join(f"{d}_: {d}[3, 5]" for d in numbers)
    lines = [f"{d}_to_{to} = cast({d}_, dtype={to})" for d in numbers for to in numbers]
    lines += [f"{d}_f = mul({d}_, w)" for d in numbers if d != "f64"]
    lines += [f"{d}_s = where(b1_, {d}_, {d}_)" for d in numbers if d != "f64"]
    lines += ["lt_ = lt(i64_, i8_)", "copied = contiguous(f64_)"]
    outputs = ", ".join(line.split(" = ")[0] for line in lines)
    chain = program(f"{head}, w: f32[5]", "\n".join([*lines, outputs]))
    inputs = [tensor(*t.shape, dtype=t.dtype).abs() if t.dtype is not torch.bool else tensor(3, 5, dtype=t.dtype)
              for t in examples(chain)]  # fmt: skip
    check(chain, inputs)


@needs_compiler
def test_what_is_not_finite() -> None:
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 65504.0, 65520.0, 6e-8, 3e38, -1e-7, 1.0]
    lines = (
        "a = add(x, x)\nb = cast(x, dtype=f16)\nc = cast(x, dtype=bf16)\nd = sub(x, x)\ne = mul(b, 0.5)\na, b, c, d, e"
    )
    check(program("x: f32[12]", lines), [torch.tensor(special)])


@needs_compiler
def test_other_operators() -> None:
    lines = [
        "a = sigmoid(x)", "b = gelu(x, approximate='none')", "c = rsqrt(p)", "d = prelu(x, w)", "e = pow(p, 0.5)",
        "f = lerp(x, p, 0.3)", "g = addcmul(x, p, x, value=0.5)", "h = clamp(x, -0.5, None)", "i = tanh(x)",
    ]  # fmt: skip
    chain = program("x: f32[4, 6, 3], p: f32[4, 6, 3], w: f32[6]", "\n".join([*lines, "a, b, c, d, e, f, g, h, i"]))
    x = tensor(4, 6, 3)
    check(chain, [x, x.abs() + 0.5, tensor(6)], rtol=2e-6)


@pytest.mark.parametrize(
    ("inputs", "lines", "reason"),
    [
        ("x: f32[4]", "y = sum(x, dims=(0,), keepdim=True)", "sum is neither pointwise nor a view nor a product"),
        ("x: f32[4]", "y = softmax(x, dim=0)", "softmax is neither pointwise nor a view nor a product"),
        ("x: f64[4]", "y = exp(x)", "float64 arithmetic"),
        ("x: i64[4]", "y = add(x, 1)", "arithmetic of torch.int64"),
        ("x: c64[4]", "y = mul(x, x)", "torch.complex64"),
        ("x: f64[4]", "y = to_channels(1.5, x, channels=3)", "torch.float64 of a number"),
        ("x: f32[0, 4]", "y = exp(x)", "of 1 to"),
        (f"x: f32[{MOST_ELEMENTS + 1}]", "y = exp(x)", "of 1 to"),
    ],
)
def test_refusals(inputs: str, lines: str, reason: str) -> None:
    with pytest.raises(NotEmittable, match=reason):
        emitted(program(inputs, f"{lines}\ny"))


def test_refusals_of_layouts() -> None:
    copied = program("x: f32[4, 4]", "y = detach(x)\ny")
    for x, reason in (
        (torch.empty(4).expand(4, 4), "lie in the same place"),
        (torch.empty(13).as_strided((4, 4), (2, 2)), "lie in the same place"),
        (torch.empty(1, device="meta").as_strided((4, 4), (2**30, 1)), "too far from end to end"),
    ):
        with pytest.raises(NotEmittable, match=reason):
            emitted(copied, [x])
    far = torch.empty(1, device="meta").as_strided((4, 4), (2**30, 1))
    with pytest.raises(NotEmittable, match="x: too far from end to end"):
        emitted(program("x: f32[4, 4]", "y = exp(x)\nz = reshape(y, shape=(16,))\nz"), [far])


def test_as_many_parameters_as_a_launch_has_room_for() -> None:
    """Of every output an address and a number; of the input an address, and how many elements there are."""

    def sums(count: int) -> Program:
        lines = [f"y{i} = add(x, {i}.5)" for i in range(count)]
        return program("x: f32[4]", "\n".join([*lines, ", ".join(f"y{i}" for i in range(count))]))

    most = (MOST_PARAMETERS - 8 - 4) // (8 + 4)
    assert len(emitted(sums(most)).numbers) == 4 * (most + 1)
    with pytest.raises(NotEmittable, match=f"more than {MOST_PARAMETERS} bytes of parameters"):
        emitted(sums(most + 1))


@needs_compiler
def test_sizes_are_not_compiled_in() -> None:
    """Nor are strides, and numbers that were made of sizes."""

    def chain(n: int, c: int) -> Program:
        return program(
            f"m: f32[{n}, {c}, 1, 1, 1], k: f32[{n}, {c}, 3, 1, 1], w: f32[{2 * n}, {c // 2}, 3, {n}, 2], b: f16[{c}]",
            f"""f = scale_weight(w, b, groups=2)
y = mul(m, {1 / (n * c)})
z = add(y, k)
t = permute(z, dims=(1, 0, 2, 3, 4))
r = reshape(t, shape=({c * n}, 3))
v = to_channels({n}.5, b, channels={c})
f, r, v""",
        )

    texts = set()
    for n, c in ((2, 6), (3, 8), (6, 20)):
        made = chain(n, c)
        inputs = [tensor(*t.shape, dtype=t.dtype, seed=i) for i, t in enumerate(examples(made))]
        inputs[1] = torch.randn(3, n, c + 1, 2, 2)[:, :, 1:, :1, 1:].permute(1, 2, 0, 3, 4)
        check(made, inputs)
        texts.add(emitted(made, inputs).text)
    assert len(texts) == 1


# --- random programs ------------------------------------------------------------------------------
SIZES = st.sampled_from([1, 1, 2, 3, 4, 6])
#: operators of which a CPU and a GPU give the same bits
EXACT = ("add", "sub", "mul", "div", "minimum", "maximum", "gt", "eq", "neg", "abs", "relu", "cast", "clone")


@st.composite
def programs(draw: Draw) -> tuple[Program, list[Tensor]]:
    """Pointwise operators and views over tensors of ranks 0 to 5, in any layout, with several outputs."""
    dtypes = st.sampled_from(["f32", "f32", "f16", "bf16"])
    base = draw(st.lists(SIZES, min_size=1, max_size=5))
    inputs, tensors = [], []
    types: dict[str, Tensor] = {}
    for i in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(0, len(base)))
        shape = [draw(st.sampled_from([1, s])) for s in base[len(base) - rank :]] if i else base
        name, dtype = f"x{i}", draw(dtypes)
        order = draw(st.permutations(range(len(shape))))
        t = tensor(*(shape[d] for d in order), dtype=DTYPES[dtype], seed=i).permute(
            [order.index(d) for d in range(len(shape))]
        )
        inputs.append(f"{name}: {dtype}[{', '.join(map(str, shape)) or '()'}]")
        types[name] = t
        tensors.append(t)
    lines: list[str] = []
    for i in range(draw(st.integers(1, 10))):
        first = draw(st.sampled_from(list(types)))
        shape = types[first].shape
        kind = draw(st.sampled_from(["op", "op", "permute", "reshape"]))
        if kind == "permute" and len(shape) > 1:
            line = f"permute({first}, dims={tuple(draw(st.permutations(range(len(shape)))))})"
        elif kind == "reshape":
            line = f"reshape({first}, shape={_reshaped(draw, shape)})"
        else:
            op = draw(st.sampled_from(EXACT))
            if op in ("neg", "abs", "relu", "clone"):
                line = f"{op}({first})"
            elif op == "cast":
                line = f"cast({first}, dtype={draw(dtypes)})"
            else:
                second = draw(st.sampled_from([*types, "0.3", "-2"]))
                mixed = [types[n] for n in (first, second) if n in types]
                if len({t.dtype for t in mixed}) > 1 and any(t.dim() == 0 for t in mixed):
                    continue  # where a GPU's operators round such a scalar, a CPU's do not
                line = f"{op}({first}, {second})"
        try:
            chain = program(", ".join(inputs), "\n".join([*lines, f"v{i} = {line}", f"v{i}"]))
            result = chain.run(tensors)[0]
        except (RuntimeError, ValueError):
            continue
        if result.numel() > 4096:
            continue
        types[f"v{i}"] = result
        lines.append(f"v{i} = {line}")
    made = [line.split(" = ")[0] for line in lines]
    if not made:
        lines, made = ["v0 = relu(x0)"], ["v0"]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
    return program(", ".join(inputs), "\n".join([*lines, ", ".join(outputs)])), tensors


def _reshaped(draw: Draw, shape: torch.Size) -> tuple[int, ...]:
    """Other sizes with as many elements."""
    left, sizes = math.prod(shape), []
    while left > 1:
        size = draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
        sizes.append(size)
        left //= size
    for _ in range(draw(st.integers(0, 2))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return tuple(sizes)


@needs_compiler
@settings(max_examples=30, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs(drawn: tuple[Program, list[Tensor]]) -> None:
    chain, inputs = drawn
    try:
        emitted(chain, inputs)
    except NotEmittable as refusal:
        assume("arithmetic of torch.bool" not in str(refusal))
        raise
    check(chain, inputs)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_the_text_is_cuda(arch: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs the extra fxfuse[cuda]")
    for chain in (program(FOLDED, "\n".join([*FOLD, "f, e"])), *SAMPLES):
        cubin = jit.compile_cubin(emitted(chain).text, arch)
        assert cubin.kernels["bundle"].spills == 0 and not cubin.warnings


# --- which bundles a schedule has -----------------------------------------------------------------
CONV = (
    "y = conv_transpose(x, {}, {}, stride=(1, 1, 1), padding=(0, 0, 0), output_padding=(0, 0, 0), dilation=(1, 1, 1),"
    " groups=1)"
)
INPUTS = "x: f32[2, 6, 4, 5, 6], " + FOLDED.replace("3, 2, 2", "3, 3, 3")
NORM = ("z = relu(y)", "u, mean, var = batch_norm_train(z, g, h, eps=1e-5)")


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take tensors of any size; scales stay in the weights."""
    monkeypatch.setattr("fxfuse.kernels.stages.tail.LEAST_ELEMENTS", 1)


def cut(*lines: str, anchored: bool = True, inputs: str = INPUTS) -> Schedule:
    made = program(inputs, "\n".join(lines))
    return schedule(made, examples(made), anchored=anchored)


def told(steps: tuple[Step, ...]) -> list[str]:
    short = {Bundle: "bundle", Torch: "torch"}
    return [
        f"{short[type(s)]} {', '.join(s.makes)}: {s}" if type(s) in short else str(s).split(" -> ")[0] for s in steps
    ]


def test_what_runs_first_is_a_bundle() -> None:
    made = cut(*FOLD, CONV.format("f", "e"), "z = relu(y)", "z")
    ops = "add > rsqrt > mul > scale_weight > sub > mul > add"
    assert told(made.ahead) == [f"bundle f, e: one kernel on small tensors: {ops}"]
    assert str(made).startswith(f"first one kernel on small tensors: {ops}; one kernel: conv_transpose > relu")
    (step,) = made.ahead
    assert isinstance(step, Bundle) and step.reads == ("v", "g", "w", "b", "m", "h") and not step.doubtful


def test_all_that_can_run_runs_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel: what the map waits for, and what is an output and would have time."""
    monkeypatch.setattr("fxfuse.kernels.planning.schedule.LEAST_ELEMENTS", 1)
    lines = (
        "k = sub(m, m)",
        "t = add(h, k)",
        CONV.format("w", "None"),
        *(line.replace(", h,", ", t,") for line in NORM),
    )
    made = cut(*lines, "p = add(mean, b)", "q = add(var, k)", "u, p, q")
    assert [type(s).__name__ for s in made.steps] == ["Gather", "Bundle", "Map"]
    assert made.steps[1].makes == ("t", "q", "p")


def sources(expression: Expression | None) -> list[tuple[str, int | None]]:
    """The dims of tensors given to the chain that an expression strides over."""
    fields = expression.fields if expression is not None else ()
    return [(f.value, f.axis) for f in fields if f.kind == "stride" and len(f.value) == 1]


def test_views_are_strides_of_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.kernels.planning.schedule.LEAST_ELEMENTS", 1)
    made = cut(CONV.format("w", "b"), "z = group_norm(y, g, h, groups=2, eps=1e-5)", "z")
    _, norm = made.steps
    assert not isinstance(norm, (Bundle, Torch)) and {"g", "h"} <= {*norm.reads}
    assert sources(norm.before) == [("g", 0), ("h", 0)]
    views = (
        "r = reshape(k, shape=(8, 1, 1, 1))",
        "p = permute(t, dims=(2, 1, 0, 3))",
        "z = mul(y, r)",
        "u = add(z, p)",
    )
    made = cut(CONV.format("w", "b"), *views, "u", inputs=f"{INPUTS}, k: f32[1, 8, 1], t: f32[1, 1, 8, 8]")
    assert not made.ahead and not made.steps and made.kernel is not None
    assert sources(made.kernel.before) == [("k", 1), ("t", 2), ("t", 3)]


def test_operators_that_are_torchs_are_few_kernels_only() -> None:
    """Beside torch's own operators a kernel has to stand for three."""
    behind = ("q = softmax(y, dim=2)", "z = mul(q, s)", "z")
    for lines, expected in (
        (("t = add(m, 1.0)", "r = mul(t, 2.0)"), "add > mul"),
        (
            ("t = add(m, 1.0)", "n = neg(t)", "r = mul(n, 2.0)"),
            "one kernel on small tensors: add > neg > mul",
        ),
    ):
        made = cut(*lines, CONV.format("w", "b"), "s = reshape(r, shape=(8, 1, 1, 1))", *behind)
        assert any(expected in str(s) for s in made.steps), told(made.steps)


def test_where_nothing_else_is_torchs_one_operator_is_a_kernel() -> None:
    made = cut("k = mul(b, 2.0)", CONV.format("w", "k"), "z = relu(y)", "z")
    assert told(made.ahead) == ["bundle k: one kernel on small tensors: mul"]
    made = cut("k = mul(b, 2.0)", CONV.format("w", "k"), "z = vector_norm(y, ord=1.0, dims=(1,), keepdim=True)", "z")
    assert told(made.ahead) == ["torch k: mul"]


def test_large_views_stay_views() -> None:
    made = cut(CONV.format("w", "b"), "z = reshape(y, shape=(2, -1))", "z")
    assert told(made.steps) == ["bundle z: one kernel on small tensors: reshape"]
    made = cut(
        CONV.format("w", "b"), "z = reshape(y, shape=(2, -1))", "z", inputs=INPUTS.replace("4, 5, 6", "40, 5, 60")
    )
    assert told(made.steps) == ["torch z: reshape"]


def arranged(found: Program) -> tuple[Step, ...]:
    """Of a program that torch had to run as a whole."""
    values, whole = observe(found, examples(found)), Torch(found)
    bundler = Bundler(values, (whole,), kernels=False)
    return bundler.arrange(bundler.needed((whole,), found.outputs), found.outputs, all_small=False)


def test_what_torch_makes_is_looked_at() -> None:
    """Its strides are a library's affair: a kernel reads it only where they are as planned."""
    lines = "s = softmax(x, dim=1)\na = mul(s, 2.0)\nb = add(a, 1.0)\nc = neg(b)\nc"
    steps = arranged(program("x: f32[4, 6, 8]", lines))
    assert told(steps) == ["torch s: softmax", "bundle c: one kernel on small tensors: mul > add > neg"]
    bundle = steps[1]
    assert isinstance(bundle, Bundle) and bundle.doubtful == (("s", (48, 8, 1)),)


def test_what_is_not_there_yet_waits() -> None:
    lines = ["a = add(x, 1.0)", "b = mul(a, 2.0)", "c = neg(b)", "s = softmax(c, dim=0)"]
    lines += ["d = neg(s)", "e = mul(d, 2.0)", "f = add(e, b)", "dead = exp(f)", "f"]
    assert told(arranged(program("x: f32[8]", "\n".join(lines)))) == [
        "bundle b, c: one kernel on small tensors: add > mul > neg",
        "torch s: softmax",
        "bundle f: one kernel on small tensors: neg > mul > add",
    ]


@needs_compiler
def test_other_strides_than_planned_are_torchs() -> None:
    chain = program("x: f32[4, 6]", "a = mul(x, 2.0)\nb = reshape(x, shape=(24,))\na, b")
    x = tensor(4, 6)
    doubted = bundle_of(chain, [x])
    doubted = Bundle(doubted.program, doubted.made, doubted.kinds, doubted.strides, (("x", (6, 1)),))
    for given_, launches in ((x, ["bundle"]), (tensor(6, 4).t(), []), (x.clone(), ["bundle"])):
        values = {"x": given_}
        with emulated() as device:
            prepare(doubted, torch.device("cpu"), {}, set())(values)
            assert device.launches == launches
        assert torch.equal(values["a"], given_ * 2) and torch.equal(values["b"], given_.reshape(24))
        assert values["a"].stride() == (6, 1) and values["b"].data_ptr() != given_.data_ptr()


@needs_compiler
def test_what_kernels_alone_read_lies_in_one_tensor() -> None:
    """Also where torch runs the program."""
    chain = program("x: f32[4, 6]", "a = mul(x, 2.0)\nb = neg(x)\nc = gt(x, 0.0)\nd = add(x, 1.0)\na, b, c, d")
    x = tensor(4, 6)
    doubted = dataclasses.replace(bundle_of(chain, [x]), doubtful=(("x", (6, 1)),))
    kinds = dict(zip(chain.outputs, doubted.kinds, strict=True))
    places = {n: Place(n, 0, k.dtype, (4, 6), (6, 1)) for n, k in kinds.items()}
    places["v"] = Place("d", 4, torch.float32, (23,), (1,))  # a view
    found = _in_rooms([doubted], places, {"b"})
    where = {"a": ("room of a", 0), "b": ("b", 0), "c": ("room of a", 128), "d": ("room of a", 256)}
    assert {n: (p.base, p.offset) for n, p in found.items()} == {**where, "v": ("room of a", 260)}
    for given_, launches in ((x, ["bundle"]), (tensor(6, 4).t(), [])):
        values = {"x": given_}
        with emulated() as device:
            prepare(doubted, torch.device("cpu"), found, {"b"})(values)
            assert device.launches == launches and len(device.memory) == 2
        assert {*values} == {"x", "b", "room of a"}
        for name, expected in zip(chain.outputs, chain.run([given_]), strict=True):
            place = found[name]
            made = values[place.base]
            if name != "b":
                made = made[place.offset : place.end].view(place.dtype).view(4, 6)
            assert torch.equal(made, expected) and made.stride() == (6, 1)


@needs_compiler
def test_a_region_has_no_operator_of_torchs() -> None:
    """A whole region: outputs that were views have memory of their own."""
    lines = (
        "k = sub(m, m)",
        "t = add(h, k)",
        CONV.format("w", "None"),
        *(line.replace(", h,", ", t,") for line in NORM),
    )
    chain = program(INPUTS, "\n".join([*lines, "p = add(mean, b)", "q = reshape(var, shape=(2, 4))", "u, p, q"]))
    inputs = [tensor(*t.shape, seed=i) for i, t in enumerate(examples(chain))]
    with pytest.MonkeyPatch.context() as patch, emulated() as device:
        patch.setattr("fxfuse.kernels.planning.schedule.LEAST_ELEMENTS", 1)
        made = schedule(chain, inputs)
        assert made.kernel is not None
        ready = Prepared.of(chain, made, convolution_of(made.kernel, exact=True), torch.device("cpu"))
        assert ready.apart and not ready.asks_torch
        got = ready.run(inputs)
        assert device.launches[-2:] == ["bundle", "whole"]
    for mine, expected in zip(got, chain.run(inputs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-4)
