"""The short way of a call: when it is taken, and above all when not. And what a call costs, in Python's calls."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from pretend import Stand, gpu  # noqa: F401 - a fixture
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels import execute, running
from fxfuse.kernels.runtime import convolution_engine, launch, memory, prepared, recent, tail_engine
from fxfuse.kernels.runtime.launch import Kernel
from fxfuse.kernels.runtime.prepared import Prepared

UP = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
Given = tuple[str, list[Tensor], Tensor]


@pytest.fixture
def region(gpu: type[Stand]) -> Given:  # noqa: F811
    """The text of a region that ran twice, what it takes, and its result."""
    with mock.patch.object(execute, "slower", return_value=None):
        model = nn.Sequential(nn.ConvTranspose3d(8, 16, **UP), nn.LeakyReLU()).eval()
        fast = fxfuse.optimize(model, x := torch.randn(2, 8, 4, 5, 6))
        with torch.no_grad(), mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as seen:
            fast(x)
            made = fast(x)
    text, inputs = seen.call_args.args
    return text, list(inputs), made


def short(text: str, inputs: Sequence[Tensor]) -> bool:
    """Whether a call goes the short way; its result is right in any case."""
    ready = recent.find(text, inputs)
    with mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as long:
        made = ops.run_region(inputs, text)
    assert (ready is not None) == (not long.called)
    if not torch.is_grad_enabled():
        torch.testing.assert_close(made[0], nn.functional.leaky_relu(
            nn.functional.conv_transpose3d(*inputs, 2, 1, 1)))  # fmt: skip
    return ready is not None


def test_a_call_like_the_last_one(region: Given) -> None:
    text, inputs, _ = region
    with torch.no_grad():
        assert short(text, inputs)
        assert short(text, [t.clone() for t in inputs[:1]] + inputs[1:])  # other memory
        inputs[1].data = inputs[1].data.clone()
        assert short(text, inputs)


CHANGED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "sizes": lambda i: [i[0][:1], *i[1:]],
    "strides": lambda i: [i[0].contiguous(memory_format=torch.channels_last_3d), *i[1:]],
    "dtypes": lambda i: [t.detach().double() for t in i],
    "a view that negates": lambda i: [torch._neg_view(-i[0]), *i[1:]],
    "a tensor instead of a parameter": lambda i: [i[0], i[1].detach(), i[2].detach()],
}


@pytest.mark.parametrize("what", CHANGED)
def test_other_inputs(region: Given, what: str) -> None:
    text, inputs, _ = region
    with torch.no_grad():
        others = CHANGED[what](inputs)
        assert recent.find(text, others) is None
        assert recent.find(text, inputs[:2]) is None
        if what not in ("sizes", "dtypes"):  # of which the text tells
            assert not short(text, others)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
        yield


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXFUSE_KERNELS", "0")
        yield


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AROUND: dict[str, Callable[[], Any]] = {
    "gradients": torch.enable_grad,
    "another precision": tf32,
    "switched off": switched_off,
    "a mode": Mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a watcher": ops.watch,
}


@pytest.mark.parametrize("what", AROUND)
def test_other_circumstances(region: Given, what: str) -> None:
    text, inputs, _ = region
    with torch.no_grad():
        Stand.runs.clear()
        with AROUND[what](), mock.patch.object(Prepared, "run", side_effect=AssertionError):
            found = recent.find(text, inputs)
            assert found is None or what == "a watcher"
            if what == "a watcher":
                with ops.watch() as runs:
                    ops.run_region(inputs, text)
                assert [r.path.value for r in runs] == ["kernel"]
            if what == "gradients":
                assert ops.run_region(inputs, text)[0].requires_grad
            if what == "switched off":
                before = len(Stand.runs)
                ops.run_region(inputs, text)
                assert len(Stand.runs) == before
        assert short(text, inputs)  # nothing of it stays


def test_transforms_see_the_operator(region: Given) -> None:
    text, inputs, _ = region
    x, w, b = inputs
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(recent.find(text, [x, w, b]))
        return nn.functional.leaky_relu(nn.functional.conv_transpose3d(x, w, b, 2, 1, 1))

    with torch.no_grad():
        torch.func.vmap(call)(torch.stack([x, x]))
    assert seen == [None]


def test_what_is_dropped_is_not_run(region: Given) -> None:
    text, inputs, _ = region
    with torch.no_grad():
        assert recent.find(text, inputs) is not None
        execute.forget()
        assert recent.find(text, inputs) is None


def test_few_are_kept(region: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    text, inputs, _ = region
    monkeypatch.setattr(recent, "MOST_RECENT", 2)
    with torch.no_grad():
        ready = recent.find(text, inputs)
        assert ready is not None
        for number in range(5):
            recent.remember(str(number), inputs, ready)
            assert len(recent._recent) <= 2


@pytest.mark.parametrize("answer", [lambda *_: True, lambda *_: None], ids=["takes_everything", "takes_nothing"])
def test_guards_that_do_not_tell_tensors_apart_are_none(
    answer: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recent._known_guards() is not None  # or nothing here goes the short way
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", lambda *_, **__: SimpleNamespace(check=answer))
    assert recent._known_guards() is None
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert recent._known_guards() is None


def test_without_torchs_guards_the_long_way_is_taken(region: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    text, inputs, _ = region
    monkeypatch.setattr(recent, "_guards", None)
    monkeypatch.setattr(recent, "_recent", {})
    with torch.no_grad():
        for _ in range(3):
            assert not short(text, inputs)


# --- what a call costs ----------------------------------------------------------------------------
@pytest.fixture
def allocated() -> list[tuple[int, ...]]:
    """Shapes of the tensors that kernels were given memory for."""
    return []


@pytest.fixture
def kernels(gpu: type[Stand], allocated: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """Everything but the driver is as on a GPU; the kernels that were launched."""
    monkeypatch.undo()  # what passes for a prepared region
    launched: list[str] = []

    def start(_config: object, function: str, *_: object) -> int:
        launched.append(function)
        return 0

    workspaces: dict[tuple[int, ...], Tensor] = {}  # which lie where they lay

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        allocated.append(shape)
        if dtype is torch.uint8:
            return workspaces.setdefault(shape, torch.empty(shape, dtype=dtype))
        return torch.empty_strided(shape, strides, dtype=dtype)

    def module(source: str, names: Sequence[str], *_: object) -> SimpleNamespace:
        return SimpleNamespace(kernels={n: Kernel(n) for n in names})

    monkeypatch.setattr(memory, "empty", empty)
    for where in (convolution_engine, tail_engine):
        monkeypatch.setattr(where, "_module", module)
        monkeypatch.setattr(where, "stream_of", lambda _: 0)
    monkeypatch.setattr(tail_engine, "architecture", lambda _: "sm_90a")
    monkeypatch.setattr(convolution_engine, "_processors", lambda _: 132)
    monkeypatch.setattr(convolution_engine, "rows_map", lambda *_, **__: bytes(128))
    monkeypatch.setattr(convolution_engine, "planes_map", lambda *_, **__: bytes(128))
    monkeypatch.setattr(prepared, "current_device", lambda: None)
    monkeypatch.setattr(launch, "_launcher", lambda: start)
    monkeypatch.setattr(Kernel, "allow_shared", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_usable", "_hopper"):
        monkeypatch.setattr(execute, name, lambda _: True)
    monkeypatch.setattr(execute, "_device_name", lambda _: "NVIDIA Pretend")
    monkeypatch.setattr(execute, "slower", lambda *_: None)
    for where, name in ((execute, "_prepared"), (recent, "_recent"), (running, "_calls"), (running, "_launches")):
        monkeypatch.setattr(where, name, {})
    for name in ("stages.tail", "planning.schedule"):
        monkeypatch.setattr(f"fxfuse.kernels.{name}.LEAST_ELEMENTS", 1)
    return launched


def python_calls(call: Callable[[], object]) -> list[str]:
    """The names of the functions in Python that run, those of this file apart."""
    seen: list[str] = []

    def profile(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename != __file__:
            seen.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


#: model, the kernels of a call, functions in Python that it may call, and tensors that it allocates: its result, a
#: workspace for what a convolution makes of x and the weights, and one for a step of small tensors
COSTS = {
    "a convolution": ([nn.LeakyReLU()], ["measure", "prepare", "convolution", "direct"], 9, 2),
    "a pool": ([nn.LeakyReLU(), nn.MaxPool3d(2)], ["measure", "prepare", "convolution", "direct"], 9, 2),
    "a folded norm": (
        [nn.BatchNorm3d(16), nn.ReLU()],
        ["bundle", "measure", "prepare", "convolution", "direct"],
        13,
        3,
    ),
    "statistics": (
        [nn.GroupNorm(4, 16), nn.SiLU()],
        ["measure", "prepare", "convolution", "direct", "merge", "finish_statistics", "whole"],
        15,
        4,
    ),
}


@pytest.mark.parametrize("what", COSTS)
def test_functions_in_python_that_a_call_runs(kernels: list[str], allocated: list[tuple[int, ...]], what: str) -> None:
    behind, names, most, tensors = COSTS[what]
    model = nn.Sequential(nn.ConvTranspose3d(8, 16, **UP), *behind).eval()
    fast = fxfuse.optimize(model, x := torch.randn(2, 8, 4, 5, 6))
    with torch.no_grad():
        with mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as seen:
            fast(x)
            fast(x)
        text, inputs = seen.call_args.args
        kernels.clear()
        allocated.clear()
        ran = python_calls(lambda: ops.run_region(inputs, text))
    assert kernels == names and len(allocated) == tensors
    assert len(ran) <= most, "\n".join(ran)


@pytest.mark.parametrize("what", COSTS)
def test_functions_in_python_around_a_region(kernels: list[str], what: str) -> None:
    """Those of a model's call, beside what runs the region."""
    behind, names, *_ = COSTS[what]
    model = nn.Sequential(nn.ConvTranspose3d(8, 16, **UP), *behind).eval()
    fast = fxfuse.optimize(model, x := torch.randn(2, 8, 4, 5, 6))
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        kernels.clear()
        ran = python_calls(lambda: fast(x))
    assert kernels == names
    assert len(ran[: ran.index("Prepared.run")]) <= 12, "\n".join(ran)


def test_statistics_in_training_ask_torch_for_no_views(kernels: list[str]) -> None:
    """A kernel on small tensors reads them where they lie in one tensor, of which they are parts."""
    model = nn.Sequential(nn.ConvTranspose3d(8, 16, **UP), nn.BatchNorm3d(16), nn.AvgPool3d(2)).train()
    fast = fxfuse.optimize(model, x := torch.randn(2, 8, 4, 5, 6))
    with torch.no_grad():
        fast(x)
        fast(x)
        kernels.clear()
        with mock.patch.object(Tensor, "unbind", side_effect=AssertionError):
            fast(x)
    assert [k for k in kernels if k in ("finish_statistics", "bundle")] == ["finish_statistics", "bundle"]


# --- straight to the region -----------------------------------------------------------------------
def test_a_model_that_is_one_region(gpu: type[Stand], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its calls compare their tensors once, not once more for the region; unless something else than these changed."""
    monkeypatch.setattr(execute, "slower", lambda *_: None)
    model = nn.Sequential(nn.ConvTranspose3d(8, 16, **UP), nn.LeakyReLU()).eval()
    fast, x = fxfuse.optimize(model), torch.randn(2, 8, 4, 5, 6)

    def straight(x: Tensor = x) -> bool:
        with mock.patch.object(recent, "find", wraps=recent.find) as asked, torch.no_grad():
            Stand.runs.clear()
            got, expected = fast(x), model(x)
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected)
        return len(Stand.runs) == 1 and not asked.called

    def settle() -> None:
        with torch.no_grad():
            for _ in range(5):  # captured, served, served again, and by a way that first finds out what it may do
                fast(x)
        assert straight() and straight(torch.randn_like(x))

    settle()
    for around in AROUND.values():
        with around():
            if around is not torch.enable_grad:
                assert not straight()
            with torch.enable_grad():
                assert fast(x).requires_grad
        settle()
    execute.forget()
    assert [straight() for _ in range(3)] == [False, False, True]  # prepared anew; found; and known
    for other in (x[:1], torch._neg_view(-x), x.contiguous(memory_format=torch.channels_last_3d)):
        assert not straight(other)
    settle()
    model[0].weight.data = model[0].weight.detach().clone()
    assert straight()
    model[0].weight.requires_grad_(False)
    assert not straight()
    settle()
    fast[0].bias = None
    assert not straight()


def test_a_region_takes_tensors_in_its_own_order() -> None:
    """Of a BatchNorm the running statistics first, which the model has behind the weights."""
    model = nn.Sequential(nn.ConvTranspose3d(4, 6, **UP), nn.BatchNorm3d(6), nn.ReLU()).eval()
    with torch.no_grad():
        for tensor in (*model[1].parameters(), *list(model[1].buffers())[:2]):
            tensor.uniform_(0.5, 2.0)
        fast = fxfuse.optimize(model)
        for _ in range(6):
            x = torch.randn(2, 4, 4, 5, 6)
            torch.testing.assert_close(fast(x), model(x))
    way = fast._fxfuse_runtime._last[3]
    straight = fast._fxfuse_runtime._last[1].straight
    assert way is not None and sorted(straight.takes) != [*straight.takes]


def test_a_watcher_sees_what_goes_straight(gpu: type[Stand]) -> None:  # noqa: F811
    with mock.patch.object(execute, "slower", return_value=None), torch.no_grad():
        fast = fxfuse.optimize(nn.ConvTranspose3d(8, 16, **UP), x := torch.randn(2, 8, 4, 5, 6))
        for _ in range(3):
            fast(x)
        with ops.watch() as runs:
            fast(x)
    assert [r.path.value for r in runs] == ["kernel"]


# --- torch's operators ------------------------------------------------------------------------------
def test_torchs_operators_go_the_short_way_too() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(4, 6, **UP), nn.LeakyReLU()).eval()
    fast = fxfuse.optimize(model, x := torch.randn(2, 4, 4, 5, 6))
    recent.forget()
    with mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as long:
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(fast(x), model(x))
            assert long.call_count == 1
            with torch.autocast("cpu", dtype=torch.bfloat16):  # a region of its own
                assert fast(x).dtype is model(x).dtype
            assert torch.equal(fast(x[:1]), model(x[:1])) and torch.equal(fast(x[:1]), model(x[:1]))
        calls = long.call_count
        fast(x).sum().backward()  # with gradients it is the long way, and another
        assert model[0].weight.grad is not None and long.call_count == calls


def test_autocast_ends_the_short_way() -> None:
    model = nn.Sequential(nn.ConvTranspose3d(4, 6, **UP), nn.LeakyReLU()).eval()
    fast = fxfuse.optimize(model, x := torch.randn(2, 4, 4, 5, 6))
    recent.forget()
    with torch.no_grad(), mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as seen:
        fast(x)
        text, inputs = seen.call_args.args
    with torch.no_grad():
        assert recent.find(text, inputs) is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert recent.find(text, inputs) is None
            recent.forget()
            assert ops.run_region(inputs, text)[0].dtype is torch.float32  # what the text says
            assert recent.find(text, inputs) is None  # nor is it remembered


def test_what_torch_runs_for_now_is_not_remembered(gpu: type[Stand]) -> None:  # noqa: F811
    """A kernel could not be prepared while a graph is being captured: the next call tries again."""
    model = nn.Sequential(nn.ConvTranspose3d(8, 16, **UP), nn.LeakyReLU()).eval()
    fast = fxfuse.optimize(model, x := torch.randn(2, 8, 4, 5, 6))
    execute.forget()
    with torch.no_grad(), mock.patch.object(execute, "run", return_value=None):
        with mock.patch.object(ops, "_rewritten", wraps=ops._rewritten) as seen:
            fast(x)
        text, inputs = seen.call_args.args
    with torch.no_grad():
        assert recent.find(text, inputs) is None
