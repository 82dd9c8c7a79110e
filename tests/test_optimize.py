"""fxfuse.optimize: the same results and gradients, nothing changed, everything followed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import F64, Block, assert_agree, assert_follows, assert_same, data, optimized_block
from torch import Tensor, nn

import fxfuse
from fxfuse.models import CASES, Case, ClampDivide, MaxMaxSum, ReluGroupNorm, ScaleNormPool
from fxfuse.ops import watch

# --- the five models ------------------------------------------------------------------------------
#: the operators of each model's region, before and after: in training mode, and in eval mode where it differs
CHAINS = {
    "max_max_sum": [("conv_transpose > max_pool > max_pool > sum", "conv_transpose > max_pool > sum")],
    "alone": [("conv_transpose", "conv_transpose")],
    "relu_group_norm": [("conv_transpose > relu > group_norm",) * 2],
    "scale_norm_pool": [
        ("conv_transpose > mul > batch_norm_train > mean", None),
        ("conv_transpose > mul > batch_norm > mean", "tap_sums > contract_taps > mul > add"),  # and the affine map
    ],
    "clamp_divide": [("conv_transpose > clamp > div", "conv_transpose > clamp")],
}


def chain(program: Any) -> str:
    return " > ".join(i.op for i in program.body)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_five_models(case: Case, training: bool) -> None:
    """Results, gradients of the input and of every parameter, and running statistics, as eager gives them."""
    model = case.make().to(F64).train(training)
    shape = (2, case.shape[1], 4, 4, 4)
    optimized, runs = assert_agree(model, lambda: (torch.randn(shape, dtype=F64, requires_grad=True),))
    with torch.no_grad():
        _, without = assert_agree(model, lambda: (torch.randn(shape, dtype=F64),))
    assert {r.path.value for r in without} == {"rewritten"}
    report = optimized.fxfuse_report
    assert len(report.regions) == 1 and runs[0].region == report.regions[0].region
    before, after = CHAINS[case.name][0 if training else -1]
    region = report.regions[0].region
    assert chain(region.original) == before
    if after is not None:
        assert " > ".join(report.regions[0].visible_stages).startswith(after)
    targets = [str(n.target) for n in report.graph_after.nodes if n.op.startswith("call")]
    assert sum("run_region" in t for t in targets) == 1
    assert not any("conv" in t or "pool" in t for t in targets)


def test_composed_pool_and_dead_outputs() -> None:
    """Two pools become one of window 6, and only the positions that it reads are computed."""
    model = MaxMaxSum().eval()
    report = fxfuse.explain(model, data(1, 32, 8, 8, 8))
    (region,) = report.regions
    pool = next(i for i in region.region.rewritten.body if i.op == "max_pool")
    conv = next(i for i in region.region.rewritten.body if i.op == "conv_transpose")
    assert dict(pool.attributes)["kernel"] == (6, 6, 6)
    assert dict(conv.attributes)["extent"] == (12, 12, 12)
    assert {r.rule for r in report.rules} == {"ComposeMaxPools", "DropDeadOutputs"}


def test_eval_mean_needs_no_convolution() -> None:
    report = fxfuse.explain(ScaleNormPool().eval(), data(1, 64, 3, 3, 3))
    (region,) = report.regions
    assert "conv_transpose" not in region.stages
    assert "conv_transpose" in [i.op for i in region.region.original.body]


def test_dropped_bias_gets_zeros() -> None:
    """A bias before a training-mode BatchNorm cancels; its gradient is zero, not None."""
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 3), nn.BatchNorm3d(3), nn.AdaptiveAvgPool3d(1)).double()
    x = data(2, 2, 3, 3, 3, dtype=F64)
    optimized = fxfuse.optimize(model, x)
    assert "CancelBiasBeforeStatistics" in {r.rule for r in optimized.fxfuse_report.rules}
    optimized(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model[0].bias.grad.abs().max() < 1e-12


# --- nothing is changed ---------------------------------------------------------------------------
class Scribbler(Block):
    """Changes its input, its buffers and itself."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        self.last = x.sum()
        self.seen = [*getattr(self, "seen", []), 1]
        self.offset.add_(1)
        self.up.weight.data.mul_(1.5)
        return super().forward(F.dropout(x))


@pytest.mark.parametrize("kind", [Block, Scribbler])
@pytest.mark.parametrize("training", [True, False])
def test_optimize_changes_nothing(kind: type[Block], training: bool) -> None:
    model = kind().train(training)
    seen: list[Any] = []
    model.head.register_forward_hook(lambda m, i, o: seen.append(1) and None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    contents = {
        (name, key): list(value.items())
        for name, m in model.named_modules()
        for key, value in m.__dict__.items()
        if isinstance(value, dict)
    }
    versions = [p._version for p in (*model.parameters(), *model.buffers())]
    x = data()
    kept, generator = x.clone(), torch.get_rng_state()
    optimized = fxfuse.optimize(model, x)
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), generator)
    assert list(model.state_dict()) == list(optimized.state_dict()) == list(before)
    assert_same({k: v.clone() for k, v in model.state_dict().items()}, before)
    for name, m in model.named_modules():
        assert m.__dict__.keys() == attributes[name].keys()
        assert all(m.__dict__[k] is v for k, v in attributes[name].items())
        for key, value in m.__dict__.items():
            if isinstance(value, dict):
                assert all(a is b and k == j for (k, a), (j, b) in zip(value.items(), contents[name, key], strict=True))
    assert [p._version for p in (*model.parameters(), *model.buffers())] == versions
    assert all(m.training is training for m in optimized.modules())
    assert type(nn.Module.__call__) is type(Block.describe)  # tracing has taken its patches off


def test_provisional_call_updates_once() -> None:
    """Without example inputs the first call is the model's own: buffers, generator and autograd see it once."""
    model, twin = Block(), Block()
    optimized = fxfuse.optimize(model)
    assert optimized.fxfuse_report.notes == ["nothing is captured yet: the first call decides"]
    x = data()
    torch.manual_seed(1)
    with watch() as runs:
        got = optimized(x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    expected = twin(x)
    assert not runs and torch.equal(got, expected)
    assert torch.equal(after, torch.get_rng_state())
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    got.sum().backward()  # the statistics that autograd saved were put back unnoticed
    expected.sum().backward()
    assert torch.equal(model.up.weight.grad, twin.up.weight.grad)
    assert optimized.fxfuse_report.regions


def test_failing_first_call_leaves_no_trace() -> None:
    model = Block()
    before = copy.deepcopy(model.state_dict())
    optimized = fxfuse.optimize(model)
    with pytest.raises(RuntimeError, match="channels"):
        optimized(data(1, 5, 3, 3, 3))
    assert_same(dict(model.state_dict()), dict(before))
    assert_follows(optimized.eval(), model, calls=3)


# --- shapes, layouts, dtypes ----------------------------------------------------------------------
class PadToEven(nn.Module):
    """Shape-dependent rules: the pools leave more or less of the convolution dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.ConvTranspose3d(2, 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(self.up(x), 3)


def test_new_shapes_are_specialised() -> None:
    optimized = fxfuse.optimize(PadToEven().eval(), data(1, 2, 4, 4, 4))
    extents = set()
    for size in (1, 2, 3, 4, 5, 4):
        x = data(2, 2, size, size, size)
        with watch() as runs:
            assert_same(optimized(x).detach(), PadToEven()(x).detach())
        assert len(runs) == 1
        conv = next(i for i in runs[0].region.rewritten.body if i.op == "conv_transpose")
        extents.add(dict(conv.attributes)["extent"])
    assert len(extents) > 2 and None in extents


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 3), (1, 2, 1, 1, 1), (1, 2, 3, 2, 4), (2, 3, 3, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], training: bool) -> None:
    """Empty batches, which are left to torch, single elements, inputs without a batch dim."""
    fused = shape[0] > 0

    def make() -> tuple[Tensor]:
        return (torch.randn(shape, dtype=F64, requires_grad=True),)

    assert_agree(PadToEven().double().train(training), make, fused=fused)
    if len(shape) == 5:
        block = nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.ReLU(), nn.GroupNorm(2, 4))
        assert_agree(block.double(), make, fused=fused)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last_3d": lambda x: x.to(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x.transpose(2, 4),
    "sliced": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1, -1),
    "offset": lambda x: x[:, :, 1:],
}


@pytest.mark.parametrize("last", [False, True], ids=["weights", "weights_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES[:1], *CASES[2:]], ids=lambda c: c.name)
def test_layouts(case: Case, layout: str, last: bool) -> None:
    """Results have eager's strides, for inputs and weights of any layout."""
    model = case.make().eval()
    if last:
        model = model.to(memory_format=torch.channels_last_3d)
    x = LAYOUTS[layout](data(2, case.shape[1], 5, 5, 8))
    optimized = fxfuse.optimize(model, x)
    with torch.no_grad(), watch() as runs:
        got, expected = optimized(x), model(x)
    assert runs and runs[0].path.value == "rewritten"
    assert_same(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last_3d) == expected.is_contiguous(
        memory_format=torch.channels_last_3d
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_that_a_rewrite_would_change(layout: str) -> None:
    """A mean over one dim loses its convolution, whose layout the channels-last weights decide."""

    class PartialMean(PadToEven):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).mean(2)

    model = PartialMean().eval().to(memory_format=torch.channels_last_3d)
    x = LAYOUTS[layout](data(2, 2, 5, 5, 8))
    with torch.no_grad():
        optimized, expected = fxfuse.optimize(model, x), model(x)
        assert optimized.fxfuse_report.rules
        assert_same(optimized(x), expected)


def test_layout_behind_what_a_rewrite_has_made() -> None:
    """Products group by group have samples as neighbours; what was there before the rewrite comes behind them."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(3, 3, 3, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.up(x).mean((2, 3, 4)))

    model, x = Mean().eval(), data(5, 3, 2, 3, 4)
    with torch.no_grad():
        optimized, expected = fxfuse.optimize(model, x), model(x)
        assert optimized.fxfuse_report.rules
        assert_same(optimized(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_models_in_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    model = case.make().to(dtype).eval()
    x = data(1, case.shape[1], 4, 4, 4, dtype=dtype)
    optimized = fxfuse.optimize(model, x)
    with torch.no_grad(), watch() as runs:
        got = optimized(x)
        assert_same(got, model(x))
    assert runs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_autocast(case: Case, training: bool) -> None:
    """Every operator runs in the dtype that autocast gives it in eager mode."""
    model = case.make().train(training)
    twin = copy.deepcopy(model)
    optimized = fxfuse.optimize(model)
    for _ in range(3):
        x = data(2, case.shape[1], 4, 4, 4)
        with torch.autocast("cpu", torch.bfloat16), watch() as runs:
            got, expected = optimized(x), twin(x)
        assert_same(got, expected)
    assert runs
    for _ in range(2):  # and without autocast again
        with watch() as runs:
            assert_same(optimized(x), twin(x))
    assert runs


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_autograd(mode: Callable[[], Any]) -> None:
    model = Block().eval()
    x = data()
    for given in (None, x):
        with mode():
            optimized = fxfuse.optimize(model, given)
            for _ in range(2):
                with watch() as runs:
                    got = optimized(x)
                expected = model(x)
            assert_same(got, expected)
            assert got.is_inference() == expected.is_inference() and runs
        for _ in range(2):
            assert_same(optimized(x), model(x))


# --- differentiation ------------------------------------------------------------------------------
def test_double_backward() -> None:
    """A gradient penalty, through every path: recomputed, and recorded by autograd."""
    for make in (ScaleNormPool, ClampDivide, ReluGroupNorm):
        model = make().double().eval()
        twin = copy.deepcopy(model)
        shape = (1, next(model.parameters()).shape[0], 2, 2, 2)
        optimized = fxfuse.optimize(model, torch.randn(shape, dtype=F64))
        found = []
        for module, owner in ((optimized, model), (twin, twin)):
            torch.manual_seed(0)
            x = torch.randn(shape, dtype=F64, requires_grad=True)
            y = module(x).square().sum()
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            (y + grad.square().sum()).backward()
            found.append([x.grad, *(p.grad for p in owner.parameters())])
        assert_same(found[0], found[1])


def test_function_transforms() -> None:
    model = Block().double().eval()
    x = data(1, 2, 3, 3, 3, dtype=F64)
    optimized = fxfuse.optimize(model, x)
    params = dict(model.named_parameters())

    def loss(module: nn.Module) -> Callable[..., Tensor]:
        return lambda p, v: torch.func.functional_call(module, p, (v,)).square().sum()

    for transform in (lambda f: torch.func.grad(f)(params, x), lambda f: torch.func.vjp(f, params, x)[0]):
        assert_same(transform(loss(optimized)), transform(loss(model)))
    batch = torch.stack([x, x * 2])
    assert_same(torch.func.vmap(optimized)(batch).detach(), torch.func.vmap(model)(batch).detach())
    got, expected = (torch.func.jvp(m, (x,), (x * 0.5,)) for m in (optimized, model))
    assert_same([t.detach() for t in got], [t.detach() for t in expected])


def test_forward_mode() -> None:
    model = ScaleNormPool().double().eval()
    x = data(1, 64, 2, 2, 2, dtype=F64)
    optimized = fxfuse.optimize(model, x)
    for module in (optimized, optimized):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            got = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
            expected = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
            assert got is not None
            assert_same(got.detach(), expected.detach())


# --- memory ---------------------------------------------------------------------------------------
def test_inputs_that_share_memory() -> None:
    """A graph that writes to an input is right for inputs of their own, and not used for views of one tensor."""

    class Writes(PadToEven):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x.mul_(2)
            return self.up(y) + self.up(x)

    model = Writes().eval()
    with torch.no_grad():
        optimized = fxfuse.optimize(model, (data(1, 2, 3, 3, 3), data(1, 2, 3, 3, 3)))
        a, b = data(1, 2, 3, 3, 3), data(1, 2, 3, 3, 3)
        with watch() as runs:
            got = optimized(a.clone(), b)
        assert_same(got, model(a.clone(), b))
        assert runs
        one, two = data(2, 2, 3, 3, 3), None
        two = one.clone()
        assert_same(optimized(one[:1], one[:1]), model(two[:1], two[:1]))
        assert_same(optimized(one[:1], one.view(2, 2, 3, 3, 3)[:1]), model(two[:1], two.view(2, 2, 3, 3, 3)[:1]))
        assert torch.equal(one, two)


def test_identity_of_arguments() -> None:
    class Same(PadToEven):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.up(x) * 3 if x is y else self.up(y)

    model = Same().eval()
    x, y = data(1, 2, 2, 2, 2), data(1, 2, 2, 2, 2)
    with torch.no_grad():
        optimized = fxfuse.optimize(model, (x, y))
        for _ in range(2):
            assert_same(optimized(x, y), model(x, y))
            assert_same(optimized(x, x), model(x, x))


def test_capture_for_larger_batches() -> None:
    """What is captured for one shape by torch.export is not used for another."""

    class Grows(PadToEven):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * (3 if isinstance(x, Tensor) and x.shape[0] > 2 else 1)

    model = Grows().eval()
    optimized = fxfuse.optimize(model, data(1, 2, 2, 2, 2))
    for batch in (1, 3, 2, 4, 3):
        x = data(batch, 2, 2, 2, 2)
        assert_same(optimized(x).detach(), model(x).detach())


# --- threads --------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["traced", "exported"])
def test_threads(how: str) -> None:
    """Several threads call at once, the first time too, while others run the model itself."""

    class Exported(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] else x

    model = (Block if how == "traced" else Exported)().eval()
    inputs = [data(1, 2, 2 + i % 3, 3, 3) for i in range(6)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    optimized = fxfuse.optimize(model)
    failures: list[str] = []
    start = threading.Barrier(len(inputs))

    def work(number: int) -> None:
        module = model if number == 0 else optimized
        start.wait()
        try:
            with torch.no_grad():
                for _ in range(8):
                    torch.testing.assert_close(module(inputs[number]), expected[number], rtol=1e-4, atol=1e-5)
        except Exception as error:  # noqa: BLE001 - told by the main thread
            failures.append(f"{number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with watch() as runs, torch.no_grad():
        optimized(inputs[1])
    assert runs


# --- wrong arguments ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((F.relu,), {}, TypeError, r"takes an nn.Module, not function; wrap"),
        ((nn.Identity,), {}, TypeError, r"takes an nn.Module, not type"),
        ((Block(), 3), {}, TypeError, r"example_inputs must be a tensor, a tuple or a dict, not int"),
        ((Block(),), {"precision": "fp8"}, ValueError, r"precision='fp8' is not one of 'tf32', 'ieee' or None"),
        ((Block(),), {"allow": "bitwise"}, ValueError, r"not the string 'bitwise'"),
        ((Block(),), {"kernels": None}, ValueError, r"kernels=None is not True or False"),
        ((Block(),), {"allow": {"fast"}}, ValueError, r"allow='fast' is not a legality class; known: bitwise"),
        ((Block(),), {"submodules": "up"}, ValueError, r"such as \['up'\]"),
        ((Block(),), {"submodules": []}, ValueError, r"names no part"),
        ((Block(),), {"submodules": [3]}, TypeError, r"names or patterns, not int"),
        (
            (Block(),),
            {"submodules": ["down.*"]},
            ValueError,
            r"'down\.\*' matches no submodule of Block; it has up, norm",
        ),
        ((Block(), {"x": data(), "y": 1}), {}, TypeError, r"unexpected keyword argument 'y'"),
    ],
)
def test_wrong_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fxfuse.optimize(*arguments, **options)


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyConvTranspose3d(3, 2), nn.ReLU())
    optimized = fxfuse.optimize(model)
    x = data()
    for _ in range(3):
        with watch() as runs:
            got = optimized(x)
        assert_same(got, model(x))
    assert runs


def test_tensor_subclass_runs_as_it_is() -> None:
    class Marked(Tensor):
        pass

    model, optimized = optimized_block()
    x = data().as_subclass(Marked)
    with torch.no_grad(), watch() as runs:
        got = optimized(x)
    assert type(got) is Marked and not runs
    assert "a subclass of Tensor" in str(optimized.fxfuse_report)
    model.up.weight = nn.Parameter(model.up.weight.detach().as_subclass(Marked))
    x = data()
    with torch.no_grad():
        for _ in range(2):
            assert_same(optimized(x).as_subclass(Tensor), model(x).as_subclass(Tensor))


def test_default_dtype() -> None:
    class Makes(PadToEven):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * torch.full((), 0.1)

    model = Makes().eval()
    x = data(1, 2, 2, 2, 2)
    optimized = fxfuse.optimize(model, x)
    try:
        torch.set_default_dtype(F64)
        for _ in range(2):
            assert_same(optimized(x).detach(), model(x).detach())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(optimized(x).detach(), model(x).detach())
