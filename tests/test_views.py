"""Views of tensors from outside, which regions have by themselves: where they do, what stays, and why."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agree, assert_same
from strategies import Chain
from test_partition import CONV, SAME, agree, chains_of
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxfuse
from fxfuse import dynamo
from fxfuse.bench.chains import Scale, Stages, up
from fxfuse.kernels.plan import Path
from fxfuse.ops import run_region
from fxfuse.pipeline import Options, fuse
from fxfuse.report import Report

MUL = "conv_transpose > reshape > mul"


def model(
    *lines: str, conv: str = CONV, p: tuple[int, ...] = (3,), q: tuple[int, ...] = (), modules: tuple[str, ...] = ()
) -> Chain:
    """A model with the parameters p0 and p1, of shapes ``p`` and ``q``; its last line names the outputs."""
    *body, last = lines
    named = tuple((f"m{i}", text) for i, text in enumerate((conv, *modules)))
    outputs = tuple(last.removeprefix("return ").split(", "))
    first = () if any("v0 =" in line for line in body) else ("v0 = self.m0(x)",)
    return Chain((2, 2, 4, 5), named, (("p0", p), ("p1", q)), (*first, *body), outputs)


def left(report: Report) -> list[str]:
    """What runs in a call beside regions."""
    assert report.graph_after is not None
    nodes = [n for n in report.graph_after.nodes if n.op not in ("placeholder", "output")]
    items = {u for n in nodes if n.target is run_region for u in n.users}
    return [n.name for n in nodes if n.target is not run_region and n not in items]


# --- what regions have by themselves --------------------------------------------------------------
@pytest.mark.parametrize(
    ("view", "chain"),
    [
        ("self.p0.view(-1, 1, 1)", MUL),
        ("self.p0.reshape(1, 3, 1, 1)", MUL),
        ("self.p0[:, None, None]", MUL),
        ("self.p0[None, :, None, None]", MUL),
        ("self.p0[..., None, None]", MUL),
        ("self.p0[None][..., None].unsqueeze(3)", "conv_transpose > reshape > reshape > reshape > mul"),
        ("self.p0.unflatten(0, (3, 1, 1))", MUL),
        ("self.p0.detach().view(3, 1, 1)", "conv_transpose > detach > reshape > mul"),
        ("self.p0.view(1, 1, 3).transpose(0, -1)", "conv_transpose > reshape > permute > mul"),
        ("self.p0.view(1, 1, 3).permute(2, 1, 0).squeeze(0)", "conv_transpose > reshape > permute > reshape > mul"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("export", [False, True])
def test_views_of_a_parameter(view: str, chain: str, export: bool) -> None:
    made = model(f"v1 = v0 * {view}", "return v1")
    report = agree(Chain(**{**vars(made), "export": export}).make()[0])
    if export and "None" in view:  # it makes them of several
        chain = chains_of(report)[0]
        assert set(chain.split(" > ")) == {"conv_transpose", "reshape", "mul"}
    assert chains_of(report) == [chain]
    assert left(report) == []
    for node in report.nodes:
        assert node.kind != "operator" or (node.region, node.reason) == (0, "")
    assert len(report.regions[0].operators) == chain.count(">") + 1
    assert report.staying == {}
    inputs = [str(kind) for _, kind in report.regions[0].region.original.inputs]
    assert inputs[3:] == ["f64[3]"]


@pytest.mark.parametrize(
    ("made", "chains", "stays"),
    [
        # a view read twice, by one region and by two; the tensor itself, too
        (
            model("s = self.p0.view(3, 1, 1)", "v1 = v0 * s + s", "return v1"),
            ["conv_transpose > reshape > mul > add"],
            [],
        ),
        (
            model("s = self.p0[:, None, None]", "v1 = self.m1(x) + s", "v2 = v0 * s", "return v1, v2", modules=(CONV,)),
            ["conv_transpose > reshape > mul", "conv_transpose > reshape > add"],
            [],
        ),
        (
            model("v1 = v0 * self.p0 + self.p0.view(3, 1, 1)", "return v1", p=(1, 3, 1, 1)),
            ["conv_transpose > mul > reshape > add"],
            [],
        ),
        # of the call's input, which is the convolution's as well
        (
            model("v1 = v0 + x.flatten(1).view(2, 2, 4, 5)", "return v1", conv=SAME),
            ["conv_transpose > reshape > reshape > add"],
            [],
        ),
        # of what is computed, and of what another region makes
        (model("v1 = v0 * self.p0.exp().view(3, 1, 1)", "return v1"), [MUL], ["exp"]),
        (
            model(
                *("s = self.m1(x).cumsum(0)", "t = s.flatten(0, 2)", "v1 = v0 + t.view(2, 3, 4, 5)", "return v1"),
                modules=(CONV,),
            ),
            ["conv_transpose > reshape > reshape > add", "conv_transpose"],
            ["cumsum"],
        ),
        # what others read, too, stays for them
        (
            model("s = self.p0.view(3, 1, 1)", "v1 = v0 * s", "t = s.cumsum(0)", "return v1, t"),
            [MUL],
            ["view", "cumsum"],
        ),
        (
            model("s = self.p0.view(3, 1)", "v1 = v0 * s.unsqueeze(2)", "t = s.cumsum(0)", "return v1, t"),
            ["conv_transpose > reshape > reshape > mul"],
            ["view", "cumsum"],
        ),
    ],
)  # fmt: skip
def test_who_reads_a_view(made: Chain, chains: list[str], stays: list[str]) -> None:
    report = agree(made.make()[0])
    assert chains_of(report) == chains
    assert left(report) == stays
    regions = {n.name: n.region for n in report.nodes if n.kind == "operator"}
    assert {name for name, region in regions.items() if region is None} == {*stays}


def test_a_view_that_is_a_result_is_one() -> None:
    made, x = model("s = self.p0.view(3, 1, 1)", "v1 = v0 * s", "return v1, s").make()
    fast = fxfuse.optimize(made, x)
    assert (chains_of(fast.fxfuse_report), left(fast.fxfuse_report)) == ([MUL], ["view"])
    for _ in range(4):
        _, seen = fast(x)
        assert seen._base is made.p0 and seen.data_ptr() == made.p0.data_ptr()


# --- what they are given as it is -----------------------------------------------------------------
ADD = "conv_transpose > add"


@pytest.mark.parametrize(
    ("made", "chains", "stays"),
    [
        # a reshape that copies: later writes would not be seen in the copy
        (
            model("v1 = v0 * self.p0.t().reshape(12).view(3, 4, 1)", "return v1", p=(4, 3)),
            [MUL],
            ["t", "reshape"],
        ),
        # elements that are left out are no view of the vocabulary; those that are repeated are
        (model("v1 = v0 * self.p0[1:].view(3, 1, 1)", "return v1", p=(4,)), [MUL], ["getitem"]),
        (model("v1 = v0 * self.p0[0]", "return v1", p=(2, 3, 4, 5)), ["conv_transpose > mul"], ["getitem"]),
        (model("v1 = v0 * self.p0.expand(3, 4, 1)", "return v1", p=(3, 1, 1)), ["conv_transpose > expand > mul"], []),
        # of memory that something writes to: before, between, behind, and through another view
        (
            model("s = x.atan()", "t = s.view(2, 2, 4, 5)", "s.mul_(2)", "v1 = v0 + t", "return v1", conv=SAME),
            [ADD],
            ["atan", "view", "mul_"],
        ),
        (
            model("s = x.atan()", "v1 = v0 + s.view(2, 2, 4, 5)", "s.mul_(2)", "return v1, s", conv=SAME),
            [ADD],
            ["atan", "view", "clone", "mul_"],
        ),
        (
            model("s = x.atan()", "s.view(-1).mul_(2)", "v1 = v0 + s.view(2, 2, 4, 5)", "return v1, s", conv=SAME),
            [ADD],
            ["atan", "view", "mul_", "view_1"],
        ),
        (
            model("s = x.atan()", "s.view(-1)[0] = 0", "v1 = v0 + s.view(2, 2, 4, 5)", "return v1", conv=SAME),
            [ADD],
            ["atan", "view", "setitem", "view_1"],
        ),
        # what says that a tensor is detached from now on
        (
            model("s = self.p0.exp()", "s.detach_()", "v1 = v0 * s.view(3, 1, 1)", "return v1"),
            [MUL],
            ["exp", "detach_"],
        ),
        # the convolution's own weight and bias
        (
            model("v0 = F.conv_transpose2d(x, self.p0.view(2, 3, 3, 2))", "v1 = v0.relu()", "return v1", p=(36,)),
            ["conv_transpose > relu"],
            ["view"],
        ),
        (
            model(
                *("s = self.p0.view(3)", "v0 = F.conv_transpose2d(x, self.p1, s)", "v1 = v0 * s.view(3, 1, 1)"),
                "return v1",
                p=(3, 1), q=(2, 3, 3, 2),
            ),
            ["conv_transpose > reshape > reshape > mul"],
            ["view"],
        ),
    ],
)  # fmt: skip
def test_what_regions_are_given(made: Chain, chains: list[str], stays: list[str]) -> None:
    report = agree(made.make()[0])
    assert chains_of(report) == chains
    assert left(report) == stays


def test_running_statistics_that_a_region_moves_are_not_looked_at() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(2, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.norm.running_var.view(3, 1, 1)  # type: ignore[union-attr]
            return self.up(x) * scale + self.norm(self.up(x))

    for training in (True, False):
        with torch.no_grad():  # with gradients eager mode's backward reads what the norm has made of them
            made = Model().double().train(training)
            optimized, _ = assert_agree(made, lambda: (torch.randn(2, 2, 4, 5, dtype=torch.float64),))
        assert left(optimized.fxfuse_report)[:1] == (["view"] if training else [])


def switched(kind: str) -> fx.Graph:
    """A view of a parameter, where gradients are off or nothing is switched, read behind a convolution."""
    graph = fx.Graph()
    x, w, p = (graph.placeholder(n) for n in "xwp")

    def switch(on: bool) -> None:
        graph.call_function(torch._C._set_grad_enabled, (on,))

    if kind == "off":
        switch(False)
    view = graph.call_method("view", (p, 3, 1, 1))
    if kind == "off":
        switch(True)
    up = graph.call_function(F.conv_transpose2d, (x, w))
    if kind == "off behind":
        late = graph.call_function(torch.mul, (up, view))
        switch(False)
        graph.output((late, graph.call_function(torch.add, (up, view))))
    else:
        graph.output(graph.call_function(torch.mul, (up, view)))
    return graph


@pytest.mark.parametrize(
    ("kind", "stays"),
    [("on", []), ("off", ["view"]), ("off behind", ["view", "add"])],
)  # fmt: skip
def test_views_made_while_gradients_are_off(kind: str, stays: list[str]) -> None:
    graph = switched(kind)
    with FakeTensorMode():
        inputs = [torch.empty(s) for s in ((2, 2, 4, 5), (2, 3, 1, 1), (3,))]
    report = fuse(graph, {}, inputs, Options.make(None, None))
    assert [n for n in left(report) if not n.startswith("_set_grad")] == stays
    assert chains_of(report) == ["conv_transpose > mul" if kind == "off" else MUL]
    x, w, p = torch.randn(2, 2, 4, 5), torch.randn(2, 3, 1, 1, requires_grad=True), torch.randn(3, requires_grad=True)
    try:
        result = fx.GraphModule({}, graph)(x, w, p)
    finally:
        torch.set_grad_enabled(True)
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert w.grad is not None and (p.grad is None) == (kind == "off")


# --- whole models ---------------------------------------------------------------------------------
def scaled() -> nn.Module:
    return Stages(up(3, 4, 3, stride=2), Scale(4), nn.AvgPool3d(2), Scale(4, add=True), Scale(4)).eval()


def test_a_model_of_scales_is_one_region_and_nothing_else() -> None:
    made, x = scaled(), torch.randn(1, 3, 4, 4, 4)
    keys = list(made.state_dict())
    fast = fxfuse.optimize(made, x)
    assert left(fast.fxfuse_report) == []
    special, _ = fast._fxfuse_runtime.serving((x,), {})
    assert special.straight is not None and len(special.straight.takes) == 6
    assert list(fast.state_dict()) == keys
    assert [*map(id, fast.parameters())] == [*map(id, made.parameters())]
    with torch.no_grad():
        for change in range(8):  # the short way is taken from the fourth call on
            scale = made.parts[1]
            if change == 5:
                scale.weight.mul_(2)
            if change == 6:
                scale.weight = nn.Parameter(torch.rand(4))
            if change == 7:  # it lies elsewhere, with other strides
                scale.weight.data = torch.rand(4, 2)[:, 0]
            assert_same(fast(x), copy.deepcopy(made)(x))


def test_only_once() -> None:
    """What is fused already stays as it is."""
    made, x = scaled(), torch.randn(1, 3, 4, 4, 4)
    graph = copy.deepcopy(fxfuse.explain(made, x).graph_after)
    assert graph is not None
    before = str(graph)
    with FakeTensorMode():
        shapes = [(1, 3, 4, 4, 4), *(p.shape for p in made.parameters())]
        report = fuse(graph, {}, [torch.empty(s) for s in shapes], Options.make(None, None))
    assert not report.regions and str(graph) == before


@pytest.mark.parametrize("path", [Path.ORIGINAL, Path.RECOMPUTE])
def test_training(path: Path) -> None:
    made = scaled().double()
    twin, fast = copy.deepcopy(made), fxfuse.optimize(made)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
        for one in (twin, fast):
            with mock.patch("fxfuse.ops.choose", return_value=path):
                one(x).square().mean().backward()
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
                    parameter.grad = None
    assert_same(dict(made.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    dynamo._reports.clear()
    made = scaled()
    compiled = torch.compile(made, backend="fxfuse", options={"remainder": "eager"}, dynamic=dynamic)
    for size in (4, 5):
        x = torch.randn(2, 3, size, 4, 4)
        torch.testing.assert_close(compiled(x), made(x))
    for report in dynamo.reports():
        assert chains_of(report) == ["conv_transpose > reshape > mul > avg_pool > reshape > add > reshape > mul"]
        assert [n.name for n in report.graph_after.nodes if n.op == "call_method"] == []
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["constant", "buffer", "argument"])
def test_other_tensors_than_parameters(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3)
            self.constant = torch.randn(3)
            self.register_buffer("buffer", torch.randn(3))

        def forward(self, x: Tensor, given: Tensor) -> Any:
            held = {"constant": self.constant, "buffer": self.buffer, "argument": given}[kind]
            return self.up(x) + held.view(1, 3, 1, 1)  # type: ignore[operator]

    optimized, _ = assert_agree(Model(), lambda: (torch.randn(2, 2, 4, 5), torch.randn(3)))
    assert left(optimized.fxfuse_report) == []
