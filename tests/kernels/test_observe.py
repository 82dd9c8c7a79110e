"""Forms of values, and that what is known of an instruction is used where it is the same, and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import program
from torch import Tensor

from fxfuse import forms as remembered
from fxfuse.forms import Form
from fxfuse.kernels.planning import observe as observing
from fxfuse.kernels.planning.observe import Unscheduled, examples, observe
from fxfuse.program import Program


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is known at first; the operators that torch was asked about."""
    monkeypatch.setattr(remembered, "_known", {})
    asked: list[str] = []
    original = observing._Fakes.run
    monkeypatch.setattr(observing._Fakes, "run", lambda self, i: asked.append(i.op) or original(self, i))
    return asked


def one(line: str, kind: str = "f32[2, 3, 4]") -> Program:
    return program(f"x: {kind}", f"r = {line}\nr")


def forms(chain: Program, *inputs: Tensor) -> dict[str, Form]:
    return observe(chain, inputs or examples(chain))


def test_forms_are_those_of_torch() -> None:
    chain = program(
        "x: f16[2, 3, 4, 5], w: f16[3, 6, 3, 3]",
        "y = conv_transpose(x, w, None, stride=(2, 1), padding=(1, 0), output_padding=(0, 0), dilation=(1, 1), "
        "groups=1, extent=None)\nm = mean(y, dims=(2, 3), keepdim=False)\nz = cast(m, dtype=f32)\nz, y",
    )
    x = torch.randn(2, 3, 4, 5).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(3, 6, 3, 3).half()
    for _ in range(2):
        found = forms(chain, x, w)
        for name, expected in zip(chain.outputs, chain.run([x, w]), strict=True):
            form = found[name]
            assert form == Form.of(expected)
            assert (form.stride(), form.numel()) == (expected.stride(), expected.numel())


def test_torch_is_asked_once(run: list[str]) -> None:
    """The same instruction under other names, in another program; what follows it there is new."""
    first = program("x: f32[2, 3]", "a = relu(x)\nb = exp(a)\nb")
    other = program("v: f32[2, 3]", "t = relu(v)\nu = sum(t, dims=(1,), keepdim=False)\nu")
    assert forms(first)["b"].shape == (2, 3)
    assert run == ["relu", "exp"]
    assert forms(first) == forms(first) and forms(other)["u"].shape == (2,)
    assert run == ["relu", "exp", "sum"]


@pytest.mark.parametrize("line", ["add(x, {})", "clamp(x, {}, None)"])
def test_numbers_that_are_equal_and_not_the_same(line: str) -> None:
    """Whole numbers of int32 stay, floats and what is added to booleans do not."""
    for numbers in itertools.permutations(["1", "1.0", "True"]):
        remembered._known.clear()
        for number in numbers:
            chain = one(line.format(number), "i32[2, 3]")
            try:
                (expected,) = chain.run([torch.ones(2, 3, dtype=torch.int32)])
            except (RuntimeError, TypeError):
                with pytest.raises(Unscheduled):
                    forms(chain)
            else:
                assert forms(chain)["r"].dtype is expected.dtype, (numbers, number)


def test_what_else_decides(run: list[str]) -> None:
    """Sizes, strides, dtypes, attributes, and torch's default dtype."""
    mean = one("mean(x, dims=(1,), keepdim=False)")
    forms(mean), forms(mean, torch.ones(2, 3, 4).transpose(1, 2).contiguous().transpose(1, 2))
    forms(mean, torch.ones(2, 3, 4).double()), forms(mean, torch.ones(2, 3, 5))
    assert forms(one("mean(x, dims=(1,), keepdim=True)"))["r"].shape == (2, 1, 4)
    assert run == ["mean"] * 5
    exp = one("exp(x)", "i64[2]")
    assert forms(exp)["r"].dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert forms(exp)["r"].dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_refusal_is_not_kept(run: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(Unscheduled, match=r"`r = max_pool\(x.*\)`: "):
            forms(one("max_pool(x, kernel=(9,), stride=(9,), padding=(0,), dilation=(1,), ceil_mode=False)"))
    assert len(run) == 2


def test_it_forgets(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST_KNOWN", 2)
    for line in ("relu(x)", "exp(x)", "tanh(x)", "relu(x)"):
        forms(one(line))
        assert len(remembered._known) <= 2
    assert run == ["relu", "exp", "tanh", "relu"]
