"""Every spelling in the tables means in the vocabulary what it means in torch, or is refused."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import (
    ALL_REFUSED,
    MASK,
    MODULE_SAMPLES,
    S,
    Sample,
    T,
    X,
    Y,
    meaning,
    name_of,
    op_infos,
    overloads,
    same,
    samples_of,
)
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse import vocabulary
from fxfuse.call import ATEN, FUNCTIONS, INPLACE_FUNCTIONS, METHODS, MODULES
from fxfuse.kernels.runtime.recent import computes
from fxfuse.normalize import values_only
from fxfuse.propagate import storages
from fxfuse.spellings.reductions import max_values, min_values

#: what torch itself raises for arguments that a spelling does not take
NOT_TAKEN = (TypeError, RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError)
OTHER_DTYPES = (torch.float32, torch.int64, torch.bool)


def _agrees(op: str, target: Any, function: Callable[..., Any], sample: Sample, *, inplace: bool = False) -> bool:
    """Compare a call with its meaning; False where torch does not take the arguments, or the meaning is refused."""
    given = sample.fresh()
    try:
        expected = function(*given.args, **given.kwargs)
    except NOT_TAKEN:
        return False
    if expected is NotImplemented:
        return False
    found = meaning(op, target, sample.fresh())
    if found.call is None:
        assert found.refusal
        return False
    try:
        got = found.run()
    except NOT_TAKEN:  # a region refuses what cannot be built
        return False
    if found.call.inplace and got.dtype is not expected.dtype:  # and what is of another type
        return False
    assert same(got, expected), f"{target} of {sample} does not mean {found.call}"
    disjoint = storages(got).isdisjoint(storages([*found.values.values()]))
    assert disjoint or found.call.inplace or not computes(vocabulary.lookup(found.call.op))
    before, after = (next(iter([*s.args, s.kwargs.get("input")])) for s in (sample, given))
    writes = isinstance(before, Tensor) and not same(after, before)
    assert found.call.inplace or not writes, f"{target} of {sample} writes to its operand, its meaning does not"
    assert found.call.inplace or not inplace
    return True


def _some(table: dict[Any, Any], key: Any, samples: list[Sample]) -> list[Sample]:
    """All samples for the first spelling of an adapter, some for the others."""
    first = next(k for k, adapter in table.items() if adapter is table[key])
    return samples if key == first or "." in str(key) or len(samples) < 9 else samples[::4]


def _check(op: str, target: Any, function: Callable[..., Any], samples: Iterable[Sample], **more: Any) -> None:
    """All samples in float64, and each in one of the other dtypes."""
    agreed = 0
    for number, sample in enumerate(samples):
        agreed += _agrees(op, target, function, sample, **more)
        _agrees(op, target, function, sample.to(OTHER_DTYPES[number % 3]), **more)
    assert agreed, f"no sample of {target} is taken"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{getattr(f, '__module__', '')}.{name_of(f)}")
def test_functions(function: Any) -> None:
    samples = _some(FUNCTIONS, function, samples_of(name_of(function)))
    _check("call_function", function, function, samples, inplace=function in INPLACE_FUNCTIONS)


def _method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    samples = [s for s in samples_of(name) if s.args and isinstance(s.args[0], Tensor)]
    _check("call_method", name, _method(name), _some(METHODS, name, samples))


@pytest.mark.parametrize("name", [f"{n}_" for n in METHODS if hasattr(Tensor, f"{n}_")])
def test_methods_in_place(name: str) -> None:
    for sample in samples_of(name):
        if sample.args and isinstance(sample.args[0], Tensor):
            _agrees("call_method", name, _method(name), sample)


@pytest.mark.parametrize("key", ATEN)
def test_aten(key: str) -> None:
    name = key.partition(".")[0]
    agreed = 0
    for overload in overloads(key):
        for number, sample in enumerate(_some(ATEN, key, samples_of(name))):
            agreed += _agrees("call_function", overload, overload, sample)
            if number % 2:
                _agrees("call_function", overload, overload, sample.to(OTHER_DTYPES[number % 3]))
    assert agreed, f"no sample of aten.{key} is taken"
    for overload in overloads(f"{name}_") if hasattr(torch.ops.aten, f"{name}_") else ():
        for sample in samples_of(name)[::4]:
            _agrees("call_function", overload, overload, sample)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_modules(kind: type[nn.Module]) -> None:
    for (make, sample), dtype in itertools.product(MODULE_SAMPLES[kind], (torch.float64, torch.float32)):
        torch.manual_seed(0)
        module, given = make().to(dtype), sample.to(dtype)
        found = meaning("call_module", "m", given, module)
        assert found.call is not None, found.refusal
        assert found.call.inplace == getattr(module, "inplace", False) or found.call.op == "clone"
        got, again = found.run(), given.fresh()
        assert same(got, module(*again.args, **again.kwargs)), f"{module} of {sample} does not mean {found.call}"


def test_every_argument_of_every_adapter_has_a_sample() -> None:
    tables = [(FUNCTIONS, name_of), (METHODS, str), (ATEN, lambda key: key.partition(".")[0])]
    seen: dict[Any, set[str]] = {}
    for table, name in tables:
        for key, adapter in table.items():
            names = seen.setdefault(adapter, set())
            for sample in samples_of(name(key)):
                try:
                    names.update(inspect.signature(adapter).bind(*sample.args, **sample.kwargs).arguments)
                except TypeError:
                    continue
    missing = {
        f"{adapter.__module__}.{adapter.__qualname__}({name})"
        for adapter, names in seen.items()
        for name in inspect.signature(adapter).parameters
        if name not in names and not name.startswith("_")
    }
    assert missing <= {
        # refused, see the tests of refusals
        "fxfuse.spellings.copies._to_copy(layout)",
        "fxfuse.spellings.copies._to_copy(device)",
        "fxfuse.spellings.copies._to_copy(pin_memory)",
    }


# --- maxima over a dim ----------------------------------------------------------------------------
def _max_graph(read: Callable[[fx.Graph, fx.Node], Any], method: bool = False) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("max", (x, 1)) if method else graph.call_function(torch.max, (x,), {"dim": 1})
    graph.output(read(graph, node))
    return graph


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda g, n: g.call_function(operator.getitem, (n, 0)),
        lambda g, n: g.call_function(getattr, (n, "values")),
        lambda g, n: (g.call_function(operator.getitem, (n, 0)), g.call_function(operator.getitem, (n, 1)))[0],
    ],
)
def test_a_maximum_whose_indices_nobody_reads(read: Any, method: bool) -> None:
    graph = _max_graph(read, method)
    values_only(graph)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [max_values]
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(X), X.max(1).values)


@pytest.mark.parametrize(
    "read",
    [
        lambda g, n: n,
        lambda g, n: g.call_function(operator.getitem, (n, 1)),
        lambda g, n: [g.call_function(operator.getitem, (n, i)) for i in (0, 1)],
        lambda g, n: g.call_function(operator.getitem, (n, -1)),
        lambda g, n: g.call_function(operator.getitem, (n, slice(0, 1))),
        lambda g, n: g.call_function(getattr, (n, "indices")),
    ],
)
def test_a_maximum_whose_indices_may_be_read_stays(read: Any) -> None:
    graph = _max_graph(read)
    before = str(graph)
    values_only(graph)
    assert str(graph) == before


def test_an_elementwise_maximum_that_is_indexed_stays() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(operator.getitem, (graph.call_function(torch.max, (x, y)), 0)))
    before = str(graph)
    values_only(graph)
    assert str(graph) == before


def test_minima_too() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.min.dim, (graph.placeholder("x"), 2, True))
    graph.output(graph.call_function(operator.getitem, (node, 0)))
    values_only(graph)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [min_values]
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(X), X.min(2, True).values)


# --- refusals -------------------------------------------------------------------------------------
REFUSED = [
    (torch.add, S(X, Y, alpha=2), "alpha=2"),
    (torch.sub, S(X, Y, alpha=0.5), "alpha=0.5"),
    (torch.div, S(X, Y, rounding_mode="floor"), "division with rounding_mode='floor'"),
    (torch.add, S(X, Y, out=torch.empty_like(X)), "it writes to out="),
    (torch.mul, S(X, 1j), "its operand 1j is neither a tensor nor a real number"),
    (torch.round, S(X, decimals=1), "its arguments are not understood (got an unexpected keyword argument 'decimals')"),
    (torch.sum, S(X, 1, dtype=torch.float32), "a reduction into dtype=torch.float32"),
    (torch.sum, S(X.long(), dtype=torch.int64), "a reduction into dtype=torch.int64"),
    (torch.softmax, S(X, 1, torch.float32), "a reduction into dtype=torch.float32"),
    (F.softmax, S(X, 1, 3, torch.float32), "a reduction into dtype=torch.float32"),
    (torch.prod, S(X), "a product over all dims"),
    (torch.norm, S(X[0, 0], "nuc"), "a norm with p='nuc'"),
    (torch.linalg.norm, S(X, 1, (1, 2)), "a norm of matrices"),
    (torch.max, S(X, 1), "a max that also returns indices"),
    (torch.clone, S(X, memory_format=torch.channels_last), "a copy into memory_format=torch.channels_last"),
    (F.max_pool2d, S(X, 2, return_indices=True), "a max pool that returns indices"),
    (F.adaptive_max_pool2d, S(X, 2, True), "a max pool that returns indices"),
    (F.dropout, S(X), "dropout is random in training mode"),
    (F.pad, S(X, (0, 1)), "padding"),
    (F.pad, S(X, (0, 0), "reflect"), "padding"),
    (F.instance_norm, S(X, T(3), T(3).abs()), "instance_norm with running statistics"),
    (F.instance_norm, S(X, T(3), T(3).abs(), use_input_stats=False), "instance_norm with running statistics"),
    (operator.and_, S(X.long(), Y.long()), "a bitwise operator on integers"),
    (operator.invert, S(X.long()), "a bitwise operator on integers"),
    (operator.getitem, S(X, 0), "an index that takes some elements"),
    (operator.getitem, S(X, (None, slice(1, None))), "an index that takes some elements"),
    (operator.getitem, S(X, True), "an index that takes some elements"),
    (operator.getitem, S((X, Y), 1), "an index that takes some elements, or an output of several"),
    (torch.cumsum, S(X, 0), "torch.cumsum is not in the vocabulary"),
    (torch.ops.aten.elu.default, S(X, 1.0, 2.0), "aten.elu with a scale"),
    (torch.ops.aten.convolution.default, S(T(1, 2, 5), T(3, 2, 3), None, [1], [0], [1], False, [0], 1),
     "a convolution is in the vocabulary only where it reads one position per sample"),
    (F.conv2d, S(T(1, 2, 1, 3), T(3, 2, 1, 1)), "a convolution is in the vocabulary only where it reads one position"),
    (F.conv1d, S(T(2, 3, 1), T(4, 3, 3), padding=1), "a convolution is in the vocabulary only where it"),
    (F.conv1d, S(T(3, 1), T(4, 3, 1)), "a convolution is in the vocabulary only where it reads one position"),
    (F.conv3d, S(T(2, 4, 1, 1, 1), T(4, 2, 1, 1, 1), groups=2), "a convolution of one position in 2 groups"),
    (F.conv2d, S(T(2, 3, 1, 1), T(4, 3, 1, 1), padding=(0, 1)), "a convolution of one position, padded"),
    (F.linear, S(X, T(2, 5)), "a linear layer is in the vocabulary only where it reads one vector per sample"),
    (F.linear, S(T(3, 5), T(5)), "a linear layer whose weight is a vector"),
    (F.linear, S(T(5), T(2, 5)), "a linear layer is in the vocabulary only where it reads one vector"),
    (torch.ops.aten.round.decimals, S(X, decimals=1), "its arguments are not understood"),
    (torch.ops.aten._to_copy.default, S(X, device=torch.device("cpu")), "a move to another device, or a layout"),
    (torch.ops.aten.cumsum.default, S(X, 0), "aten.cumsum.default is not in the vocabulary"),
    (torch.div, S(1.5, X), "torch.div of a number rounds once, the number / a tensor twice"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "sample", "reason"), REFUSED)
def test_refusals(function: Any, sample: Sample, reason: str) -> None:
    found = meaning("call_function", function, sample)
    assert found.call is None
    assert found.refusal.startswith(reason)


@pytest.mark.parametrize(
    ("method", "sample", "reason"),
    [
        ("to", S(X, "cpu"), "a move to another device, or to the type of another tensor"),
        ("to", S(X, Y.float()), "a move to another device, or to the type of another tensor"),
        ("to", S(X, torch.float32, memory_format=torch.channels_last), "a copy into memory_format=torch.channels_last"),
        ("to", S(X, torch.int64), "a cast from torch.float64 to torch.int64"),
        ("double", S(MASK), "a cast from torch.bool to torch.float64"),
        ("contiguous", S(X, memory_format=torch.channels_last), "a copy into memory_format=torch.channels_last"),
        ("unsqueeze_", S(X, 0), "it changes its operand in place in a way that is not pointwise"),
        ("transpose_", S(X, 0, 1), "it changes its operand in place in a way that is not pointwise"),
        ("squeeze_", S(X), "it changes its operand in place in a way that is not pointwise"),
        ("view", S(X, torch.int64), "sizes or dims that are not whole numbers known before the call"),
        ("bernoulli_", S(X), "Tensor.bernoulli_ is not in the vocabulary"),
        ("softmax", S(X, 7), "dim 7 of a tensor of 4 dims"),
    ],
)
def test_refused_methods(method: str, sample: Sample, reason: str) -> None:
    found = meaning("call_method", method, sample)
    assert found.call is None
    assert reason in found.refusal


def _bn(**changes: Any) -> nn.Module:
    module = nn.BatchNorm2d(3).double()
    for name, value in changes.items():
        if isinstance(value, Tensor):
            delattr(module, name)
        setattr(module, name, value)
    return module


def _relu_with_a_forward() -> nn.Module:
    module = nn.ReLU()
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _hooked(register: str) -> nn.Module:
    module = nn.ReLU()
    getattr(module, register)(lambda *a: None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _bn(weight=T(3)), "its weight is not a parameter or a buffer of its own"),
        (lambda: _bn(running_mean=T(3)), "its running_mean is not a parameter or a buffer of its own"),
        (lambda: nn.BatchNorm3d(3).double(), "BatchNorm3d on an input of 4 dims"),
        (lambda: nn.InstanceNorm3d(3).double(), "InstanceNorm3d on an input of 4 dims"),
        (lambda: nn.InstanceNorm2d(3, track_running_stats=True).double(), "instance_norm with running statistics"),
        (_relu_with_a_forward, "the module has a forward of its own"),
        (lambda: _hooked("register_forward_hook"), "the module has hooks"),
        (lambda: _hooked("register_forward_pre_hook"), "the module has hooks"),
        (lambda: _hooked("register_full_backward_hook"), "the module has hooks"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.PReLU(3).double()), "ParametrizedPReLU is parametrized"),
        (
            lambda: nn.Conv2d(3, 3, 1).double(),
            "a convolution is in the vocabulary only where it reads one position per sample",
        ),
        (lambda: nn.MaxPool2d(2, return_indices=True), "a max pool that returns indices"),
        (nn.Dropout, "dropout is random in training mode"),
        (lambda: nn.Softmax(), "softmax without a dim"),
        (lambda: nn.Softmax(7), "dim 7 of a tensor of 4 dims"),
        (lambda: nn.ZeroPad2d((0, 0, 1, 0)), "padding"),
    ],
)
def test_refused_modules(make: Callable[[], nn.Module], reason: str) -> None:
    found = meaning("call_module", "m", S(X), make())
    assert found.call is None
    assert reason in found.refusal


def test_output_size_out_of_reach_is_refused() -> None:
    found = meaning("call_module", "m", S(T(2, 4, 4), output_size=(10,)), nn.ConvTranspose1d(4, 3, 2, 2).double())
    assert found.call is None
    assert found.refusal == "output_size (10,) cannot be reached"


def test_hooks_on_all_modules() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        found = meaning("call_module", "m", S(X), nn.ReLU())
    finally:
        handle.remove()
    assert found.call is None
    assert found.refusal == "hooks on all modules are registered"


def test_numbers_of_numpy_are_plain_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    found = meaning("call_function", operator.mul, S(X, numpy.float64(2.5)))
    assert found.call is not None
    assert type(found.call.operands[1]) is float
    assert same(found.run(), X * 2.5)


def test_arguments_that_are_nodes_of_numbers() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_method("size", (x, 1))
    graph.output(graph.call_function(torch.mul, (x, size)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fxfuse.propagate import facts, isolated, propagate

    with isolated(), FakeTensorMode() as mode:
        propagate(graph, {}, [mode.from_tensor(X)])
    call = facts(list(graph.nodes)[2]).call
    assert call is not None
    assert call.operands == (x, 3)


# --- torch's own samples --------------------------------------------------------------------------
@pytest.mark.parametrize("info", op_infos(), ids=lambda info: f"{info.name}_{info.variant_test_name}")
def test_samples_of_torch(info: Any) -> None:
    agreed = 0
    for each in itertools.islice(info.sample_inputs("cpu", torch.float64), 24):
        sample = Sample((each.input, *each.args), each.kwargs)
        leaves = [t for t in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(t, Tensor)]
        if not isinstance(each.input, Tensor) or not all(t.layout is torch.strided for t in leaves):
            continue
        if info.op in FUNCTIONS:
            agreed += _agrees("call_function", info.op, info.op, sample)
        else:
            agreed += _agrees("call_method", info.name, _method(info.name), sample)
    assert bool(agreed) != (f"{info.name}_{info.variant_test_name}" in ALL_REFUSED)
