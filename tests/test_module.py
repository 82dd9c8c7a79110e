"""The modules that optimize returns: views that share all state with the original, and follow its changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from agreement import F64, Block, assert_agree, assert_follows, assert_same, data, optimized_block
from torch import Tensor, nn

import fxfuse
from fxfuse.kernels.runtime import recent
from fxfuse.ops import watch
from fxfuse.runtime import Runtime


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
        for _ in range(3):  # the last of them goes the short way
            before = optimized(data())
        CHANGES[name](model, optimized)
        for _ in range(2):
            x, twin = data(), copy.deepcopy(model)
            with watch() as runs:
                got = optimized(x)
            assert_same(got, twin(x))
            assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    assert bool(runs) == (name != "weight norm"), before.shape


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(2, 4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.up(x) + y.mean()
        return z.relu() if torch.is_grad_enabled() else z.exp()


def test_calls_like_the_one_before_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Asks()
    fast = fxfuse.optimize(model)
    x, y = torch.randn(1, 2, 3, 4, 5), torch.randn(1, 2, 3, 4, 5)
    long: list[int] = []
    usual = Runtime._long_way

    def way(*args: Any) -> Any:
        long.append(1)
        return usual(*args)

    monkeypatch.setattr(Runtime, "_long_way", way)

    def expect(short: bool, *args: Any, **kwargs: Any) -> None:
        long.clear()
        got, expected = fast(*args, **kwargs), model(*args, **kwargs)
        assert type(got) is type(expected) and got.dtype is expected.dtype
        torch.testing.assert_close(got, expected)
        assert (not long) == short

    def settle() -> None:
        for _ in range(3):
            fast(x, y)
        expect(True, x, y)

    settle()
    expect(True, torch.randn_like(x), torch.randn_like(y))
    for other in (x[:, :, :2], x.transpose(3, 4).contiguous().transpose(3, 4), x.double().float().requires_grad_()):
        expect(False, other, y)
        settle()
    expect(False, x, x)
    settle()
    expect(False, x, y=y)
    settle()
    for around in (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: nn.modules.module.register_module_forward_hook(lambda m, a, r: None),
        fwAD.dual_level,
        torch.no_grad,
    ):
        with around():
            expect(False, x, y)
        settle()
    torch.set_default_dtype(torch.float64)
    try:
        expect(False, x, y)
    finally:
        torch.set_default_dtype(torch.float32)
    settle()
    long.clear()
    torch.func.vmap(lambda s: fast(s, y))(x[None])
    torch.func.vmap(lambda s: fast(x, y) + s)(x.new_zeros(2))  # the model's tensors are none of vmap's
    torch.jit.trace(fast, (x, y), check_trace=False)
    assert len(long) == 3
    settle()
    model.up.weight.data = model.up.weight.detach().clone()
    expect(True, x, y)
    model.up.bias = None
    expect(False, x, y)


def test_dtypes_of_autocast() -> None:
    """Torch's guards tell whether it is on, and no more."""
    model = nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.ReLU())
    fast, x = fxfuse.optimize(model), torch.randn(1, 2, 3, 4, 5)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype):
                for _ in range(4):
                    assert fast(x).dtype is model(x).dtype is dtype


def test_what_was_exported_goes_the_short_way_too() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(2, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(x).relu()
            return y if x.shape[0] < 9 else y + 1

    model = Counts()
    fast = fxfuse.optimize(model)
    for _ in range(4):
        x = torch.randn(2, 2, 3, 4, 5)
        assert_same(fast(x), model(x))
    assert "torch.export" in fast.fxfuse_report.notes[-1] and fast._fxfuse_runtime._last[2] is not None
    with torch.no_grad():
        for other in (torch.randn(9, 2, 3, 4, 5), x.transpose(3, 4), x.clone().requires_grad_()):
            assert_same(fast(other), model(other))


def test_the_short_way_of_training() -> None:
    """Gradients, running statistics and the counter, as ever."""
    model = Block()
    twin, optimized = copy.deepcopy(model), fxfuse.optimize(model)
    with mock.patch.object(Runtime, "_long_way", autospec=True, side_effect=Runtime._long_way) as long:
        for _ in range(5):
            x = data()
            assert_same(optimized(x), twin(x))
            optimized(x).sum().backward()
            twin(x).sum().backward()
        assert long.call_count == 3  # captured; served; and served again
    assert_same({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()})
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


def test_tied_weights_take_the_long_way() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(2, 2, 3), nn.ReLU(), nn.ConvTranspose3d(2, 2, 3))
    model[2].weight = model[0].weight
    optimized = fxfuse.optimize(model)
    for _ in range(4):
        x = torch.randn(1, 2, 3, 3, 3)
        assert_same(optimized(x), model(x))
    assert optimized._fxfuse_runtime._last[2] is None


def test_without_torchs_guards_there_is_no_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_guards", None)
    model, optimized = optimized_block()
    for _ in range(4):
        assert_follows(optimized, model)
    assert optimized._fxfuse_runtime._last[2] is None


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
    assert optimized.fxfuse_report.notes[-1] == "step changed from call to call, and 32 captures were of little use"
    assert optimized._fxfuse_runtime._captured == 32


def test_overridden_call() -> None:
    class Calls(Block):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x * 2) + 1

    model = Calls().eval()
    optimized = fxfuse.optimize(model, data())
    x = data()
    assert_same(optimized(x).detach(), model(x).detach())
    assert any("overrides __call__" in note for note in optimized.fxfuse_report.notes)


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


def test_replicas_of_data_parallel() -> None:
    """They live on other devices, and run as the original does."""
    model, optimized = optimized_block()
    replica = optimized._replicate_for_data_parallel()
    assert type(replica) is Block and replica._modules.keys() == model._modules.keys()


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
