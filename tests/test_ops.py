"""The operator ``torch.ops.fxfuse.region``: what torch asks of an operator, its backward, and the ways around it."""

from __future__ import annotations

import pytest
import torch
from harness import conv, fakes, max_pool, program, rewrite
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import ops
from fxfuse.chain import to_graph, to_program
from fxfuse.kernels.cost import estimate
from fxfuse.kernels.plan import RECOMPUTE_BELOW, Path, choose
from fxfuse.patterns import DEFAULT_RULES
from fxfuse.program import Program, ProgramError
from fxfuse.region import Region


def region(original: Program, statistics: int = 0, precision: str | None = None) -> Region:
    """The region that the default rules make of a program whose last outputs are ``statistics``."""
    original = to_program(to_graph(original, fakes(original)).graph)  # values named as in the rewritten one
    result = rewrite(original, DEFAULT_RULES)
    count = len(original.outputs)
    return Region(original, result.rewritten, tuple(result.rules), precision, tuple(range(count - statistics, count)))


def tensors(original: Program, *, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn([s or 3 for s in kind.shape], dtype=kind.dtype) for _, kind in original.inputs]
    return [t.requires_grad_(grad) for t in made]


#: two pools on top of each other, a residual, and the pooled value a second time
POOLS = program(
    "x: f64[2, 2, 5, 5], w: f64[2, 3, 3, 3], b: f64[3]",
    f"""
    y = {conv(stride=2, padding=1, dims=2)}
    p = {max_pool("y", 2, 2, dims=2)}
    q = {max_pool("p", 2, 2, dims=2)}
    s = mul(q, 2.0)
    t = add(s, q)
    t, q
    """,
)
#: a mean over space, which leaves no convolution
MEAN = program(
    "x: f64[2, 2, 5, 5], w: f64[2, 3, 3, 3], b: f64[3]",
    f"y = {conv(stride=2, padding=1, dims=2)}\nm = mean(y, dims=(2, 3), keepdim=True)\nm",
)
#: training-mode BatchNorm: the bias is dropped, the statistics leave the region
TRAIN = program(
    "x: f64[3, 2, 4, 4], w: f64[2, 3, 3, 3], b: f64[3], g: f64[3], h: f64[3]",
    f"y = {conv(dims=2)}\nz, m, v = batch_norm_train(y, g, h, eps=1e-05)\nr = relu(z)\nr, m, v",
)
REGIONS = {"pools": region(POOLS), "mean": region(MEAN), "train": region(TRAIN, statistics=2)}
each = pytest.mark.parametrize("name", REGIONS)


def test_the_regions_are_rewritten() -> None:
    assert "ComposeMaxPools" in REGIONS["pools"].rules
    assert all(r.rewritten != r.original for r in REGIONS.values())
    assert "conv_transpose" not in {i.op for i in REGIONS["mean"].rewritten.body}
    assert REGIONS["train"].rewritten.body[0].operands[2] is None  # the bias


@each
def test_opcheck(name: str) -> None:
    given = REGIONS[name]
    torch.library.opcheck(torch.ops.fxfuse.region.default, (tensors(given.original), given.text))
    torch.library.opcheck(torch.ops.fxfuse.region.default, (tensors(given.original, grad=True), given.text))


@each
def test_gradcheck(name: str) -> None:
    given = REGIONS[name]
    differentiable = len(given.original.outputs) - len(given.statistics)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fxfuse.region(list(inputs), given.text)[:differentiable])

    assert torch.autograd.gradcheck(run, tensors(given.original, grad=True))


@each
def test_gradients_are_those_of_the_original_chain(name: str) -> None:
    given = REGIONS[name]
    results = []
    for way in (given.original.run, lambda t: torch.ops.fxfuse.region(t, given.text)):
        inputs = tensors(given.original, grad=True)
        way(inputs)[0].square().sum().backward()
        results.append([t.grad for t in inputs])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_ties_in_a_pool_route_as_in_eager_mode() -> None:
    given = REGIONS["pools"]
    inputs = tensors(given.original)
    inputs[0] = torch.ones_like(inputs[0])  # whole windows of equal values
    inputs[1] = inputs[1].round()
    found = []
    for way in (given.original.run, lambda t: torch.ops.fxfuse.region(t, given.text)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        way(leaves)[1].sum().backward()
        found.append(leaves[0].grad)
    assert torch.equal(found[0], found[1])


def test_a_dropped_bias_gets_zeros_and_statistics_no_gradient() -> None:
    given = REGIONS["train"]
    inputs = tensors(given.original, grad=True)
    y, mean, var = torch.ops.fxfuse.region(inputs, given.text)
    assert y.requires_grad and not mean.requires_grad and not var.requires_grad
    y.square().sum().backward()
    assert inputs[2].grad is not None
    assert float(inputs[2].grad.abs().max()) < 1e-12


def test_second_derivatives() -> None:
    given = REGIONS["mean"]

    def run(*inputs: Tensor) -> Tensor:
        return torch.ops.fxfuse.region(list(inputs), given.text)[0]

    assert torch.autograd.gradgradcheck(run, tensors(given.original, grad=True))


def test_outputs_have_memory_of_their_own() -> None:
    inputs_text = "x: f64[1, 2, 3], w: f64[2, 1, 1]"
    original = program(inputs_text, f"y = {conv('x, w, None')}\nv = clone(x)\nz = reshape(v, shape=(3, 2))\nv, z, v")
    views = program(inputs_text, "z = reshape(x, shape=(3, 2))\nx, z, x")
    given = Region(original, views)
    inputs = tensors(given.original)
    kept = [t.clone() for t in inputs]
    outputs = torch.ops.fxfuse.region(inputs, given.text)
    places = {t.untyped_storage().data_ptr() for t in (*outputs, *inputs)}
    assert len(places) == 5
    for out in outputs:
        out.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@each
def test_traced_as_one_operator(name: str) -> None:
    given = REGIONS[name]

    def run(*inputs: Tensor) -> list[Tensor]:
        return list(ops.run_region(inputs, given.text))

    inputs = tensors(given.original)
    traced = make_fx(run, tracing_mode="fake")(*inputs)
    assert [n.target for n in traced.graph.nodes].count(torch.ops.fxfuse.region.default) == 1
    for a, b in zip(traced(*inputs), given.reference(*inputs), strict=True):
        assert torch.equal(a, b)


@each
def test_compiled_without_a_break(name: str) -> None:
    given = REGIONS[name]
    text = given.text  # made here: Dynamo need not trace how
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: torch.ops.fxfuse.region(list(t), text)[0].sin(), backend="aot_eager", fullgraph=True
    )
    inputs = tensors(given.original, grad=True)
    loss = compiled(*inputs).sum()
    loss.backward()
    leaves = tensors(given.original, grad=True)
    given.original.run(leaves)[0].sin().sum().backward()
    for a, b in zip(inputs, leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_ambient_autocast_changes_nothing_inside() -> None:
    given = REGIONS["mean"]
    inputs = [t.float() for t in tensors(given.original)]
    narrow = Region.parse(given.text.replace("f64", "f32"))
    expected = narrow.reference(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for way in (lambda: ops.run_region(inputs, narrow.text), lambda: torch.ops.fxfuse.region(inputs, narrow.text)):
            (got,) = way()
            assert got.dtype is torch.float32
            assert torch.equal(got, expected[0])


def test_wrong_tensors_are_refused() -> None:
    given = REGIONS["mean"]
    inputs = tensors(given.original)
    with pytest.raises(ProgramError, match=r"input x0: shape \(1, 2, 5, 5\) where f64\[2, 2, 5, 5\] is expected"):
        ops.run_region([inputs[0][:1], *inputs[1:]], given.text)
    with pytest.raises(ProgramError, match=r"dtype torch\.float32 where torch\.float64 is expected"):
        ops.run_region([inputs[0].float(), *inputs[1:]], given.text)
    with pytest.raises(ProgramError, match="2 tensors given; the program takes 3"):
        torch.ops.fxfuse.region(inputs[:2], given.text)


# --- the plan -------------------------------------------------------------------------------------
def test_without_gradients_the_rewritten_chain_runs() -> None:
    given = REGIONS["pools"]
    inputs = tensors(given.original, grad=True)
    with ops.watch() as runs, torch.no_grad():
        ops.run_region(inputs, given.text)
    assert [r.path for r in runs] == [Path.REWRITTEN]
    with ops.watch() as runs:
        ops.run_region([t.detach() for t in inputs], given.text)
    assert [r.path for r in runs] == [Path.REWRITTEN]


def test_with_gradients_the_original_chain_runs_where_a_recomputation_would_not_pay() -> None:
    given = REGIONS["pools"]
    with ops.watch() as runs:
        outputs = ops.run_region(tensors(given.original, grad=True), given.text)
    assert [r.path for r in runs] == [Path.ORIGINAL]
    assert outputs[0].requires_grad


def test_a_collapse_runs_rewritten_also_with_gradients() -> None:
    """Nothing of the convolution is left in the forward: recomputing it in a backward is worth the risk."""
    original = program(
        "x: f32[2, 32, 8, 8, 8], w: f32[32, 32, 3, 3, 3], b: f32[32]",
        f"y = {conv(dims=3)}\nm = mean(y, dims=(2, 3, 4), keepdim=True)\nm",
    )
    given = region(original)
    before, after = estimate(given.original), estimate(given.rewritten)
    assert before is not None and after is not None
    assert after.macs < RECOMPUTE_BELOW * before.macs
    assert choose(given, "cpu", gradients=True) is Path.RECOMPUTE
    inputs = tensors(original, grad=True)
    with ops.watch() as runs:
        (out,) = ops.run_region(inputs, given.text)
    assert [r.path for r in runs] == [Path.REWRITTEN]
    out.square().sum().backward()
    leaves = tensors(original, grad=True)
    given.original.run(leaves)[0].square().sum().backward()
    for a, b in zip(inputs, leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_cost_counts_what_a_convolution_multiplies() -> None:
    plain = program("x: f32[2, 4, 5, 5], w: f32[4, 6, 3, 3]", f"y = {conv('x, w, None', dims=2)}\ny")
    cost = estimate(plain)
    assert cost is not None
    assert cost.macs == 2 * 7 * 7 * 4 * 6 * 9
    assert cost.bytes == 4 * (2 * 4 * 25 + 4 * 6 * 9 + 2 * 6 * 49)
    assert estimate(program("x: f32[_, 4, 5, 5], w: f32[4, 6, 3, 3]", f"y = {conv('x, w, None', dims=2)}\ny")) is None


# --- running statistics ---------------------------------------------------------------------------
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_as_torch_updates_them(momentum: float | None) -> None:
    torch.manual_seed(0)
    eager = torch.nn.BatchNorm2d(3, momentum=momentum).double()
    ours = torch.nn.BatchNorm2d(3, momentum=momentum).double()
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        eager(x)
        assert ours.running_mean is not None and ours.running_var is not None
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        ops.update_running_statistics(
            ours.running_mean, ours.running_var, ours.num_batches_tracked, mean, var, momentum
        )
    for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- other shapes of regions ------------------------------------------------------------------------
#: no bias, sizes that were not known, half precision, and outputs of several kinds: a mask, a view, a value twice
MIXED = program(
    "x: bf16[_, 2, _, _], w: bf16[2, 3, 3, 3], s: bf16[3, 1, 1]",
    f"""
    y = {conv("x, w, None", stride=2, padding=1, dims=2)}
    c = clone(y)
    r = mul(c, s)
    m = gt(r, 0.0)
    d = detach(r)
    f = permute(r, dims=(0, 2, 3, 1))
    r, m, f, d, r
    """,
)


def _mixed() -> tuple[Region, list[Tensor]]:
    torch.manual_seed(0)
    rewritten = Program.parse(str(MIXED).replace("c = clone(y)\n    r = mul(c, s)", "r = mul(y, s)"))[1]
    made = Region(MIXED, rewritten, ("DropCopies",), None, (1, 3))
    return made, [torch.randn(2, 2, 5, 4), torch.randn(2, 3, 3, 3), torch.randn(3, 1, 1)]


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_of_outputs_of_several_kinds(grad: bool) -> None:
    given, inputs = _mixed()
    narrow = [t.bfloat16().requires_grad_(grad) for t in inputs]
    # bfloat16 gradients of two compilers differ by rounding: that they agree is tested in float64
    torch.library.opcheck(torch.ops.fxfuse.region.default, (narrow, given.text), rtol=3e-2, atol=3e-2)
    wide = Region.parse(given.text.replace("bf16", "f64"))
    torch.library.opcheck(
        torch.ops.fxfuse.region.default, ([t.double().requires_grad_(grad) for t in inputs], wide.text)
    )


def test_outputs_of_several_kinds() -> None:
    given, inputs = _mixed()
    wide = Region.parse(given.text.replace("bf16", "f64"))
    results = []
    for way in (wide.original.run, lambda t: torch.ops.fxfuse.region(t, wide.text)):
        leaves = [t.double().requires_grad_() for t in inputs]
        r, m, f, d, again = way(leaves)
        assert [t.requires_grad for t in (r, m, f, d, again)] == [True, False, True, False, True]
        (f.square().sum() + again.sum()).backward()
        results.append([r, m, f, d, *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_an_output_that_is_a_view_inside_may_be_written_to() -> None:
    given, inputs = _mixed()
    wide = Region.parse(given.text.replace("bf16", "f64"))
    results = []
    for way in (wide.original.run, lambda t: torch.ops.fxfuse.region(t, wide.text)):
        leaves = [t.double().requires_grad_() for t in inputs]
        f = way(leaves)[2]
        f[..., 0] = 0
        f.mul_(2)
        f.sum().backward()
        results.append([f, *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_exported_as_one_operator() -> None:
    given, inputs = _mixed()

    class Caller(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, s: Tensor) -> list[Tensor]:
            return list(torch.ops.fxfuse.region([x, w, s], given.text))

    narrow = tuple(t.bfloat16() for t in inputs)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Caller(), narrow, dynamic_shapes=({0: batch}, None, None))
    assert [n.target for n in exported.graph.nodes].count(torch.ops.fxfuse.region.default) == 1
    larger = (torch.cat([narrow[0]] * 3), *narrow[1:])
    for a, b in zip(exported.module()(*larger), given.original.run(larger), strict=True):
        assert torch.equal(a, b)


def test_schema_of_another_version() -> None:
    given, inputs = _mixed()
    with pytest.raises(ProgramError, match="not of schema 1: made by another version of fxfuse"):
        torch.ops.fxfuse.region([t.bfloat16() for t in inputs], given.text.replace("schema = 1", "schema = 2"))
