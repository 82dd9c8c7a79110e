"""Calls that run as a CUDA graph: the bits of launches one by one, whatever changes between them, and whoever calls."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from place import CUDA, DEVICE, kernels_always, needs, needs_gpu
from stages import LAST, Stages, made, sample, trained
from torch import Tensor, nn

import fxfuse
from fxfuse import ops
from fxfuse.kernels import execute
from fxfuse.kernels.runtime import replays
from fxfuse.kernels.runtime.prepared import Prepared

pytest.importorskip("cuda.bindings")
pytestmark = needs((9, 0))

#: calls with tensors in one place among which one is replayed: one is measured, one is known for each place that an
#: output has, and then captured
SETTLED = 8
CALLS = 12 if CUDA else 3


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels_always(twice="twice" in request.node.name, graphs=True):
        yield


def layer(channels: int = 8, out: int = 16, dtype: torch.dtype = torch.float32) -> nn.Module:
    return made(3, channels, out, 3, stride=2, padding=1, dtype=dtype)


def halved(y: Tensor) -> Tensor:
    return F.avg_pool3d(F.avg_pool3d(y, 2), 2)


#: what is launched, and the shape of x
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pool": (lambda: Stages(layer(), F.leaky_relu, nn.MaxPool3d(2)), (3, 8, 4, 5, 6)),
    "rows": (lambda: Stages(layer(24), F.silu), (3, 24, 4, 5, 6)),
    "reduction": (lambda: Stages(layer(), lambda y: y.softmax(1).sigmoid()), (2, 8, 4, 5, 6)),
    "statistics": (lambda: trained(layer(), "group", F.silu), (3, 8, 4, 5, 6)),
    "running statistics": (lambda: trained(layer(), "batch", F.hardswish), (3, 8, 4, 5, 6)),
    "folded": (lambda: trained(layer(), "batch", F.relu).eval(), (3, 8, 4, 5, 6)),
    "means": (lambda: trained(layer(4), halved), (3, 4, 4, 4, 4)),
    "means of a folded norm": (lambda: trained(layer(3), "batch", halved).eval(), (3, 3, 4, 4, 4)),
    "a mean of all": (lambda: trained(layer(4), lambda y: y.mean((2, 3, 4))), (3, 4, 4, 4, 4)),
    "products, twice": (lambda: trained(layer(3), "batch", halved), (3, 3, 4, 4, 4)),
    "two runs, twice": (lambda: trained(layer(), F.silu, "instance", F.hardswish), (3, 8, 4, 5, 6)),
    "2-D, float16, channels last": (
        lambda: trained(made(2, 8, 16, 3, stride=2, dtype=torch.float16), "instance", F.silu).to(memory_format=LAST[4]),
        (3, 8, 6, 7),
    ),
}  # fmt: skip
#: an emulated GPU is slow
EMULATED = (
    "pool", "statistics", "running statistics", "means of a folded norm", "a mean of all", "products, twice",
    "two runs, twice",
)  # fmt: skip


def counts() -> tuple[int, int]:
    """Captures, and calls that were replayed, of what is prepared."""
    found = [p.replays for p in execute._prepared.values() if p is not None and p.replays is not None]
    return sum(r._captures for r in found), sum(r._replayed() for r in found)


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """The bits of the result of a call that a graph runs: where torch's allocator has another place for results than
    before, of one of the next calls.
    """
    for _ in range(SETTLED):
        before = counts()[1]
        found = bits(call())
        if counts()[1] > before:
            return found
    pytest.fail("no graph runs it")


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16).cpu()


def same(a: Tensor, b: Tensor) -> bool:
    """Of bits, or of results."""
    return torch.equal(*(t if t.dtype in (torch.int32, torch.int16) else bits(t) for t in (a, b)))


class Case:
    """A model of those above, its optimised twin, whose kernels are prepared, and an x that stays where it is."""

    def __init__(self, name: str) -> None:
        make, self.shape = CASES[name]
        torch.manual_seed(3)
        self.model = make().to(DEVICE)
        self.dtype = next(self.model.parameters()).dtype
        self.fast = fxfuse.optimize(self.model)
        self.x = self.input(0)
        with torch.no_grad():
            for _ in range(2):  # captured from the model, and prepared
                self.fast(self.x)

    def input(self, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(self.shape).to(DEVICE, self.dtype)
        x = x * 4.0 ** (seed % 5 - 2) if self.dtype is torch.float32 else x
        return x.contiguous(memory_format=LAST[4]) if len(self.shape) == 4 else x

    @torch.no_grad()
    def settle(self) -> Case:
        self.settle_with(self.x)
        replayed(lambda: self.fast(self.x))
        return self

    @torch.no_grad()
    def settle_with(self, x: Tensor) -> None:
        for _ in range(SETTLED):
            bits(self.fast(x))

    @torch.no_grad()
    def plain(self, x: Tensor) -> Tensor:
        """What kernels that are prepared give without graphs; the model's buffers stay."""
        kept = [b.clone() for b in self.model.buffers()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FXFUSE_GRAPHS", "0")
            before = counts()
            found = self.fast(x)
            assert counts() == before
        for b, was in zip(self.model.buffers(), kept, strict=True):
            b.copy_(was)
        return found


# --- the same bits --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n if n in EMULATED else pytest.param(n, marks=needs_gpu) for n in CASES])
@torch.no_grad()
def test_the_same_bits(name: str) -> None:
    """Inputs, the results and the buffers behind them, of calls with x in one place."""
    case = Case(name).settle()
    state = copy.deepcopy(case.model.state_dict())
    found = []
    for graphs in ("1", "0"):
        case.model.load_state_dict(state)
        results = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FXFUSE_GRAPHS", graphs)
            before = counts()[1]
            for turn in range(CALLS):
                case.x.copy_(case.input(turn))
                results.append(bits(case.fast(case.x)))
            ran = counts()[1] - before
            assert ran >= CALLS // 2 if graphs == "1" else ran == 0
        found.append([*results, *[b.clone() for b in case.model.buffers()]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])


@needs_gpu
@pytest.mark.parametrize("name", ["rows", "statistics", "products, twice"])
@torch.no_grad()
def test_memory_is_as_it_comes(name: str) -> None:
    """Of results, which are freed full of NaN, and of what kernels have for themselves."""
    case = Case(name).settle()
    expected = case.plain(case.x)
    for value in (float("nan"), 1e30, 0.0):
        y = case.fast(case.x)
        y.fill_(value)
        del y
        assert same(replayed(lambda: case.fast(case.x)), expected)
        for room in replays._rooms.values():
            room.fill_(0xFF if value else 0)


# --- what changes -----------------------------------------------------------------------------------
def step(case: Case) -> None:
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1.0)
    for p in case.model.parameters():
        p.grad = torch.linspace(-1, 1, p.numel(), device=DEVICE, dtype=p.dtype).view(p.shape)
    optimizer.step()


def write(case: Case) -> None:
    for p in case.model.parameters():
        p.data.mul_(-1.5)


def move(case: Case) -> None:
    for p in case.model.parameters():
        p.data = p.data.flip(0).clone()


def other_strides(case: Case) -> None:
    """A parameter in the place of another, of the same shape, that reads the same memory in another way."""
    weight = case.model.parts[0].weight
    order = (*range(2, weight.dim()), 0, 1)
    with torch.no_grad():
        strides = torch.empty([weight.shape[i] for i in order], device="meta").stride()
        there = [strides[order.index(i)] for i in range(weight.dim())]
        case.model.parts[0].weight = nn.Parameter(weight.detach().as_strided(weight.shape, there))
    assert case.model.parts[0].weight.data_ptr() == weight.data_ptr()


def special(case: Case) -> None:
    case.x[0, 1, 2, 3] = float("nan")
    case.x[1, 2, 1, 1] = 1e30


CHANGES = {f.__name__: f for f in (step, write, move, other_strides, special)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["means of a folded norm", *(pytest.param(n, marks=needs_gpu) for n in ("pool", "statistics"))]
)
@torch.no_grad()
def test_what_lies_there_is_read_when_a_graph_runs(name: str, change: str) -> None:
    case = Case(name).settle()
    before = bits(case.fast(case.x))
    with torch.enable_grad():
        CHANGES[change](case)
    if change in (move.__name__, other_strides.__name__):
        case.settle()  # elsewhere, or with kernels that are prepared anew
    for _ in range(3):
        ran = replayed(lambda: case.fast(case.x))
        assert same(ran, case.plain(case.x))
    assert not torch.equal(ran, before)
    got, truth = case.fast(case.x), copy.deepcopy(case.model).double()(case.x.double())
    torch.testing.assert_close(got.double(), truth, rtol=2e-2, atol=2e-2, equal_nan=True)


@torch.no_grad()
def test_other_forms_in_the_same_place() -> None:
    case = Case("pool").settle()
    n, c, d, h, w = case.shape
    for shape in ((n, c, d, w, h), (1, c, n * d, h, w), (2 * n, c, d // 2, h, w), case.shape):
        x = case.x.view(shape)
        case.settle_with(x)
        for _ in range(3):
            assert same(replayed(lambda x=x: case.fast(x)), case.plain(x))
        torch.testing.assert_close(case.fast(x), case.model(x), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_tensors_that_lie_elsewhere_every_time() -> None:
    case, held = Case("pool").settle(), []
    before = counts()
    for seed in range(20):
        x = case.input(seed)
        held += [x, case.fast(x)]
        assert same(held[-1], case.plain(x))
    assert counts() == before
    assert same(replayed(lambda: case.fast(case.x)), case.plain(case.x))


@torch.no_grad()
def test_regions_have_one_room() -> None:
    """What a graph leaves there is nothing to the other one's."""
    cases = [Case(n).settle() for n in ("pool", "statistics")]
    for _ in range(3):
        for case in cases:
            assert same(replayed(lambda c=case: c.fast(c.x)), case.plain(case.x))
    assert len(replays._rooms) == 1
    execute.forget()
    assert not replays._rooms


# --- who calls ------------------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("name", ["rows", "statistics"])
@torch.no_grad()
def test_a_users_capture_has_kernels_of_its_own(name: str) -> None:
    """Its graph runs whenever the user likes, at the same time as ours, and has no room in common with them."""
    case = Case(name).settle()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.settle()
        graph, before = torch.cuda.CUDAGraph(), counts()
        with torch.cuda.graph(graph, stream=side):
            held = case.fast(case.x)
        assert counts() == before
        replayed(lambda: case.fast(case.x))
    torch.cuda.synchronize()
    expected = case.plain(case.x)
    for _ in range(20):
        with torch.cuda.stream(side):
            graph.replay()
        found = replayed(lambda: case.fast(case.x))
        torch.cuda.synchronize()
        assert same(found, expected) and same(held, expected)
        held.zero_()


@needs_gpu
@torch.no_grad()
def test_streams_have_rooms_of_their_own() -> None:
    case = Case("statistics")
    xs = [case.input(seed) for seed in range(3)]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    expected = [case.plain(x) for x in xs]
    torch.cuda.synchronize()
    before = counts()[1]
    for _ in range(50):
        found = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(case.fast(x))
        torch.cuda.synchronize()
        assert all(map(same, found, expected))
        del found
    assert counts()[1] - before > 100
    assert len({room.data_ptr() for room in replays._rooms.values()}) == 3


@needs_gpu
@pytest.mark.parametrize("own", [False, True], ids=["one stream", "streams"])
def test_threads(own: bool) -> None:
    """With the same x: of a graph's calls one thread has it, the others do without."""
    case = Case("statistics").settle()
    expected = case.plain(case.x)
    torch.cuda.synchronize()
    before = counts()[1]

    def work(_: int) -> bool:
        stream = torch.cuda.Stream() if own else torch.cuda.current_stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            good = True
            for turn in range(100):
                y = case.fast(case.x)
                if turn % 10 == 9:
                    stream.synchronize()
                    good &= same(y, expected)
                del y
            return good

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert counts()[1] > before


@needs_gpu
def test_captures_are_unseen_by_other_threads() -> None:
    """They draw random numbers, empty the cache, and capture graphs in the meantime."""
    case, stop, failed = Case("pool").settle(), threading.Event(), list[Exception]()
    y = torch.zeros(1000, device=DEVICE)

    def beside() -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    F.dropout(y, 0.5)
                    torch.cuda.empty_cache()
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(capture_error_mode="thread_local")
                    y.add_(1)
                    F.dropout(y, 0.5)
                    graph.capture_end()
                    graph.replay()
        except Exception as error:  # noqa: BLE001 - whatever it is
            failed.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        with torch.no_grad():
            before = counts()[0]
            for seed in range(40):
                x = case.input(seed)
                expected = case.plain(x)
                for _ in range(4):
                    assert same(case.fast(x), expected)
            assert counts()[0] > before
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


@needs_gpu
@torch.no_grad()
def test_a_capture_beside_a_global_one() -> None:
    """A user's capture forbids other threads what is unsafe; ours goes on all the same, and does not end it."""
    case, started, done = Case("pool").settle(), threading.Event(), threading.Event()
    x = case.input(1)
    y, graph = torch.zeros(1000, device=DEVICE), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()

    def other() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            y.add_(1)
            started.set()
            done.wait(60)
            y.add_(1)
            graph.capture_end()

    thread = threading.Thread(target=other)
    thread.start()
    assert started.wait(60)
    try:
        before = counts()[0]
        for _ in range(6):
            got = case.fast(x)  # nothing here waits for the GPU
        assert counts()[0] > before
    finally:
        done.set()
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert same(got, case.plain(x)) and float(y[0]) == 2.0


# --- memory -----------------------------------------------------------------------------------------
@needs_gpu
@torch.no_grad()
def test_what_is_held() -> None:
    """A room for each stream, and nothing of inputs and results; nothing at all when graphs are forgotten."""
    gc.collect()
    case = Case("statistics")
    execute.forget()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(4):
        x = case.input(seed)
        for _ in range(SETTLED):
            y = case.fast(x)
        gone = [weakref.ref(x), weakref.ref(y)]
        del x, y
        assert [one() for one in gone] == [None, None]
    assert counts()[1] > 0
    held = torch.cuda.memory_allocated() - before
    assert 0 < held <= replays.ROOMS + 2**20, held
    execute.forget()
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 2**20


@needs_gpu
@torch.no_grad()
def test_a_room_is_in_no_pool() -> None:
    """That this thread's allocations go to for the moment: who has it may free all of it, or wait for that."""
    case, pool = Case("statistics"), torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        case.settle()
    (room,) = replays._rooms.values()
    segments = torch.cuda.memory_snapshot(pool.id)
    assert segments and all(not 0 <= room.data_ptr() - s["address"] < s["total_size"] for s in segments)
    assert same(replayed(lambda: case.fast(case.x)), case.plain(case.x))


@torch.no_grad()
def test_what_needs_much_memory_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST_HELD", 1024)
    case = Case("statistics")
    for _ in range(SETTLED):
        case.fast(case.x)
    assert counts() == (0, 0) and not replays._rooms


@torch.no_grad()
def test_without_elements_there_is_nothing_to_replay() -> None:
    case = Case("pool").settle()
    (made,) = (p for p in execute._prepared.values() if p is not None)
    with ops.watch() as runs:
        case.fast(case.x)
    parameters = [p.detach() for p in case.model.parameters()]
    for x, there in ((case.x, True), (case.x[:0], False)):
        given = runs[0].region.rewritten, made.schedule, made.convolution, x.device, None, [x, *parameters]
        assert (Prepared.of(*given).replays is not None) is there


@torch.no_grad()
def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_GRAPHS", "0")
    case = Case("pool")
    for _ in range(SETTLED):
        case.fast(case.x)
    assert [p.replays for p in execute._prepared.values() if p is not None] == [None]


@torch.no_grad()
def test_torchs_operators_are_in_no_graph() -> None:
    fast, x = (
        fxfuse.optimize(Stages(layer(), lambda y: y - y.norm(1, 1, True), lambda y: F.max_pool3d(y, 3))),
        sample(2, 8, 4, 5, 6),
    )
    for _ in range(3):
        fast(x)
    assert [p.replays for p in execute._prepared.values() if p is not None and p.asks_torch] == [None]


@pytest.mark.parametrize("what", ["x", "weight"])
@torch.no_grad()
def test_copies_are(what: str) -> None:
    """Of an x with holes, and of weights in another layout."""
    case = Case("pool")
    if what == "x":
        case.x = sample(*case.shape[:-1], 2 * case.shape[-1])[..., ::2]
    else:
        other_strides(case)
    case.settle()
    for _ in range(3):
        case.x.mul_(-1.5), case.model.parts[0].weight.data.add_(0.01)
        assert same(replayed(lambda: case.fast(case.x)), case.plain(case.x))
