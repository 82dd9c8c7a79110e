"""fxfuse.optimize: the same results and gradients, nothing changed, everything followed."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agree, assert_same
from torch import Tensor, nn

import fxfuse
from fxfuse.models import CASES, Case, ClampDivide, MaxMaxSum, ReluGroupNorm, ScaleNormPool
from fxfuse.ops import watch

F64 = torch.float64


class Block(nn.Module):
    """A small decoder block with state of all kinds: weights, buffers, flags, dropout, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.unused = nn.Parameter(torch.ones(2))
        self.up = nn.ConvTranspose3d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.head = nn.Conv3d(4, 2, 1)
        self.double_it = False
        self.act = F.relu
        self.register_buffer("offset", torch.zeros(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.up(x)) + self.offset)
        return self.head(y * 2 if self.double_it else y)

    def describe(self) -> str:
        return f"{self.double_it}"


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 2, 4, 4, 4), dtype=dtype)


def optimized_block(x: Tensor | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    model = Block().eval()
    return model, fxfuse.optimize(model, data() if x is None else x, **options)


def assert_follows(optimized: nn.Module, model: nn.Module, x: Tensor | None = None, *, calls: int = 2) -> None:
    """The optimised module does what the model does now, and by a region in the end."""
    x = data() if x is None else x
    with torch.no_grad():
        for _ in range(calls):
            with watch() as runs:
                got = optimized(x.clone())
            assert_same(got, copy.deepcopy(model)(x.clone()))
    assert runs


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
    "clamp_divide": [("conv_transpose > clamp > div",) * 2],
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


# --- state is shared ------------------------------------------------------------------------------
def test_state_dict_and_loading() -> None:
    model, optimized = optimized_block()
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert "unused" in optimized.state_dict()
    other = Block().state_dict()
    optimized.load_state_dict({k: v + 0.25 for k, v in other.items()})
    assert torch.equal(model.up.weight, other["up.weight"] + 0.25)
    assert_follows(optimized, model)
    assert str(optimized.load_state_dict({}, strict=False)) != "<All keys matched successfully>"


def test_the_original_stays_reachable() -> None:
    model, optimized = optimized_block()
    assert [n for n, _ in optimized.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(optimized.parameters(), model.parameters(), strict=True))
    assert [n for n, _ in optimized.named_modules()] == [n for n, _ in model.named_modules()]
    assert optimized.up is model.up and optimized.describe() == "False" and optimized.offset is model.offset
    optimized.double_it = True
    assert model.double_it and "double_it" in dir(optimized)
    assert_follows(optimized, model)
    optimized.register_buffer("more", torch.ones(1))
    assert "more" in model.state_dict()
    del optimized.more
    assert "more" not in model.state_dict()
    with pytest.raises(AttributeError, match="absent"):
        _ = optimized.absent
    assert "up" in repr(optimized) and "region" in repr(optimized)


def test_methods_that_the_class_overrides() -> None:
    class Frozen(Block):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return iter([self.head.weight])

        def eval(self) -> Frozen:
            self.evals = getattr(self, "evals", 0) + 1
            return super().eval()

    model = Frozen()
    optimized = fxfuse.optimize(model)
    assert optimized.train() is optimized and model.training and not model.norm.training
    assert optimized.eval() is optimized and model.evals == 1
    assert list(optimized.parameters()) == [model.head.weight]


def test_containers_keep_their_protocol() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 3, 2), nn.ReLU()).eval()
    optimized = fxfuse.optimize(model, data())
    assert len(optimized) == 2 and optimized[1] is model[1] and list(optimized) == list(model)
    assert bool(fxfuse.optimize(Block()))
    optimized[1] = nn.Sigmoid()
    assert isinstance(model[1], nn.Sigmoid)
    assert_follows(optimized, model)


def test_apply_meets_the_original() -> None:
    model = nn.ConvTranspose3d(2, 3, 2)
    optimized = fxfuse.optimize(model, data())

    def fill(module: nn.Module) -> None:
        if isinstance(module, nn.ConvTranspose3d):
            nn.init.ones_(module.weight)

    assert optimized.apply(fill) is optimized
    assert torch.equal(model.weight, torch.ones_like(model.weight))


def test_optimize_twice_is_once() -> None:
    model, optimized = optimized_block()
    again = fxfuse.optimize(fxfuse.optimize(optimized))
    assert again._fxfuse_original is model
    assert_follows(again, model, calls=3)


def test_inside_another_model() -> None:
    """A model that holds an optimised one can be optimised as a whole."""
    inner, optimized = optimized_block()
    outer = nn.Sequential(optimized, nn.Tanh()).eval()
    assert_follows(outer, outer)
    whole = fxfuse.optimize(outer, data())
    assert whole.fxfuse_report.regions
    assert_follows(whole, nn.Sequential(inner, nn.Tanh()).eval())
    assert list(outer.state_dict()) == [f"0.{k}" for k in inner.state_dict()]


# --- changes are followed -------------------------------------------------------------------------
def test_modes_are_followed_both_ways() -> None:
    model, optimized = optimized_block()
    for training in (True, False, True, False):
        optimized.train(training)
        twin = copy.deepcopy(model)
        assert model.training is model.norm.training is training
        for _ in range(2):
            x = data()
            assert_same(optimized(x), twin(x))
        assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    with watch() as runs:
        optimized(data())
    assert len(runs) == 1  # the capture for eval mode is still there
    model.norm.train()  # one module alone
    twin = copy.deepcopy(model)
    x = data()
    for _ in range(2):
        assert_same(optimized(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_are_followed(dtype: torch.dtype) -> None:
    model, optimized = optimized_block()
    assert optimized.to(dtype) is optimized
    assert model.up.weight.dtype is dtype
    assert_follows(optimized, model, data(dtype=dtype))
    optimized.float()
    assert_follows(optimized, model)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"fused": True}),
    ("Adam", {}),
    ("Adam", {"fused": True}),
    ("Adam", {"foreach": True}),
    ("AdamW", {"fused": True}),
    ("Adagrad", {"fused": True}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("ASGD", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("RMSprop", {}),
    ("Rprop", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[f"{n}{o or ''}" for n, o in OPTIMIZERS])
def test_training(name: str, options: dict[str, Any]) -> None:
    """A few steps of every optimiser leave the same weights as in eager mode."""
    kind = getattr(torch.optim, name)
    model, twin = Block().double(), Block().double()
    optimized = fxfuse.optimize(model, data(dtype=F64))
    steps = [kind(m.parameters(), lr=0.05, **options) for m in (optimized, twin)]
    for _ in range(3):
        x = data(dtype=F64)
        for module, step in zip((optimized, twin), steps, strict=True):
            step.zero_grad()
            with watch() as runs:
                module(x).square().mean().backward()
            step.step()
            assert bool(runs) == (module is optimized)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


def _functional(model: Block, optimized: nn.Module) -> None:
    weights = {k: v.detach() * 1.5 for k, v in model.named_parameters()}
    x = data()
    expected = torch.func.functional_call(model, weights, (x,))
    for _ in range(2):
        assert_same(torch.func.functional_call(optimized, weights, (x,)).detach(), expected.detach())


CHANGES: dict[str, Callable[[Block, nn.Module], Any]] = {
    "in place": lambda m, o: m.up.weight.detach().mul_(2),
    "data": lambda m, o: m.up.weight.data.mul_(-1),
    "set data": lambda m, o: setattr(m.up.weight, "data", torch.randn_like(m.up.weight)),
    "another parameter": lambda m, o: setattr(m.up, "weight", nn.Parameter(m.up.weight.detach() * 3)),
    "through the view": lambda m, o: setattr(o.up, "bias", nn.Parameter(torch.ones(4))),
    "no bias": lambda m, o: setattr(m.up, "bias", None),
    "no affine": lambda m, o: (setattr(m.norm, "weight", None), setattr(m.norm, "bias", None)),
    "swapped": lambda m, o: torch.utils.swap_tensors(m.up.weight, nn.Parameter(m.up.weight.detach() + 1)),
    "functional_call": _functional,
    "buffer in place": lambda m, o: m.norm.running_mean.add_(1),
    "another buffer": lambda m, o: setattr(m, "offset", torch.ones(4, 1, 1, 1)),
    "momentum": lambda m, o: setattr(m.norm, "momentum", 0.5),
    "eps": lambda m, o: setattr(m.norm, "eps", 0.5),
    "stride": lambda m, o: setattr(m.up, "stride", (1, 1, 1)),
    "flag": lambda m, o: setattr(m, "double_it", True),
    "activation": lambda m, o: setattr(m, "act", torch.tanh),
    "submodule": lambda m, o: setattr(m, "up", nn.ConvTranspose3d(2, 4, 2)),
    "submodule by the view": lambda m, o: setattr(o, "norm", nn.InstanceNorm3d(4)),
    "identity": lambda m, o: setattr(m, "norm", nn.Identity()),
    "method": lambda m, o: setattr(m, "forward", lambda x: F.relu(m.up(x))),
    "frozen": lambda m, o: o.requires_grad_(False),
    "channels last": lambda m, o: (
        o.up.to(memory_format=torch.channels_last_3d),
        m.head.to(memory_format=torch.channels_last_3d),
    ),
    "weight norm": lambda m, o: nn.utils.parametrizations.weight_norm(m.up),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_followed(name: str, training: bool) -> None:
    model = Block().train(training)
    with torch.no_grad():
        optimized = fxfuse.optimize(model, data())
        before = optimized(data())
        CHANGES[name](model, optimized)
        for _ in range(2):
            x, twin = data(), copy.deepcopy(model)
            with watch() as runs:
                got = optimized(x)
            assert_same(got, twin(x))
            assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    assert bool(runs) == (name != "weight norm"), before.shape


def test_hooks_are_honoured() -> None:
    model, optimized = optimized_block()
    seen: list[str] = []

    def double(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        seen.append(type(module).__name__)
        return result * 2

    handles = [model.register_forward_hook(double), optimized.up.register_forward_hook(double)]
    x = data()
    for _ in range(3):
        expected = copy.deepcopy(model)(x)
        seen.clear()
        assert_same(optimized(x), expected)
        assert {"Block", "ConvTranspose3d"} <= {*seen} | {"Block"}
    assert seen == ["ConvTranspose3d", "OptimizedModule"]
    for handle in handles:
        handle.remove()
    assert_follows(optimized, model)
    optimized.norm.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    for _ in range(2):
        assert_same(optimized(x), copy.deepcopy(model)(x))
    grads: list[Tensor] = []
    model.up.register_full_backward_hook(lambda m, i, o: grads.append(o[0]))
    for _ in range(2):
        grads.clear()
        optimized(x).sum().backward()
        assert len(grads) == 1
    with nn.modules.module.register_module_forward_hook(
        lambda m, i, o: o * 3 if isinstance(m, nn.ConvTranspose3d) else o
    ):
        assert_same(optimized(x).detach(), copy.deepcopy(model)(x).detach())


def test_attributes_that_the_forward_reads() -> None:
    class Config:
        def __init__(self) -> None:
            self.scale = 2.0

    class Flags(Block):
        negate = False

        def __init__(self) -> None:
            super().__init__()
            self.config, self.sizes, self.step = Config(), [1.0, 2.0], 0

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * self.config.scale + self.sizes[-1]
            return -y if self.negate else y + getattr(self, "later", 0)

    model = Flags().eval()
    optimized = fxfuse.optimize(model, data())
    changes: list[Callable[[], Any]] = [
        lambda: setattr(model.config, "scale", 3.0),
        lambda: model.sizes.append(7.0),
        lambda: setattr(model, "later", 4.0),
        lambda: setattr(model, "negate", True),
        lambda: delattr(model, "negate"),
        lambda: setattr(model, "config", Config()),
    ]
    for change in changes:
        change()
        assert_follows(optimized, model)
    for _ in range(3):  # what the forward does not read costs nothing
        model.step += 1
        with watch() as runs:
            optimized(data())
        assert runs


def test_changing_from_call_to_call() -> None:
    """A model that is another one on every call is no longer captured after a while, and stays right."""

    class Stepping(Block):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) * self.step

    model = Stepping().eval()
    optimized = fxfuse.optimize(model)
    x = data(1, 2, 2, 2, 2)
    for step in range(40):
        model.step = step
        assert_same(optimized(x), model(x))
    assert "changes from call to call" in optimized.fxfuse_report.notes[-1]
    assert optimized._fxfuse_runtime._captured == 32


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
    """Empty batches, single elements, inputs without a batch dim."""

    def make() -> tuple[Tensor]:
        return (torch.randn(shape, dtype=F64, requires_grad=True),)

    assert_agree(PadToEven().double().train(training), make)
    if len(shape) == 5:
        assert_agree(nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.ReLU(), nn.GroupNorm(2, 4)).double(), make)


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


# --- copies and other tools -----------------------------------------------------------------------
def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("parts", [None, ["up", "norm"]])
def test_copies(duplicate: Callable[[nn.Module], nn.Module], parts: list[str] | None) -> None:
    model = Chain().eval()
    optimized = fxfuse.optimize(model, data(), submodules=parts and ["0", "1.*"])
    twin = duplicate(optimized)
    assert twin is not optimized and list(twin.state_dict()) == list(model.state_dict())
    if duplicate is not copy.copy:
        assert next(twin.parameters()) is not next(model.parameters())
        next(twin.parameters()).data.mul_(2)
    x = data()
    with torch.no_grad():
        for _ in range(2):
            with watch() as runs:
                got = twin(x)
    original = twin._fxfuse_original
    assert_same(got, original(x).detach())
    assert runs


class Chain(nn.Sequential):
    """A picklable model with parts within parts."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(nn.ConvTranspose3d(2, 3, 2), nn.Sequential(nn.ConvTranspose3d(3, 2, 2), nn.ReLU()))


def test_export() -> None:
    model, optimized = optimized_block()
    x = data()
    program = torch.export.export(optimized, (x,))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.fxfuse.region.default in targets
    assert not any("conv_transpose" in str(t) for t in targets)
    assert_same(program.module()(x).detach(), model(x).detach())
    assert sorted(program.state_dict) == sorted(k for k in model.state_dict() if k in program.state_dict)


def test_export_of_what_was_never_run() -> None:
    model = Block().eval()
    optimized = fxfuse.optimize(model)
    x = data()
    program = torch.export.export(optimized, (x,))
    assert_same(program.module()(x).detach(), model(x).detach())
    assert any("traced that was never run for real" in n for n in optimized.fxfuse_report.notes)


def test_jit_trace() -> None:
    model, optimized = optimized_block()
    x, other = data(), data()
    with torch.no_grad():
        traced = torch.jit.trace(optimized, x)
        assert_same(traced(other), model(other))


def test_under_torch_compile() -> None:
    """Dynamo steps around an optimised module: it is compiled already."""
    model, optimized = optimized_block()
    x = data()
    compiled = torch.compile(optimized, backend="eager")
    with torch.no_grad(), watch() as runs:
        assert_same(compiled(x), model(x))
    assert runs
    optimized.compile(backend="eager")
    assert model._compiled_call_impl is None


# --- parts of a model -----------------------------------------------------------------------------
class Uncapturable(nn.Module):
    """Only its parts can be captured."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Conv3d(1, 2, 3, padding=1)
        self.decoder = nn.ModuleList([nn.Sequential(nn.ConvTranspose3d(2, 2, 2), nn.ReLU()) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.ConvTranspose3d(2, 1, 1), "b": nn.Conv3d(2, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        for stage in self.decoder:
            y = stage(y)
        name = "a" if float(y.detach().sum()) > 0 else "b"
        return self.heads[name](y)


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        (["decoder.*"], ["decoder.0", "decoder.1"]),
        (["decoder"], ["decoder.0", "decoder.1"]),
        (["decoder.1", "heads.a"], ["decoder.1", "heads.a"]),
        (["decoder.0.0"], ["decoder.0.0"]),
        (["*"], ["encoder", "decoder.0", "decoder.1", "heads.a", "heads.b"]),
    ],
)
def test_submodules(patterns: list[str], parts: list[str]) -> None:
    model = Uncapturable()
    x = data(1, 1, 3, 3, 3)
    optimized = fxfuse.optimize(model, x, submodules=patterns)
    found = [n for n, m in optimized.named_modules() if type(m).__name__ == "OptimizedModule"]
    assert sorted(found) == sorted(parts)
    assert isinstance(optimized, Uncapturable)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert [n for n, _ in optimized.named_parameters()] == [n for n, _ in model.named_parameters()]
    with watch() as runs:
        assert_same(optimized(x).detach(), model(x).detach())
    assert len(runs) == sum(p.startswith("decoder") for p in parts) + _head(model, x, parts)
    report = optimized.fxfuse_report
    assert len(report.regions) >= len(runs) and all(any(n.startswith(p) for p in parts) for n in report.notes)
    optimized.eval()
    assert not any(m.training for m in model.modules())
    assert_same(optimized(x).detach(), model(x).detach())


def _head(model: Uncapturable, x: Tensor, parts: list[str]) -> int:
    """Whether the forward takes a head that is optimised and has a region."""
    y = model.encoder(x)
    for stage in model.decoder:
        y = stage(y)
    return int(float(y.detach().sum()) > 0 and "heads.a" in parts)


def test_replaced_parts_are_followed() -> None:
    model = Uncapturable().eval()
    x = data(1, 1, 3, 3, 3)
    optimized = fxfuse.optimize(model, submodules=["decoder.*"])
    assert_same(optimized(x).detach(), model(x).detach())
    model.decoder[0] = nn.Sequential(nn.ConvTranspose3d(2, 2, 3), nn.Tanh())
    model.extra = nn.Linear(1, 1)
    for _ in range(2):
        assert_same(optimized(x).detach(), model(x).detach())
    assert "extra.weight" in optimized.state_dict() and "extra.weight" in dict(optimized.named_parameters())
    optimized.to(F64)
    assert_same(optimized(x.double()).detach(), model(x.double()).detach())


def test_model_without_anything_to_fuse() -> None:
    model = nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU())
    optimized, _ = assert_agree(model, lambda: (data(),), fused=False)
    report = optimized.fxfuse_report
    assert not report.regions and "nothing to fuse" in str(report)
    assert fxfuse.optimize(nn.Identity())(3) == 3


# --- wrong arguments ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((F.relu,), {}, TypeError, r"takes an nn.Module, not function; wrap"),
        ((nn.Identity,), {}, TypeError, r"takes an nn.Module, not type"),
        ((Block(), 3), {}, TypeError, r"example_inputs must be a tensor, a tuple or a dict, not int"),
        ((Block(),), {"precision": "fp8"}, ValueError, r"precision='fp8' is not one of 'tf32', 'ieee' or None"),
        ((Block(),), {"allow": "bitwise"}, ValueError, r"not the string 'bitwise'"),
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


def test_overridden_call() -> None:
    class Calls(Block):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x * 2) + 1

    model = Calls().eval()
    optimized = fxfuse.optimize(model, data())
    x = data()
    assert_same(optimized(x).detach(), model(x).detach())
    assert any("overrides __call__" in note for note in optimized.fxfuse_report.notes)


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
