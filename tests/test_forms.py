"""What torch says of an operator is asked once: by the graphs that rules edit, and by plans of the same operators."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from harness import program
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxfuse import forms
from fxfuse.chain import to_graph
from fxfuse.forms import Form
from fxfuse.kernels.planning.observe import observe
from fxfuse.vocabulary.op import Op

TEXT = (
    "x: f32[2, 3, 4]",
    "m, v, s = statistics(x, batch=False, groups=1, eps=1e-05)\np = permute(x, dims=(2, 0, 1))\nr = relu(p)\nr, m",
)
OPERATORS = ["statistics", "permute", "relu"]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_known", {})


def vals(x: Tensor) -> list[Form]:
    """Of the chain's results, as a graph of it has them."""
    with mock.patch.object(Op, "__call__", autospec=True, side_effect=Op.__call__) as asked:
        made = to_graph(program(*TEXT), [x])
    vals.asked = [c.args[0].name for c in asked.call_args_list]  # type: ignore[attr-defined]
    return [Form.of(n.meta["val"]) for n in made.graph.output_node().args[0]]  # type: ignore[union-attr, misc]


def test_graphs_and_plans_ask_once() -> None:
    chain, x = program(*TEXT), torch.randn(2, 3, 4)
    expected = [Form.of(t) for t in chain.run([x])]
    for asked in (OPERATORS, []):
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
        assert vals(fake) == expected
        assert vals.asked == asked  # type: ignore[attr-defined]
    with mock.patch.object(Op, "__call__", side_effect=AssertionError):
        found = observe(chain, [x])
    assert [found[n] for n in chain.outputs] == expected


def test_what_plans_have_asked_graphs_know() -> None:
    chain, x = program(*TEXT), torch.randn(2, 3, 4)
    found = observe(chain, [x])
    with FakeTensorMode() as mode:
        assert vals(mode.from_tensor(x)) == [found[n] for n in chain.outputs]
    assert vals.asked == []  # type: ignore[attr-defined]


def test_other_strides_are_asked_for() -> None:
    with FakeTensorMode():
        first = vals(torch.empty(2, 3, 4))
        assert vals(torch.empty(4, 3, 2).permute(2, 1, 0)) != first
        assert vals.asked == OPERATORS  # type: ignore[attr-defined]


def test_sizes_that_are_not_known_are_not_remembered() -> None:
    given, sizes = torch.empty(2, 3, 4), StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(given, static_shapes=False, symbolic_context=sizes, source=ConstantSource("x"))
        assert not Form.of(x).known
        for _ in range(2):
            made = to_graph(program(*TEXT), [x])
            (result, _) = made.graph.output_node().args[0]  # type: ignore[misc]
            assert result.meta["val"].shape[0] is not None and not isinstance(result.meta["val"].shape[0], int)
    assert forms._known == {}
