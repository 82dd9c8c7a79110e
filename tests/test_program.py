"""Programs: text and back, verification, running."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import MODULE_SAMPLES, Sample, T, X, meaning, name_of, same, samples_of
from torch import Tensor, fx

from fxfuse import vocabulary
from fxfuse.call import FUNCTIONS, METHODS, MODULES
from fxfuse.instr import DTYPE_NAMES, Instr, Ref, TensorType
from fxfuse.program import Program, ProgramError
from fxfuse.vocabulary import Kind

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")

F32, F64 = torch.float32, torch.float64


def instr(out: str, op: str, *operands: Any, **attributes: Any) -> Instr:
    """One instruction; strings are names of values, attributes are completed."""
    given = tuple(Ref(o) if isinstance(o, str) else o for o in operands)
    return Instr((out,), op, given, tuple(vocabulary.lookup(op).complete(attributes).items()))


def program(*body: Instr, inputs: tuple[str, ...] = ("x",), outputs: tuple[str, ...] | None = None) -> Program:
    kind = TensorType(F64, (2, 3, 4))
    return Program(tuple((n, kind) for n in inputs), body, outputs or body[-1].outs)


# --- text and back --------------------------------------------------------------------------------
@functools.cache
def _programs_of_samples() -> dict[str, list[tuple[Program, list[Tensor], Any]]]:
    """One program per sample call of the tables: (program, tensors, expected value), by operator."""
    found: dict[str, list[tuple[Program, list[Tensor], Any]]] = {}
    calls: list[tuple[str, Any, Sample, Any]] = []
    adapters = set()
    for function, adapter in FUNCTIONS.items():
        if adapter not in adapters:
            adapters.add(adapter)
            calls += [("call_function", function, sample, None) for sample in samples_of(name_of(function))]
    calls += [("call_method", name, sample, None) for name in METHODS for sample in samples_of(name)[:2]]
    for kind in MODULES:
        calls += [("call_module", "m", sample, make().double()) for make, sample in MODULE_SAMPLES[kind][:2]]
    for op, target, sample, module in calls:
        each = meaning(op, target, sample, module)
        if each.call is None:
            continue
        try:
            value = each.run()
        except Exception:  # noqa: BLE001 - arguments that torch does not take
            continue
        names = {node: f"x{i}" for i, node in enumerate(each.values)}
        operands = tuple(Ref(names[o]) if isinstance(o, fx.Node) else o for o in each.call.operands)
        outs = tuple(f"v{i}" for i in range(vocabulary.lookup(each.call.op).outputs))
        inputs = tuple((names[n], TensorType(t.dtype, tuple(t.shape))) for n, t in each.values.items())
        body = (Instr(outs, each.call.op, operands, tuple(each.call.attributes.items())),)
        found.setdefault(each.call.op, []).append((Program(inputs, body, outs[:1]), list(each.values.values()), value))
    return found


#: what no model spells
DERIVED = [*vocabulary.names(Kind.DERIVED), "exp_below"]


@pytest.mark.parametrize("op", [n for n in vocabulary.names() if n not in DERIVED])
def test_every_operator_survives_its_text(op: str) -> None:
    assert op in _programs_of_samples(), f"no sample call means {op}"
    for original, tensors, value in _programs_of_samples()[op]:
        name, parsed = Program.parse(original.text("chain"))
        assert (name, parsed) == ("chain", original)
        assert parsed.text("chain") == original.text("chain")
        assert hash(parsed) == hash(original)
        parsed.check(tensors)
        assert same(parsed.run(tensors)[0], value)


@pytest.mark.parametrize("name", DERIVED)
def test_derived_operators_survive_their_text(name: str) -> None:
    op = vocabulary.lookup(name)
    attributes = tuple((attribute, (((0, 2), (-1, 3)), (), 1)) for attribute in op.attributes)
    outs = tuple(f"v{i}" for i in range(op.outputs))
    original = program(Instr(outs, name, (Ref("x"),) * op.arity, attributes))
    assert Program.parse(str(original))[1] == original


@pytest.mark.parametrize("op", vocabulary.names())
def test_only_views_share_memory(op: str) -> None:
    """What ``reuse`` and the operator's outputs rely on."""
    for original, tensors, _ in _programs_of_samples().get(op, []):
        taken = {t.untyped_storage()._cdata for t in tensors}
        (out,) = original.run(tensors)
        if not vocabulary.lookup(op).view:
            assert out.untyped_storage()._cdata not in taken, original


_numbers = st.one_of(st.integers(), st.floats(allow_nan=True), st.booleans())
_literals = st.recursive(
    st.one_of(_numbers, st.none(), st.text(), st.sampled_from([*DTYPE_NAMES])),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
_sizes = st.lists(st.one_of(st.integers(0, 10**6), st.none()), max_size=5).map(tuple)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(_literals, _numbers, st.sampled_from([*DTYPE_NAMES]), _sizes)
def test_any_literal_survives(value: Any, operand: Any, dtype: torch.dtype, shape: Any) -> None:
    body = (instr("v", "threshold", "x", threshold=value, value=value), instr("w", "add", "v", operand))
    original = Program((("x", TensorType(dtype, shape)),), body, ("w", "v"))
    original.verify()
    name, parsed = Program.parse(original.text("p"))
    assert name == "p"
    assert parsed == original
    assert hash(parsed) == hash(original)
    (kind,) = (t for _, t in parsed.inputs)
    assert kind == TensorType(dtype, shape)
    operands = [i.operands[-1] for i in (original.body[1], parsed.body[1])]
    assert type(operands[0]) is type(operands[1])
    assert repr(operands[0]) == repr(operands[1])


def test_the_text_of_a_program() -> None:
    body = (
        instr(
            "y",
            "conv_transpose",
            "x",
            "w",
            None,
            stride=(2,),
            padding=(0,),
            output_padding=(0,),
            dilation=(1,),
            groups=1,
        ),
        instr("a", "clamp", "y", -math.inf, None),
        instr("b", "masked_fill", "a", "m", math.nan),
        instr("c", "cast", "b", dtype=torch.bfloat16),
        instr("d", "add", "c", "s"),
    )
    inputs = (
        ("x", TensorType(F32, (None, 4, 5))),
        ("w", TensorType(F32, (4, 3, 2))),
        ("m", TensorType(torch.bool, (1,))),
        ("s", TensorType(torch.bfloat16, ())),
    )
    original = Program(inputs, body, ("d", "b"))
    assert str(original) == (
        "def program(x: f32[_, 4, 5], w: f32[4, 3, 2], m: b1[1], s: bf16[()]):\n"
        "    y = conv_transpose(x, w, None, stride=(2,), padding=(0,), output_padding=(0,), dilation=(1,), groups=1)\n"
        "    a = clamp(y, -inf, None)\n"
        "    b = masked_fill(a, m, nan)\n"
        "    c = cast(b, dtype=bf16)\n"
        "    d = add(c, s)\n"
        "    return d, b\n"
    )
    assert Program.parse(str(original)) == ("program", original)


def test_equality_is_equality_of_text() -> None:
    def added(value: Any) -> Program:
        return program(instr("v", "add", "x", value))

    different = [added(v) for v in (1, 1.0, True, -1, 0.0, -0.0, math.inf, math.nan, "x")]
    for i, a in enumerate(different):
        for j, b in enumerate(different):
            assert (a == b) == (i == j)
    assert added(math.nan) == added(float("nan"))
    assert hash(added(math.nan)) == hash(added(float("nan")))
    assert len({*different, *map(copy.deepcopy, different)}) == len(different)
    assert added(1).body[0] != "v = add(x, 1)"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"])
def test_copies(again: Any) -> None:
    original = program(instr("v", "relu", "x"), instr("w", "mul", "v", 2.0))
    original.run([T(2, 3, 4)])
    hash(original)
    copied = again(original)
    assert vars(copied).keys() == {"inputs", "body", "outputs"}
    assert copied == original
    assert hash(copied) == hash(original)
    assert torch.equal(copied.run([T(2, 3, 4)])[0], original.run([T(2, 3, 4)])[0])


# --- verification ---------------------------------------------------------------------------------
def _relu(out: str = "v", operand: str = "x") -> Instr:
    return instr(out, "relu", operand)


def _raw(outs: str, op: str, *operands: Any, **attributes: Any) -> Instr:
    return Instr(tuple(outs.split()), op, operands or (Ref("x"),), tuple(attributes.items()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (program(_relu(operand="z")), "`v = relu(z)`: z is not defined here"),
        (program(_relu("v", "w"), _relu("w", "x")), "`v = relu(w)`: w is not defined here"),
        (program(_relu(), _relu()), "`v = relu(x)`: v is defined twice"),
        (program(_relu("x")), "`x = relu(x)`: x is defined twice"),
        (program(_relu(), inputs=("x", "x")), "the inputs: x is defined twice"),
        (program(_relu(), outputs=("v", "w")), "the output w is not defined"),
        (program(_relu("inf")), "`inf = relu(x)`: 'inf' cannot be the name of a value"),
        (program(_relu("def")), "`def = relu(x)`: 'def' cannot be the name of a value"),
        (program(_relu(), inputs=("x", "a b")), "the inputs: 'a b' cannot be the name of a value"),
        (program(_raw("v", "rleu")), "in `rleu`: no operator 'rleu' in the vocabulary; known: abs, "),
        (program(_raw("v", "relu", Ref("x"), 1)), "`v = relu(x, 1)`: relu takes 1 operands, not 2"),
        (program(_raw("v w", "relu")), "`v, w = relu(x)`: relu gives 1 tensors, not 2"),
        (program(_raw("v", "relu", slope=1)), "in `relu`: relu has no attribute ['slope']; it has []"),
        (program(_raw("v", "elu")), "in `elu`: elu needs the attribute 'alpha'"),
        (
            program(_raw("v", "softplus", threshold=1, beta=2)),
            "`v = softplus(x, threshold=1, beta=2)`: attributes must be complete and in the order ('beta', "
            "'threshold')",
        ),
        (program(instr("v", "add", 1, 2.0)), "`v = add(1, 2.0)`: no operand is a value"),
        (program(instr("v", "add", "x", 1j)), "`v = add(x, 1j)`: 1j is neither a value nor a real number"),
        (program(instr("v", "elu", "x", alpha=[1])), "`v = elu(x, alpha=[1])`: alpha=[1] cannot be written as text"),
    ],
)  # fmt: skip
def test_verify(wrong: Program, message: str) -> None:
    with pytest.raises(ProgramError) as error:
        wrong.verify()
    assert str(error.value).startswith(message)
    if not message.endswith("abs, "):
        assert str(error.value) == message


def test_check() -> None:
    checked = Program((("x", TensorType(F32, (2, None))), ("b", TensorType(torch.bool, ()))), (_relu(),), ("v",))
    b = torch.tensor(True)
    checked.check([torch.zeros(2, 7), b])
    for tensors, message in (
        ([torch.zeros(2, 7)], "1 tensors given; the program takes 2"),
        ([torch.zeros(3, 7), b], "input x: shape (3, 7) where f32[2, _] is expected"),
        ([torch.zeros(2, 7, 1), b], "input x: shape (2, 7, 1) where f32[2, _] is expected"),
        ([torch.zeros(2, 7).double(), b], "input x: dtype torch.float64 where torch.float32 is expected"),
        ([torch.zeros(2, 7), b.float()], "input b: dtype torch.float32 where torch.bool is expected"),
        ([torch.zeros(2, 7), b[None]], "input b: shape (1,) where b1[()] is expected"),
    ):
        with pytest.raises(ProgramError) as error:
            checked.check(tensors)
        assert str(error.value) == message


# --- text that is no program ----------------------------------------------------------------------
_OK = "def p(x: f32[2]):\n    v = relu(x)\n    return v\n"


def _with(line: str, head: str = "def p(x: f32[2]):", end: str = "return v") -> str:
    return f"{head}\n    {line}\n    {end}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a program is one `def`"),
        ("x = 1", "a program is one `def`"),
        (_OK + _OK, "a program is one `def`"),
        ("def", "not the text of a program"),
        ("\0", "not the text of a program"),
        ("(" * 500, "not the text of a program"),
        ("-" * 100_000 + "1", "not the text of a program"),
        ("async " + _OK, "a program is one `def`"),
        ("class p:\n    pass", "a program is one `def`"),
        ("@relu\n" + _OK, "p: a program has plain inputs"),
        (_OK.replace("x: f32[2]", "x: f32[2] = 1"), "p: a program has plain inputs"),
        (_OK.replace("x: f32[2]", "*x"), "p: a program has plain inputs"),
        (_OK.replace("x: f32[2]", "x: f32[2], /"), "p: a program has plain inputs"),
        (_OK.replace("x: f32[2]", "*, x: f32[2]"), "p: a program has plain inputs"),
        (_OK.replace(": f32[2]", ""), "not a tensor type: nothing"),
        (_OK.replace("f32[2]", "f32"), "not a tensor type: f32"),
        (_OK.replace("f32[2]", "f33[2]"), "not a tensor type: f33[2]"),
        (_OK.replace("f32[2]", "f32[-2]"), "not a tensor type: f32[-2]"),
        (_OK.replace("f32[2]", "f32[2.0]"), "not a tensor type: f32[2.0]"),
        (_OK.replace("f32[2]", "f32[True]"), "not a tensor type: f32[True]"),
        (_OK.replace("f32[2]", "f32['2']"), "not a tensor type: f32['2']"),
        (_OK.replace("f32[2]", "f32[n]"), "not a literal: n"),
        ("def p(x: f32[2]):\n    v = relu(x)\n", "p: a program ends with the return of its outputs"),
        (_OK.replace("return v", "return"), "p: a program ends with the return of its outputs"),
        (_OK.replace("return v", "return v + v"), "not the names of values: v + v"),
        (_OK.replace("return v", "return v, 1"), "not the names of values: (v, 1)"),
        (_OK.replace("return v", "return v\n    return v"), "not an assignment: return v"),
        (_with("v = x"), "not a call of an operator: v = x"),
        (_with("v = w = relu(x)"), "not a call of an operator: v = w = relu(x)"),
        (_with("v: int = relu(x)"), "not an assignment: v: int = relu(x)"),
        (_with("v += relu(x)"), "not an assignment: v += relu(x)"),
        (_with("v.a = relu(x)"), "not the names of values: v.a"),
        (_with("v, w[0] = relu(x)"), "not the names of values: (v, w[0])"),
        (_with("v = rleu(x)"), "in `v = rleu(x)`: no operator 'rleu' in the vocabulary"),
        (_with("v = relu(x, **k)"), "not a literal: k"),
        (_with("v = relu(*x)"), "not a literal: *x"),
        (_with("v = relu(relu(x))"), "not a literal: relu(x)"),
        (_with("v = add(x, 1 + 1)"), "not a literal: 1 + 1"),
        (_with("v = add(x, 1j)"), "not a literal: 1j"),
        (_with("v = add(x, -'a')"), "not a literal: -'a'"),
        (_with("v = add(x, -True)"), "not a literal: -True"),
        (_with("v = add(x, - -1)"), "not a literal: --1"),
        (_with("v = add(x, ...)"), "not a literal: ..."),
        (_with("v = add(x, b'a')"), "not a literal: b'a'"),
        (_with("v = elu(x, alpha=[1])"), "not a literal: [1]"),
        (_with("v = elu(x, alpha=x)"), "not a literal: x"),
        (_with("v = elu(x)"), "in `v = elu(x)`: elu needs the attribute 'alpha'"),
        (_with("v = elu(x, beta=1)"), "in `v = elu(x, beta=1)`: elu has no attribute ['beta']"),
        (_with("v = relu(y)"), "`v = relu(y)`: y is not defined here"),
        (_with("v = add(x, 'a')"), "`v = add(x, 'a')`: 'a' is neither a value nor a real number"),
        (_with("v = add(x, f32)"), "`v = add(x, f32)`: torch.float32 is neither a value nor a real number"),
        (_with("v = open('/tmp/x')"), "in `v = open('/tmp/x')`: no operator 'open'"),
    ],
)  # fmt: skip
def test_malformed_text(text: str, message: str) -> None:
    with pytest.raises(ProgramError) as error:
        Program.parse(text)
    assert str(error.value).startswith(message)


def test_nothing_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    bomb = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for text in (
        bomb,
        _with(f"v = relu({bomb})"),
        _with(f"v = elu(x, alpha={bomb})"),
        _with(f"v = relu(x, **{bomb})"),
        _with(f"v = ({bomb} or relu)(x)"),
        _with("v = relu(x)", head=f"def p(x: f32[{bomb}]):"),
        _with("v = relu(x)", head=f"def p(x: {bomb}):"),
        _with("v = relu(x)", head=f"def p(x: f32[2] = {bomb}):"),
        _with("v = relu(x)", head=f"@{bomb}\ndef p(x: f32[2]):"),
        _with("v = relu(x)", end=f"return {bomb}"),
        _with(f"v = elu(x, alpha=f'{{{bomb}}}')" if '"' not in bomb else ""),
    ):
        with pytest.raises(ProgramError):
            Program.parse(text)
    assert not trap.exists()


_LONG = str(program(instr("v", "clamp", "x", -1.0, 2), instr("w", "softmax", "v", dim=1), instr("u", "add", "w", "v")))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_text_is_read_or_refused(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(_LONG)))
    stop = data.draw(st.integers(start, min(start + 8, len(_LONG))))
    patch = data.draw(st.one_of(st.text(max_size=4), st.text("()[]{},:=-*.1xvf\n _", max_size=6)))
    text = _LONG[:start] + patch + _LONG[stop:]
    try:
        _, parsed = Program.parse(text)
    except ProgramError:
        return
    parsed.verify()
    assert Program.parse(str(parsed))[1] == parsed


# --- running --------------------------------------------------------------------------------------
_INPLACE = [n for n in vocabulary.names() if vocabulary.lookup(n).inplace is not None]
_ATTRIBUTES = {"negative_slope": 0.1, "alpha": 0.5, "min_val": -0.5, "max_val": 0.5, "threshold": 0.1, "value": 0.3}


@st.composite
def _chains(draw: Any) -> Program:
    """Pointwise operators and views over two inputs, values used any number of times."""
    shapes = {"x": (2, 3), "b": (3,)}
    body: list[Instr] = []
    for number in range(draw(st.integers(1, 7))):
        first = draw(st.sampled_from([n for n, s in shapes.items() if s == (2, 3)]))
        other = draw(st.one_of(st.sampled_from(sorted(shapes)), st.sampled_from([2, 0.5, True])))
        op = draw(st.sampled_from([*_INPLACE, "reshape", "detach", "where", "clone"]))
        if op == "sub" and other is True:  # which torch refuses
            other = 1
        operands: tuple[Any, ...] = (first,)
        attributes: dict[str, Any] = {k: _ATTRIBUTES[k] for k in vocabulary.lookup(op).attributes if k in _ATTRIBUTES}
        if op == "clamp":
            operands = draw(
                st.sampled_from([(first, -1, other), (first, other, None), (first, None, "b"), (first, 0, 1.0)])
            )
        elif op == "where":
            body.append(instr(f"m{number}", "gt", first, 0))
            operands = (f"m{number}", first, other)
        elif op == "reshape":
            attributes = {"shape": (2, 3)}
        elif vocabulary.lookup(op).arity == 2:
            operands = (first, other) if draw(st.booleans()) else (other, first)
        body.append(instr(f"v{number}", op, *operands, **attributes))
        shapes[f"v{number}"] = (2, 3)
    values = [i.outs[0] for i in body]
    outputs = [*draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)), values[-1]]
    kinds = (("x", TensorType(F64, (2, 3))), ("b", TensorType(F64, (3,))))
    made = Program(kinds, tuple(body), tuple(outputs))
    made.verify()
    return made


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(_chains())
def test_reuse_changes_nothing(chain: Program) -> None:
    inputs = [T(2, 3), T(3, seed=3)]
    before = [t.clone() for t in inputs]
    expected = chain.run(inputs)
    got = chain.run(inputs, reuse=True)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True)), chain
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), chain


def test_reuse_writes_over_dead_intermediates() -> None:
    chain = program(instr("a", "add", "x", 1.0), instr("b", "relu", "a"), instr("c", "mul", "b", 2.0), outputs=("c",))
    assert [s.inplace is not None for s in chain._steps.steps] == [False, True, True]
    (out,) = chain.run([X[..., 0]], reuse=True)
    assert same(out, (X[..., 0] + 1).relu() * 2)


@pytest.mark.parametrize(
    "body",
    [
        # a view of a value that is read again
        (
            *(instr("a", "add", "x", 1.0), instr("b", "reshape", "a", shape=(4, 6))),
            *(instr("c", "relu", "b"), instr("d", "mul", "a", 2.0)),
        ),
        # twice the same operand
        (instr("a", "add", "x", 1.0), instr("d", "mul", "a", "a")),
        # an output
        (instr("a", "add", "x", 1.0), instr("c", "relu", "a"), instr("d", "mul", "c", "a")),
        # an input
        (instr("c", "relu", "x"), instr("d", "mul", "c", "x")),
        # a smaller first operand
        (instr("a", "sum", "x", dims=(0,), keepdim=True), instr("d", "mul", "a", "x")),
        # another dtype
        (instr("a", "cast", "x", dtype=F32), instr("d", "mul", "a", "x")),
        (instr("a", "gt", "x", 0.0), instr("d", "mul", "a", 2.0)),
    ],
)  # fmt: skip
def test_what_is_not_written_over(body: tuple[Instr, ...]) -> None:
    outputs = tuple(i.outs[0] for i in body)
    for chosen in (outputs, outputs[-1:], outputs[:1] + outputs[-1:]):
        chain = program(*body, outputs=chosen)
        x = T(2, 3, 4)
        expected = chain.run([x])
        assert all(same(a, b) for a, b in zip(chain.run([x], reuse=True), expected, strict=True))
        assert torch.equal(x, T(2, 3, 4))


def test_an_operator_of_several_outputs_whose_outputs_nobody_reads() -> None:
    attributes = tuple(vocabulary.lookup("batch_norm_train").complete({"eps": 1e-5}).items())
    body = (Instr(("y", "m", "v"), "batch_norm_train", (Ref("x"), None, None), attributes), instr("z", "relu", "y"))
    for outputs in (("z",), ("m", "z"), ("z", "v", "y")):
        got = program(*body, outputs=outputs).run([T(2, 3, 4)], reuse=True)
        y = torch.nn.functional.batch_norm(T(2, 3, 4), None, None, training=True)
        values = {"y": y, "z": y.relu(), "m": T(2, 3, 4).mean((0, 2)), "v": T(2, 3, 4).var((0, 2))}
        for name, value in zip(outputs, got, strict=True):
            torch.testing.assert_close(value, values[name])


def test_reuse_leaves_no_holes() -> None:
    """What is left out of a convolution's output is no hole in the memory of what is behind it."""
    text = (
        "def chain(x: f32[2, 4, 3, 3, 3], w: f32[4, 4, 2, 2, 2]):\n"
        "    y = conv_transpose(x, w, None, stride=(1, 1, 1), padding=(0, 0, 0), output_padding=(0, 0, 0), "
        "dilation=(1, 1, 1), groups=1, extent=(3, 4, 4))\n"
        "    z = silu(y)\n    return z\n"
    )
    program = Program.parse(text)[1]
    tensors = [torch.randn(2, 4, 3, 3, 3), torch.randn(4, 4, 2, 2, 2)]
    (expected,), (got,) = program.run(tensors), program.run(tensors, reuse=True)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride() and got.is_contiguous()
