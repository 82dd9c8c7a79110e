"""Kernels at their limits, on a Hopper GPU: large tensors, streams, threads, graphs, memory as it may lie, odd inputs.

One layer serves all chains, and every chain of a class is compiled once: the tests take seconds, not minutes.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import importlib.util
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from drawn import CLASSES
from many_chains import errors, kernels_always, kinds_of
from orientation import by_channel_always, by_channel_never
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.compare import relative_error
from fxfuse.kernels import execute
from fxfuse.kernels.plan import Path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or importlib.util.find_spec("cuda.bindings") is None,
    reason="needs a Hopper GPU",
)
#: relative L2 error against float64 that the class's rounding explains
LIMIT = {"tf32": 1e-3, "ieee": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
LAST = torch.channels_last_3d
MIB = 2**20


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Kernels run whether they are the faster or not; TF32 is allowed, until a test says otherwise."""
    execute.forget()
    with kernels_always(), torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield


@pytest.fixture
def most_memory() -> None:
    """Most of the GPU's memory; such tests are serial."""
    if torch.cuda.mem_get_info()[1] < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    torch.cuda.empty_cache()


# --- chains ---------------------------------------------------------------------------------------
class Stages(nn.Module):
    """A transposed convolution of 32 to 48 channels, and what is behind it."""

    def __init__(self, *stages: nn.Module | Callable[[Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.ConvTranspose3d(32, 48, 3, stride=2, padding=1)
        self.parts = nn.ModuleList([s for s in stages if isinstance(s, nn.Module)])
        self.order = [None if isinstance(s, nn.Module) else s for s in stages]

    def forward(self, x: Tensor) -> Tensor:
        parts, y = iter(self.parts), self.layer(x)
        for stage in self.order:
            y = next(parts)(y) if stage is None else stage(y)
        return y


#: every algorithm: a chain that has it, and a word of its schedule's kinds
KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "stored": (lambda: Stages(F.silu), "convolution, stored"),
    "maximum": (lambda: Stages(F.gelu, lambda y: F.max_pool3d(y, 2), F.tanh), "convolution, maximum"),
    "mean": (lambda: Stages(lambda y: F.avg_pool3d(y, 4)), "convolution, sum"),
    "norm": (lambda: Stages(F.relu, nn.GroupNorm(4, 48), F.hardswish), "statistics, gathered"),
    "batch": (lambda: Stages(nn.BatchNorm3d(48), F.silu).train(), "statistics, gathered"),
    "only_means": (lambda: Stages(F.silu, lambda y: y.mean((2, 3, 4))), "keeps nothing"),
    "softmax": (lambda: Stages(lambda y: y.softmax(1), torch.sigmoid), "folds Softmax"),
    "sum": (lambda: Stages(F.softplus, lambda y: y.sum(1, keepdim=True), F.tanh), "folds Sum"),
    "pool": (lambda: Stages(F.silu, lambda y: F.max_pool3d(y, 3, 2, 1)), "pool"),
    "residual": (lambda: Stages(F.relu, nn.InstanceNorm3d(48), lambda y: y + y.softmax(1)), "fold Persistent"),
    "map": (lambda: Stages(F.silu, lambda y: y + y.softmax(1) * y.softmax(2)), "map"),
}
#: numerics class and memory format in which they run
WAYS = {
    "tf32": ("tf32", False),
    "tf32 last": ("tf32", True),
    "ieee": ("ieee", False),
    "float16 last": ("float16", True),
}
ONCE = ("tf32 last", "ieee")  # not with every kind
CASES = [(k, w) for w in WAYS for k in KINDS if w not in ONCE or k in ("stored", "maximum", "norm")]


@dataclasses.dataclass
class Case:
    """A model, its optimised twin, and how they are run."""

    numerics: str
    last: bool
    eager: nn.Module
    fast: nn.Module

    @staticmethod
    def of(kind: str, way: str) -> Case:
        numerics, last = WAYS[way]
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = CLASSES[numerics][1]
        eager = KINDS[kind][0]().to(DEVICE).to(CLASSES[numerics][0])
        if last:
            eager = eager.to(memory_format=LAST)
        return Case(numerics, last, eager, fxfuse.optimize(copy.deepcopy(eager)))

    def input(self, seed: int = 0, *shape: int) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(shape or (3, 32, 7, 10, 9), device=DEVICE).to(CLASSES[self.numerics][0])
        return x.contiguous(memory_format=LAST) if self.last else x

    def check(self, got: Tensor, x: Tensor) -> None:
        """As near to float64 as the class's rounding explains."""
        exact = copy.deepcopy(self.eager).double()(x.double())
        like = copy.deepcopy(self.eager)(x)
        assert got.shape == like.shape and got.dtype is like.dtype
        near(got, like, exact, self.numerics)


def near(got: Tensor, like: Tensor, exact: Tensor, numerics: str) -> None:
    """As near to float64 as eager mode, or as rounding explains, as a whole and in every element."""
    for i, (error, own) in enumerate(zip(errors(got, exact), errors(like, exact), strict=True), 1):
        assert error <= max(2 * own, 2 * i * LIMIT[numerics]), (error, own)


def kinds_run() -> str:
    """The kinds of kernels that ran since the fixture, or since the list was cleared."""
    return "; ".join(k for p in execute._prepared.values() if p is not None for k in kinds_of(p.schedule))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


# --- memory as it may lie -------------------------------------------------------------------------
def fill_free_memory(byte: int) -> None:
    """What the allocator hands out next, small and large, is full of ``byte``: the free part of segments, too."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    some = [
        torch.empty(size, dtype=torch.uint8, device=DEVICE)
        for size in (*[64 * MIB] * 4, *[5 * MIB] * 16, *[2**19] * 64)
    ]
    del some
    free = []
    for segment in torch.cuda.memory_snapshot():
        most = MIB if segment["segment_type"] == "small" else segment["total_size"]
        for left in (b["size"] for b in segment["blocks"] if b["state"] == "inactive"):
            free += [min(most, left - at) for at in range(0, left, most)]
    filled = [torch.full((size,), byte, dtype=torch.uint8, device=DEVICE) for size in sorted(free, reverse=True)]
    del filled
    for size in (2**12, 3 * MIB, 40 * MIB):
        assert bool((torch.empty(size, dtype=torch.uint8, device=DEVICE) == byte).all())


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_the_same_bits_whatever_lay_in_memory(kind: str, way: str) -> None:
    """0xff is NaN in every dtype, and -1; 0x00 is zero; 0x7b is large in every dtype. Twice the same without, too."""
    case = Case.of(kind, way)
    x = case.input()
    case.fast(x)
    with ops.watch() as runs:
        first = case.fast(x)
    assert [r.path for r in runs] == [Path.KERNEL], case.fast.fxfuse_report
    assert KINDS[kind][1] in kinds_run(), kinds_run()
    case.check(first, x)
    assert torch.equal(bits(first), bits(case.fast(x)))
    for byte in (0xFF, 0x00, 0x7B):
        fill_free_memory(byte)
        assert torch.equal(bits(first), bits(case.fast(x))), hex(byte)


#: how results get to memory: which store, the layer's stride and kernel, sizes of x
STORES = [
    ("DIRECT", (2, 2, 2), (2, 2, 2), (4, 8, 16)),
    ("DIRECT", (1, 1, 3), (3, 3, 3), (4, 8, 16)),
    ("PLANES", (1, 1, 1), (3, 3, 3), (7, 10, 9)),
    ("PLANES", (1, 1, 3), (3, 3, 3), (7, 10, 9)),
    ("PLANES", (2, 2, 2), (3, 3, 3), (7, 10, 9)),
    ("JOINT", (2, 2, 2), (3, 3, 3), (5, 10, 47)),
    ("JOINT", (2, 2, 2), (3, 3, 3), (2, 2, 250)),
    ("JOINT", (1, 3, 1), (3, 3, 3), (3, 11, 21)),
    ("ROWS", (1, 1, 1), (3, 3, 3), (2, 2, 250)),
    ("ROWS", (2, 2, 2), (3, 3, 3), (2, 2, 255)),
    ("STREAM", (1, 1, 1), (3, 3, 3), (7, 10, 29)),
    ("STREAM", (2, 1, 2), (3, 3, 2), (5, 7, 17)),
    ("SECTORS", (2, 2, 2), (2, 2, 2), (4, 8, 32)),
]


@pytest.mark.parametrize("numerics", ["tf32", "float16"])
@pytest.mark.parametrize(("store", "stride", "kernel", "sizes"), STORES)
def test_every_way_to_store(
    store: str, stride: tuple[int, ...], kernel: tuple[int, ...], sizes: tuple[int, ...], numerics: str
) -> None:
    fast, x, got = check_store(store, stride, kernel, sizes, numerics)
    (prepared,) = (p for p in execute._prepared.values() if p is not None)
    assert prepared.convolution.tiling(prepared.schedule.kernel.sizes)[1].name == store
    fill_free_memory(0xFF)
    assert torch.equal(bits(got), bits(fast(x)))


def check_store(
    store: str, stride: tuple[int, ...], kernel: tuple[int, ...], sizes: tuple[int, ...], numerics: str
) -> tuple[nn.Module, Tensor, Tensor]:
    """The optimised layer, its input and the result, which is right."""
    torch.manual_seed(0)
    dtype = CLASSES[numerics][0]
    eager = Stages(F.silu, layer=nn.ConvTranspose3d(32, 48, kernel, stride)).to(DEVICE).to(dtype)
    fast, x = fxfuse.optimize(copy.deepcopy(eager)), torch.randn(2, 32, *sizes, device=DEVICE).to(dtype)
    with by_channel_always() if store in ("SECTORS", "STREAM") else by_channel_never():
        fast(x)
        with ops.watch() as runs:
            got = fast(x)
    assert DEVICE == "cpu" or [r.path for r in runs] == [Path.KERNEL]
    near(got, eager(x), copy.deepcopy(eager).double()(x.double()), numerics)
    return fast, x, got


@pytest.mark.parametrize(
    ("way", "part"), [("tf32", 0.5), ("tf32 last", 0.5), ("ieee", 1.0), ("float16", 1.0), ("float16 last", 0.0)]
)
@pytest.mark.parametrize(("kind", "outputs"), [("stored", 1), ("maximum", 1), ("norm", 2)])
def test_peak_memory(kind: str, outputs: int, way: str, part: float) -> None:
    """The result, twice where it is normalised; 16 bits per number that is read, unless they lie so already; 16 MiB."""
    numerics, last = WAYS.get(way, ("float16", False))
    torch.backends.cudnn.allow_tf32 = numerics == "tf32"
    model = KINDS[kind][0]().to(DEVICE).to(CLASSES[numerics][0])
    fast = fxfuse.optimize(model.to(memory_format=LAST) if last else model)
    x = torch.randn(4, 32, 32, 64, 64, device=DEVICE).to(CLASSES[numerics][0])
    x = x.contiguous(memory_format=LAST) if last else x
    fast(x[:1])
    for _ in range(5):  # also until a graph of them has its room, where the allocator gives the same place again
        fast(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with ops.watch() as runs:
        out = fast(x)
    peak = torch.cuda.max_memory_allocated() - before
    assert [r.path for r in runs] == [Path.KERNEL]
    assert out.nbytes <= peak <= outputs * out.nbytes + part * x.nbytes + 16 * MIB
    assert torch.cuda.memory_allocated() - before <= out.nbytes + MIB  # nothing else stays


# --- streams, threads, graphs, devices ------------------------------------------------------------
@pytest.mark.parametrize("kind", ["stored", "norm"])
@pytest.mark.parametrize("way", ["tf32", "float16 last"])
def test_two_streams_at_once(kind: str, way: str) -> None:
    """Calls that are on their way at the same time share no workspace."""
    case = Case.of(kind, way)
    xs = [case.input(seed, 4, 32, 16, 24, 24) for seed in range(2)]
    case.fast(xs[0])
    expected = [case.fast(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for x, stream, found in zip(xs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(case.fast(x))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(bits(y), bits(right)) for y in found)


@pytest.mark.parametrize("kind", ["stored", "maximum", "norm"])
def test_threads_share_a_module(kind: str) -> None:
    """Eight of them, each on a stream of its own, from the first call on: nothing is prepared yet."""
    case = Case.of(kind, "tf32")
    xs = [case.input(seed, 2, 32, 6 + seed % 3, 9, 8) for seed in range(8)]
    case.fast(xs[0])
    expected = [case.fast(x) for x in xs]
    torch.cuda.synchronize()
    execute.forget()
    start = threading.Barrier(len(xs))

    def work(x: Tensor) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            start.wait()
            found = [case.fast(x) for _ in range(25)]
            stream.synchronize()
        return found

    with ops.watch() as runs, concurrent.futures.ThreadPoolExecutor(len(xs)) as pool:
        results = list(pool.map(work, xs))
    assert [r.path for r in runs] == [Path.KERNEL] * (25 * len(xs))
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(bits(y), bits(right)) for y in found)


@pytest.mark.parametrize(
    ("kind", "way"), [("maximum", "tf32"), ("norm", "tf32"), ("stored", "ieee"), ("softmax", "float16 last")]
)
def test_a_replayed_graph_sees_what_has_changed(kind: str, way: str) -> None:
    """Weights that a fused optimiser or ``.data`` writes, other inputs, and samples that half precision cannot hold."""
    case = Case.of(kind, way)
    model = case.fast._fxfuse_original
    x, held = _captured(case)
    graph, out = held
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    def write() -> None:
        model.layer.weight.data.mul_(-3.0)
        model.layer.bias.data.add_(0.5)

    def special() -> None:
        x[1, 3, 2, 5, 4] = 1e30 if x.dtype is torch.float32 else float("inf")
        x[2, 0, 0, 0, 0] = float("nan")

    changes: list[Callable[[], object]] = [step, write, lambda: x.copy_(case.input(5)), special, lambda: x.fill_(0.25)]
    seen = []
    for change in changes:
        change()
        fill_free_memory(0xFF)
        graph.replay()
        with ops.watch() as runs:
            assert torch.equal(bits(out), bits(case.fast(x)))
        assert [r.path for r in runs] == [Path.KERNEL]
        case.eager.load_state_dict(model.state_dict())
        case.check(out, x)
        seen.append(out.clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def _captured(case: Case) -> tuple[Tensor, tuple[torch.cuda.CUDAGraph, Tensor]]:
    """An input, and the graph of a call with it, with its result."""
    x = case.input()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.fast(x), case.fast(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ops.watch() as runs:
        out = case.fast(x)
    assert [r.path for r in runs] == [Path.KERNEL]
    return x, (graph, out)


def test_a_replayed_graph_updates_running_statistics() -> None:
    case = Case.of("batch", "tf32")
    x, (graph, out) = _captured(case)
    norm = case.fast._fxfuse_original.parts[0]
    before, mean = int(norm.num_batches_tracked), norm.running_mean.clone()
    x.copy_(case.input(3) + 1)
    graph.replay(), graph.replay()
    assert int(norm.num_batches_tracked) == before + 2
    y = case.eager.layer.double()(x.double())
    expected = mean.double() * 0.81 + y.mean((0, 2, 3, 4)) * 0.19
    assert relative_error(norm.running_mean, expected) < LIMIT["tf32"]
    assert relative_error(out, F.silu(F.batch_norm(y, None, None, training=True))) < LIMIT["tf32"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device() -> None:
    """While the first one is current; then both at once, from two threads."""
    case = Case.of("norm", "tf32")
    other = fxfuse.optimize(copy.deepcopy(case.eager).to("cuda:1"))
    x = case.input()
    y = x.to("cuda:1")
    for fast, z in ((case.fast, x), (other, y)):
        fast(z)
    expected = case.fast(x)
    with ops.watch() as runs:
        got = other(y)
    assert [r.path for r in runs] == [Path.KERNEL] and torch.cuda.current_device() == 0
    assert got.device == y.device and torch.equal(bits(got.to(DEVICE)), bits(expected))

    def work(fast: nn.Module, z: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [fast(z) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, case.fast, x), pool.submit(work, other, y)]:
            assert all(torch.equal(bits(t.to(DEVICE)), bits(expected)) for t in future.result())


# --- inputs of every kind -------------------------------------------------------------------------
#: of half-precision rows of channels, some of which the engine reads as they lie
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as_it_is": lambda x: x,
    "channels_from_48": lambda x: x[:, 16:],
    "channels_that_begin_anywhere": lambda x: x[:, 3:35],
    "a_crop": lambda x: x[:, :32, 1:, 2:, 3:],
    "every_other_row": lambda x: x[:, :32, :, ::2],
    "one_sample_for_all": lambda x: x[:1, :32].expand(3, -1, -1, -1, -1),
    "one_column_for_all": lambda x: x[:, :32, :, :, :1].expand(-1, -1, -1, -1, 9),
    "one_channel_for_all": lambda x: x[:, :1].expand(-1, 32, -1, -1, -1),
    "dims_exchanged": lambda x: x[:, :32].transpose(2, 4),
}


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("numerics", ["tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, numerics: str, layout: str) -> None:
    """test_kernels.py has views of float32 with other channels; these are what rows of channels may be."""
    check_view(view, numerics, layout)


def check_view(view: str, numerics: str, layout: str) -> None:
    torch.manual_seed(0)
    dtype = CLASSES[numerics][0]
    channels = 48 if view == "as_it_is" else 32
    eager = Stages(F.silu, layer=nn.ConvTranspose3d(channels, 24, 3, stride=2)).to(DEVICE).to(dtype)
    x = torch.randn(3, 48, 7, 10, 9, device=DEVICE).to(dtype)
    x = VIEWS[view](x.contiguous(memory_format=LAST) if layout == "last" else x)
    fast = fxfuse.optimize(copy.deepcopy(eager), (x,))
    with ops.watch() as runs:
        got = fast(x)
    assert DEVICE == "cpu" or [r.path for r in runs] == [Path.KERNEL]
    like, exact = eager(x), copy.deepcopy(eager).double()(x.double())
    assert got.stride() == like.stride()
    near(got, like, exact, numerics)


@pytest.mark.parametrize("of", ["x", "residual"])
def test_the_negative_bit(of: str) -> None:
    """A tensor that says of its memory that it is negated: kernels read memory as it is, so torch runs it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose3d(8, 16, 3)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return F.relu(self.layer(x) + r)

    def negative(*shape: int) -> Tensor:
        made = torch.view_as_complex(torch.randn(*shape, 2, device=DEVICE)).conj().imag
        assert made.is_neg()
        return made

    torch.manual_seed(0)
    x, r = (
        (negative if name == of else lambda *s: torch.randn(s, device=DEVICE))(*shape)
        for name, shape in (("x", (2, 8, 5, 6, 7)), ("residual", (2, 16, 7, 8, 9)))
    )
    eager = Residual().to(DEVICE)
    fast = fxfuse.optimize(copy.deepcopy(eager))
    fast(x.clone(), r.clone())
    with ops.watch() as runs:
        got = fast(x, r)
    assert {r.path for r in runs} <= {Path.REWRITTEN}
    assert relative_error(got, copy.deepcopy(eager).double()(x.double(), r.double())) < LIMIT["tf32"]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "batch"])
def test_an_empty_batch(kind: str) -> None:
    case = Case.of(kind, "tf32")
    case.fast(case.input())
    x = case.input()[:0]
    try:
        expected = case.eager(x)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            case.fast(x)
        return
    got = case.fast(x)
    assert got.shape == expected.shape and got.stride() == expected.stride() and got.dtype is expected.dtype


# --- more than 32 bits count ----------------------------------------------------------------------
def worst(got: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value, without another large copy."""
    assert got.shape == exact.shape and bool(got.isfinite().all())
    return float((got.float() - exact).abs_().max() / exact.abs().max())


def check_samples(model: nn.Module, got: Tensor, x: Tensor, *slices: slice, limit: float = 5e-3) -> None:
    """Samples of a result that do not depend on others, against eager mode in float32."""
    exact = copy.deepcopy(model).float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in slices:
            assert worst(got[part], exact(x[part].float())) < limit, part


@pytest.mark.serial
@pytest.mark.usefixtures("most_memory")
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("chain", ["alone", "norm"])
def test_more_than_2_31_outputs(chain: str, layout: str) -> None:
    """4.5 GB of half precision, from a kernel; no step behind it takes so many, and torch runs the norm."""
    torch.manual_seed(0)
    stages: tuple[nn.Module, ...] = (nn.ReLU(),) if chain == "alone" else (nn.InstanceNorm3d(64), nn.ReLU())
    layer = nn.ConvTranspose3d(8, 64, 3, stride=2, padding=1, output_padding=1)
    model = Stages(*stages, layer=layer).to(DEVICE).half()
    x = torch.randn(5, 8, 96, 96, 96, device=DEVICE, dtype=torch.half)
    if layout == "last":
        x, model = x.contiguous(memory_format=LAST), model.to(memory_format=LAST)
    fast = fxfuse.optimize(copy.deepcopy(model), (x[:1, :, :8, :8, :8],))
    with ops.watch() as runs:
        got = fast(x)
    assert got.numel() > 2**31 and [r.path for r in runs] == [Path.KERNEL]
    assert "convolution, stored" in kinds_run()
    check_samples(model, got, x, slice(0, 1), slice(4, 5))


@pytest.mark.serial
@pytest.mark.usefixtures("most_memory")
@pytest.mark.parametrize("numerics", ["float16", "tf32", "ieee"])
def test_more_than_2_31_inputs(numerics: str) -> None:
    """2.36e9 of them, made rows of channels; a pool leaves an eighth of the outputs."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = numerics == "tf32"
    dtype = CLASSES[numerics][0]
    model = Stages(lambda y: F.max_pool3d(y, 2), layer=nn.ConvTranspose3d(64, 8, 2, stride=2)).to(DEVICE).to(dtype)
    x = torch.empty(9, 64, 160, 160, 160, device=DEVICE, dtype=dtype)
    x.normal_()
    fast = fxfuse.optimize(copy.deepcopy(model), (x[:1, :, :8, :8, :8],))
    with ops.watch() as runs:
        got = fast(x)
    assert x.numel() > 2**31 and [r.path for r in runs] == [Path.KERNEL]
    assert "convolution, maximum" in kinds_run()
    check_samples(model, got, x, slice(0, 1), slice(8, 9), limit=1e-5 if numerics == "ieee" else 5e-3)


SAMPLES: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], ...]] = {
    "map": (F.silu,),
    "pool": (F.silu, lambda y: F.max_pool3d(y, 2)),
    "fold": (lambda y: y.softmax(1), F.silu),
    "norm": (F.silu, nn.GroupNorm(4, 16), F.relu),
}


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("samples", [65535, 70000])
@pytest.mark.parametrize("chain", SAMPLES)
def test_more_samples_than_a_grid_has_rows(chain: str, samples: int, layout: str) -> None:
    """Up to 65535 the convolution is a kernel; beyond, steps behind torch's, but maps where channels are neighbours."""
    torch.manual_seed(0)
    model = Stages(*SAMPLES[chain], layer=nn.ConvTranspose3d(8, 16, 2)).to(DEVICE)
    x = torch.randn(samples, 8, 2, 3, 3, device=DEVICE)
    if layout == "last":
        x, model = x.contiguous(memory_format=LAST), model.to(memory_format=LAST)
    try:
        model(x)
    except RuntimeError as error:
        pytest.skip(f"torch's own refuses it: {error}")
    fast = fxfuse.optimize(copy.deepcopy(model), (x[:2],))
    with ops.watch() as runs:
        got = fast(x)
    by_torch = samples > 65535 and layout == "last" and chain == "map"
    assert [r.path for r in runs] == [Path.REWRITTEN if by_torch else Path.KERNEL]
    assert ("convolution" in kinds_run()) == (samples <= 65535)
    check_samples(model, got, x, slice(0, 50), slice(65500, 65535), slice(samples - 50, samples))
