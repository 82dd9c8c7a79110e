"""Values and their own reductions taken together: which, and that the program means the same."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from harness import program

from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.arithmetic import NotEmittable
from fxfuse.kernels.codegen.emit_persistent import emit_persistent
from fxfuse.kernels.codegen.persistent import MOST_REDUCTIONS, body_of, names_of, taken_together
from fxfuse.kernels.codegen.reductions import Fold, Rows, fold_of, holds_rows, inner_of, rows_of
from fxfuse.kernels.planning.observe import observe
from fxfuse.kernels.planning.schedule import _taken_together, schedule
from fxfuse.program import Program

INPUTS = "x: f32[3, 6, 4, 5, 2], c: f32[6, 1, 1, 1]"
MEAN, MAX = "{} = mean({}, dims=(1,), keepdim=True)", "{} = amax({}, dims=(1,), keepdim=True)"


def given(text: str, inputs: str = INPUTS) -> tuple[Program, dict[str, TensorType]]:
    made = program(inputs, text)
    values = observe(made, [torch.empty(t.shape, dtype=t.dtype) for _, t in made.inputs])
    return made, {n: TensorType(f.dtype, tuple(f.shape)) for n, f in values.items()}


def together(text: str, inputs: str = INPUTS, wanted: Collection[str] = ()) -> tuple[Program, list[str]]:
    """The program, and the operators of what is taken together and of the others, in order."""
    source, types = given(text, inputs)
    made = taken_together(source, types, lambda name, _: not wanted or name in wanted)
    made.verify()
    x = [torch.randn(t.shape).to(t.dtype) for _, t in source.inputs]
    for got, expected in zip(made.run(x), source.run(x), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    assert Program.parse(made.text("again"))[1] == made
    return made, [" ".join(names_of([i])) if i.op == "persistent" else f"({i.op})" for i in made.body]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{MEAN.format('m', 'x')}\ny = sub(x, m)\ny", ["mean sub"]),
        (f"{MEAN.format('m', 'x')}\n{MAX.format('a', 'x')}\ns = add(m, a)\ng = sigmoid(s)\ny = mul(x, g)\ny",
         ["mean amax add sigmoid mul"]),
        ("q = square(x)\nm = mean(q, dims=(1,), keepdim=False)\n"
         "r = reshape(m, shape=(3, 1, 4, 5, 2))\ny = div(x, r)\ny",
         ["square mean reshape div"]),
        ("p = softmax(x, dim=1)\nq = log_softmax(x, dim=1)\nz = mul(p, q)\ns = sum(z, dims=(1,), keepdim=False)\n"
         "y = neg(s)\ny", ["softmax log_softmax mul sum neg"]),
        ("m = mean(x, dims=(4,), keepdim=True)\ny = sub(x, m)\ny", ["mean sub"]),
        ("m = mean(x, dims=(2, 3), keepdim=True)\ny = sub(x, m)\ny", ["mean sub"]),
    ],
)  # fmt: skip
def test_taken_together(text: str, expected: list[str]) -> None:
    assert together(text)[1] == expected


def test_no_more_than_has_to_be() -> None:
    """What is in front of the first value that is reduced, and behind the last one, is for other expressions."""
    front, behind = "z = relu(x)", "y = tanh(t)\nu = mul(y, c)\nu"
    _, found = together(f"{front}\n{MEAN.format('m', 'z')}\nt = sub(z, m)\n{behind}")
    assert found == ["(relu)", "mean sub", "(tanh)", "(mul)"]


def test_two_dims_and_two_groups() -> None:
    """Each has its own rows; the second has those of what the first has made."""
    first, second = (
        "m = mean(x, dims=(1,), keepdim=True)\ny = sub(x, m)",
        "n = amax(y, dims=(4,), keepdim=True)\nz = div(y, n)",
    )
    assert together(f"{first}\n{second}\nz")[1] == ["mean sub", "amax div"]


def test_a_value_that_others_read_stays() -> None:
    text = f"z = relu(x)\n{MEAN.format('m', 'z')}\ny = sub(z, m)\nz, y"
    made, found = together(text)
    assert found == ["(relu)", "mean sub"] and [i.outs for i in made.body] == [("z",), ("y",)]


def test_of_another_dtype_than_its_value() -> None:
    """What is between two casts is taken."""
    text = f"z = cast(x, dtype=f32)\n{MEAN.format('m', 'z')}\ny = sub(z, m)\nt = cast(y, dtype=f16)\nt"
    assert together(text, "x: f16[3, 6, 4, 5, 2]")[1] == ["(cast)", "mean sub", "(cast)"]


@pytest.mark.parametrize(
    "text",
    [
        f"z = relu(x)\n{MEAN.format('m', 'z')}\ny = sigmoid(m)\ny",  # kernels have names for it
        "y = softmax(x, dim=1)\ny",
        "y = relu(x)\nz = mul(y, x)\nz",  # nothing is reduced
        f"{MEAN.format('m', 'x')}\ny = sub(x, m)\ny, m",  # a value inside that others read
        f"{MEAN.format('m', 'x')}\nd = mul(m, c)\ny = sub(x, d)\ny",  # a tensor
        "m = vector_norm(x, ord=1.0, dims=(1,), keepdim=True)\ny = div(x, m)\ny",  # no kernel has it
        "m = mean(x, dims=(1,), keepdim=False)\nr = reshape(m, shape=(3, 1, 5, 4, 2))\n"
        "t = reshape(r, shape=(3, 1, 4, 5, 2))\ny = sub(x, t)\ny",  # a view on the way that no kernel knows
        f"{MEAN.format('m', 'x')}\na = amax(x, dims=(4,), keepdim=True)\ns = add(m, a)\ny = sub(x, s)\ny",  # two dims
    ],
)
def test_left_alone(text: str) -> None:
    source, types = given(text)
    assert taken_together(source, types, lambda *_: True) == source


def test_what_only_looks_like_rows() -> None:
    """(3, 4, 5, 2) less its dim is no row of (3, 3, 4, 5, 2), though it has the shape of one sample."""
    text = "m = mean(x, dims=(1,), keepdim=False)\ny = sub(x, m)\ny"
    source, types = given(text, "x: f32[3, 3, 4, 5, 2]")
    assert taken_together(source, types, lambda *_: True) == source


def test_only_values_that_kernels_hold() -> None:
    text = f"{MEAN.format('m', 'x')}\ny = sub(x, m)\ny"
    source, types = given(text)
    asked = []
    assert taken_together(source, types, lambda name, dims: bool(asked.append((name, dims)))) == source
    assert ("x", (1,)) in asked


@pytest.mark.parametrize(
    ("shape", "dims", "held"),
    [
        ((2, 256, 4, 5, 6), (1,), True), ((2, 257, 4, 5, 6), (1,), False), ((2, 8, 4, 5, 6), (4,), True),
        ((4, 8, 4, 64, 256), (3, 4), True), ((2, 8, 1, 64, 257), (3, 4), False), ((2, 8, 4, 5, 6), (2, 3, 4), False),
        ((2, 8, 4, 5, 6), (2, 3), True), ((2, 8, 32, 9, 6), (2, 3), False), ((2, 8, 4, 5, 6), (2, 4), False),
        ((2, 8, 4, 5, 6), (0,), False), ((2, 8), (1,), False), ((2, 0, 4, 5, 6), (1,), False),
        ((2, 8, 4, 64, 256), (3, 4), False),
        ((1, 2, 4, 8, 1024), (4,), False), ((1, 2, 64, 1, 1024), (4,), True),
    ],
)  # fmt: skip
def test_rows_that_are_held(shape: tuple[int, ...], dims: tuple[int, ...], held: bool) -> None:
    assert holds_rows(TensorType(torch.float32, shape), dims) is held


def test_kernels_know_it_as_a_reduction() -> None:
    text, kind = f"{MEAN.format('m', 'x')}\ny = sub(x, m)\ny", TensorType(torch.float32, (3, 6, 4, 5, 2))
    (instr,) = together(text)[0].body
    body = body_of(instr)
    assert body is not None and body.keeps and body.flops > 2 and body.name == "Persistent"
    fold = fold_of(instr, kind)
    assert fold == Fold("Persistent", 6, None, body) and fold.keeps and fold.op == "Persistent" and not fold.once
    for dims in ("(4,)", "(2, 3)"):
        (instr,) = together(text.replace("(1,)", dims))[0].body
        body = body_of(instr)
        assert body is not None
        if dims == "(4,)":
            assert rows_of(instr, kind) == Rows("Persistent", 2, True, None, body)
        else:
            found = inner_of(instr, kind)
            assert found is not None and found[0] == Fold("Persistent", 20, None, body)
    (instr,) = together("m = mean(x, dims=(1,), keepdim=True)\na = prod(x, dim=1, keepdim=True)\ny = add(m, a)\ny")[
        0
    ].body
    found_body = body_of(instr)
    assert found_body is not None and not found_body.keeps


@pytest.mark.parametrize("case", ["one dim of space", "channels are neighbours"])
def test_what_torch_would_run_is_not_taken_together(case: str) -> None:
    """A result of two dims has no kernel; nor have rows of w where channels lie between its elements."""
    conv = "y = conv_transpose(x, w, None, stride={0}, padding={1}, output_padding={1}, dilation={0}, groups=1)"
    if case == "one dim of space":
        source = program(
            "x: f32[2, 8, 40000], w: f32[8, 16, 3]",
            f"{conv.format((1,), (0,))}\n{MEAN.format('m', 'y')}\nz = sub(y, m)\na = abs(z)\n"
            "s = sum(a, dims=(1,), keepdim=False)\ns",
        )
    else:
        source = program(
            "x: f32[2, 8, 256, 256], w: f32[8, 16, 1, 1]",
            f"{conv.format((1, 1), (0, 0))}\nm = amax(y, dims=(3,), keepdim=True)\nz = sub(y, m)\na = abs(z)\n"
            "s = sum(a, dims=(3,), keepdim=True)\nt = div(a, s)\nt",
        )
    x, w = (torch.empty(t.shape) for _, t in source.inputs)
    last = {} if case == "one dim of space" else {"memory_format": torch.channels_last}
    made = schedule(source, [x.contiguous(**last), w], anchored=False)
    assert "persistent" not in str(made) and "mean > sub" not in str(made) and "amax > sub" not in str(made)
    assert str(made).count("kernel") >= 1


FEW, LAST, GAPS = "one element too few", "channels are neighbours", "elements between its own"


@pytest.mark.parametrize(
    ("how", "dims", "taken"),
    [
        (None, (1,), True), (None, (4,), True), (None, (3, 4), True), (FEW, (1,), False),
        (LAST, (1,), True), (LAST, (4,), False), (LAST, (3, 4), False), (GAPS, (1,), False), (GAPS, (4,), False),
    ],
)  # fmt: skip
def test_how_values_lie_whose_rows_are_held(how: str | None, dims: tuple[int, ...], taken: bool) -> None:
    """Channels in either memory format, rows along w where they are neighbours; small values are others' affair."""
    source = program("x: f32[3, 6, 4, 5, 2]", f"m = mean(x, dims={dims}, keepdim=True)\ny = sub(x, m)\ny")
    x = torch.empty(3, 6, 4, 5, 4)[..., ::2] if how == GAPS else torch.empty(3, 6, 4, 5, 2)
    x = x.contiguous(memory_format=torch.channels_last_3d) if how == LAST else x
    made = _taken_together(source, observe(source, [x]), x.numel() + (how == FEW))
    assert [i.op for i in made.body] == (["persistent"] if taken else ["mean", "sub"])


def test_values_of_few_dims_have_no_rows() -> None:
    """Their memory formats are not asked for: there are none."""
    source = program(
        "x: f32[2, 8, 40], w: f32[8, 1, 1]",
        "y = conv_transpose(x, w, None, stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,), groups=1)\n"
        "r = reshape(y, shape=(80,))\ns = sum(r, dims=(0,), keepdim=True)\nt = sub(r, s)\nt",
    )
    assert "persistent" not in str(schedule(source, [torch.empty(t.shape) for _, t in source.inputs]))


def test_so_many_reductions() -> None:
    """Each computes anew what is in front of it, which costs as much as its size says."""
    stage = "a{0} = amax({1}, dims=(1,), keepdim=True)\nd{0} = div({1}, a{0})\ny{0} = gelu(d{0}, approximate='none')"
    lines = "\n".join(stage.format(i, f"y{i - 1}" if i else "x") for i in range(MOST_REDUCTIONS + 2))
    made, found = together(f"{lines}\ny{MOST_REDUCTIONS + 1}")
    assert [f.count("amax") for f in found if "amax" in f] == [MOST_REDUCTIONS, 2]
    bodies = [body_of(i) for i in made.body if i.op == "persistent"]
    assert bodies[0] is not None and bodies[1] is not None and bodies[0].flops > 4 * bodies[1].flops


def test_what_has_no_text() -> None:
    source, types = given(f"{MEAN.format('m', 'x')}\ny = sub(x, m)\ny", "x: f64[3, 6, 4, 5, 2]")
    with pytest.raises(NotEmittable, match="elements are float32, float16 or bfloat16, not f64"):
        emit_persistent(source, keeps=True)
    assert taken_together(source, types, lambda *_: True) == source
