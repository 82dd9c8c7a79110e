"""Which calls run as a graph, and which do not, of addresses and graphs that are made up; and what a capture does."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fxfuse.kernels.runtime import graphs, launch, memory, replays
from fxfuse.kernels.runtime.launch import CudaError
from fxfuse.kernels.runtime.replays import Output, Replays

FORM = (4,), (1,), torch.float32
#: calls until a graph is there: one is measured, one is known, one is captured
FIRST = 3


class Fake:
    def __init__(self, start: Callable[[], int]) -> None:
        self.start = start


class Machine:
    """What a region's kernels run on. ``log``: what a call did; ``outputs``: handed out one after the other."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream, self.captured, self.capturing = 7, False, False
        self.outputs = [torch.empty(4)]
        self.room, self.torchs = 1000, False
        self.fails: Exception | None = None
        self.running: Callable[[], object] = lambda: None
        self.graphs: list[weakref.ref[Any]] = []

    def allocate(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if (shape, strides, dtype) != FORM:
            return torch.empty_strided(shape, strides, dtype=dtype)
        self.outputs.append(self.outputs.pop(0))
        return self.outputs[-1].view(4)  # nobody else has it

    def queue(self, inputs: Sequence[Tensor], given: dict[str, Tensor]) -> list[Tensor]:
        """The region's kernels, one by one: the sum of two inputs, by way of memory of their own."""
        between = memory.empty((self.room,), (1,), torch.uint8)
        assert between.numel() == self.room
        if self.torchs:
            torch.ones(3)
        if self.capturing:
            return [given["y"]]
        self.log.append("queue")
        with _disable_current_modes():  # it stands for a kernel
            torch.add(inputs[0], inputs[1], out=given["y"])
        return [given["y"]]

    def capture(self, queue: Callable[[], list[Tensor]], device: int, stream: int, room: Tensor) -> Any:
        assert (device, stream) == (0, self.stream) and room.numel() % replays.ROOMS == 0
        self.log.append("capture")
        if self.fails is not None:
            raise self.fails
        self.capturing = True
        try:
            queue()
        finally:
            self.capturing = False
        return self._graph()

    def _graph(self) -> Any:
        places = self.places
        ran: list[int] = []

        def start() -> int:
            assert not ran, "two threads have a graph at a time"
            ran.append(1)
            self.log.append("replay")
            self.running()
            x, w, y = (_at(p) for p in places)
            torch.add(x, w, out=y)
            ran.pop()
            return 0

        graph = Fake(start)
        self.graphs.append(weakref.ref(graph))
        return graph

    #: of the tensors of the call
    places: tuple[int, ...] = ()


_known: dict[int, Any] = {}


def _at(place: int) -> Tensor:
    """What lies at an address, as a graph has it: it holds no tensor."""
    found = _known[place]()
    assert found is not None
    return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setattr(memory, "allocate", made.allocate)
    monkeypatch.setattr(memory, "empty", made.allocate)
    monkeypatch.setattr(graphs, "capture", made.capture)
    monkeypatch.setattr(graphs, "relaxed", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "elsewhere", lambda call: call())
    monkeypatch.setattr(launch, "stream_of", lambda _: made.stream)
    monkeypatch.setattr(replays, "capturing", lambda: made.captured)
    monkeypatch.setattr(replays, "_rooms", {})
    yield made
    _known.clear()


class Region:
    """Two inputs that stay where they are, and calls with them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.replays = Replays(0, 2, [Output("y", *FORM)])
        self.x, self.w = torch.randn(4), torch.randn(4)

    def call(self, x: Tensor | None = None) -> str:
        """What a call did; its result is right."""
        x = self.x if x is None else x
        machine = self.machine
        turn = machine.outputs[0]
        machine.places = x.data_ptr(), self.w.data_ptr(), turn.data_ptr()
        for t in (x, self.w, turn):
            _known[t.data_ptr()] = weakref.ref(t)
        turn.fill_(float("nan"))
        machine.log.clear()
        if self.replays.run is None:
            made = machine.queue([x, self.w], {"y": machine.allocate(*FORM)})
        else:
            made = self.replays.run(machine.queue, [x, self.w], self.replays)
        assert len(made) == 1 and made[0].data_ptr() == turn.data_ptr()
        assert torch.equal(made[0], x + self.w)
        return " ".join(machine.log)

    def settle(self) -> None:
        for _ in range(FIRST + len(self.machine.outputs) * 2):
            self.call()
        assert self.call() == "replay"


@pytest.fixture
def region(machine: Machine) -> Region:
    return Region(machine)


# --- which calls ------------------------------------------------------------------------------------
def test_a_call_that_comes_again(region: Region) -> None:
    told = [region.call() for _ in range(6)]
    assert told == ["queue", "queue", "capture replay", "replay", "replay", "replay"]


def test_every_place_has_a_graph(region: Region) -> None:
    """Of each input, each output, and each stream."""
    region.settle()
    machine, xs = region.machine, [torch.randn(4) for _ in range(2)]
    assert [region.call(x) for x in (*xs, *xs, *xs)] == ["queue"] * 2 + ["capture replay"] * 2 + ["replay"] * 2
    weights = region.w
    region.w = torch.randn(4)
    assert [region.call() for _ in range(3)] == ["queue", "capture replay", "replay"]
    region.w = weights
    machine.outputs.append(torch.empty(4))
    told = [region.call() for _ in range(4)]
    assert sorted(told) == ["capture replay", "queue", "replay", "replay"]
    machine.outputs.pop(1 if machine.outputs[0] is machine.outputs[-1] else 0)
    machine.stream = 8
    for _ in range(4):
        region.call()
    assert region.call() == "replay"
    assert {stream for _, stream in replays._rooms} == {7, 8}


def test_what_lies_there_is_read_when_it_runs(region: Region) -> None:
    region.settle()
    for _ in range(3):
        region.x.normal_(), region.w.mul_(-2)
        assert region.call() == "replay"


def test_a_users_capture_runs_no_graph(region: Region) -> None:
    machine = region.machine
    machine.captured = True
    assert [region.call() for _ in range(5)] == ["queue"] * 5
    machine.captured = False
    region.settle()
    machine.captured = True
    assert [region.call() for _ in range(3)] == ["queue"] * 3
    machine.captured = False
    assert region.call() == "replay"  # it is still there


def test_switched_off_while_it_runs(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    region.settle()
    with monkeypatch.context() as patch:
        patch.setenv("FXFUSE_GRAPHS", "0")
        assert [region.call() for _ in range(4)] == ["queue"] * 4
        assert [region.call(x) for x in [torch.randn(4)] * 4] == ["queue"] * 4
        assert not replays.wanted(torch.device("cuda:0"))
    assert region.call() == "replay"
    assert replays.wanted(torch.device("cuda:0")) and not replays.wanted(torch.device("cpu"))


def test_threads_do_not_share_a_graph(region: Region) -> None:
    """While one has it the other one goes without, and captures none either; then it is there again."""
    region.settle()
    machine, inside, go = region.machine, threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go.wait(10)

    machine.running = wait
    results: list[list[Tensor]] = []
    assert region.replays.run is not None
    call = region.replays.run
    thread = threading.Thread(target=lambda: results.append(call(machine.queue, [region.x, region.w], region.replays)))
    thread.start()
    assert inside.wait(10)
    machine.running = lambda: None
    try:
        machine.log.clear()
        other = call(machine.queue, [region.x, region.w], region.replays)
        assert machine.log == ["queue"]
    finally:
        go.set()
        thread.join()
    assert torch.equal(results[0][0], other[0])
    assert region.call() == "replay"


def test_while_another_thread_captures_calls_go_without(region: Region) -> None:
    with replays._one_at_a_time:
        assert [region.call() for _ in range(5)] == ["queue"] * 5
    region.settle()
    with replays._one_at_a_time:
        assert region.call() == "replay"


# --- how many ---------------------------------------------------------------------------------------
def test_graphs_are_few(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST_GRAPHS", 3)
    xs = [torch.randn(4) for _ in range(5)]
    region.call()
    for _ in range(3):
        told = [region.call(x) for x in xs]
    assert told == ["replay"] * 3 + ["queue"] * 2


def test_known_calls_are_few(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST_SEEN", 2)
    xs = [torch.randn(4) for _ in range(3)]
    region.call()
    for _ in range(4):
        assert [region.call(x) for x in xs] == ["queue"] * 3  # the first one is forgotten when it comes again
        assert len(region.replays._seen) == 2
    assert [region.call(xs[2]) for _ in range(2)] == ["capture replay", "replay"]


def test_tensors_that_lie_elsewhere_in_every_call(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many of them nothing is looked up any more."""
    monkeypatch.setattr(replays, "PATIENCE", 8)
    held = []
    for _ in range(8 * replays.STRIKES):
        held.append(torch.randn(4))
        assert region.replays.run is not None
        assert region.call(held[-1]) == "queue"
    assert region.replays.run is None
    assert [region.call() for _ in range(5)] == ["queue"] * 5


def test_graphs_that_no_call_has_any_more_are_dropped(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "PATIENCE", 8)
    monkeypatch.setattr(replays, "MOST_GRAPHS", 4)
    monkeypatch.setattr(replays, "LEAST_REPLAYS", 1)
    region.settle()
    old, used, held = [torch.randn(4) for _ in range(2)], region.x, []
    for x in old * 3:
        region.call(x)
    assert sum(g() is not None for g in region.machine.graphs) == 3
    for _ in range(17):  # two times eight calls without one, among which one graph is used
        held.append(torch.randn(4))
        assert region.call(held[-1]) == "queue"
        assert region.call(used) == "replay"
    gc.collect()
    assert [g() is not None for g in region.machine.graphs] == [True, False, False]
    assert region.replays.run is not None
    for x in old:
        assert [region.call(x) for _ in range(3)] == ["queue", "capture replay", "replay"]


def test_captures_are_worth_it(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many, and another one for many calls that were replayed."""
    monkeypatch.setattr(replays, "MOST_CAPTURES", 2)
    monkeypatch.setattr(replays, "REPLAYS_PER_CAPTURE", 10)
    xs = [torch.randn(4) for _ in range(4)]
    region.call()
    for _ in range(3):
        told = [region.call(x) for x in xs]
    assert told == ["replay"] * 2 + ["queue"] * 2
    for _ in range(10):
        region.call(xs[0])
    assert [region.call(x) for x in xs[2:] * 2] == ["capture replay", "queue", "replay", "queue"]


# --- what fails, and what is held -------------------------------------------------------------------
@pytest.mark.parametrize("error", [CudaError("no"), torch.OutOfMemoryError("no"), graphs.UncapturableError("aten.add")])
def test_what_cannot_be_captured_goes_without(
    region: Region, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    region.machine.fails = error
    with caplog.at_level(logging.DEBUG, "fxfuse.kernels.runtime.replays"):
        assert [region.call() for _ in range(2)] == ["queue"] * 2
        assert region.call() == "capture queue"
        assert region.replays.run is None
    assert [r.levelname for r in caplog.records] == ["DEBUG"] and str(error) in caplog.text
    assert memory.empty == region.machine.allocate  # nothing stands in for it any more
    assert not replays._one_at_a_time.locked()


def test_torchs_operators_go_without(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    region.machine.torchs = True
    with caplog.at_level(logging.DEBUG, "fxfuse.kernels.runtime.replays"):
        assert [region.call() for _ in range(4)] == ["queue"] * 4
    assert region.replays.run is None and "aten.ones" in caplog.text


def test_an_interrupted_capture_leaves_all_as_it_was(region: Region) -> None:
    region.machine.fails = KeyboardInterrupt()  # type: ignore[assignment]
    region.call(), region.call()
    with pytest.raises(KeyboardInterrupt):
        region.call()
    assert memory.empty == region.machine.allocate and not replays._one_at_a_time.locked()
    region.machine.fails = None
    region.settle()


def test_a_graph_that_cannot_be_queued_is_an_error(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(CUresult=int, cuGetErrorString=lambda status: (0, f"status {status}".encode()))
    monkeypatch.setattr(launch, "_driver", lambda: told)
    region.settle()
    (graph,) = (g for g in region.replays.graphs.values() if g is not None)
    graph.start = lambda: 700
    with pytest.raises(CudaError, match=r"^cuGraphLaunch: status 700$"):
        region.call()


def test_much_memory_is_not_held(region: Region, caplog: pytest.LogCaptureFixture) -> None:
    region.machine.room = replays.MOST_HELD + 1
    with caplog.at_level(logging.DEBUG, "fxfuse.kernels.runtime.replays"):
        assert [region.call() for _ in range(5)] == ["queue"] * 5
    assert region.replays.run is None and not replays._rooms and "bytes for themselves" in caplog.text


def test_regions_of_a_stream_share_a_room(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Region(machine), Region(machine)
    first.settle()
    (small,) = replays._rooms.values()
    machine.room = replays.ROOMS  # of the second region alone
    second.settle()
    machine.room = 1000
    (room,) = replays._rooms.values()
    assert room.numel() == 1 * replays.ROOMS and room is small
    third = Region(machine)
    machine.room = replays.ROOMS + 1
    third.settle()
    assert [r.numel() for r in replays._rooms.values()] == [2 * replays.ROOMS]
    monkeypatch.setattr(replays, "MOST_STREAMS", 2)
    machine.stream = 8
    third.settle()
    machine.stream = 9
    assert [third.call() for _ in range(5)] == ["queue"] * 5
    machine.stream = 8
    assert third.call() == "replay"


def test_what_is_forgotten(region: Region) -> None:
    """Graphs and rooms go; nothing keeps inputs and results in the first place."""
    machine = region.machine
    gone = []
    for _ in range(3):
        x = torch.randn(4)
        for _ in range(FIRST):
            region.call(x)
        gone.append(weakref.ref(x))
        del x
    assert [one() for one in gone] == [None] * 3
    assert any(g() is not None for g in machine.graphs)
    replays.forget()
    gc.collect()
    assert [g() for g in machine.graphs] == [None] * len(machine.graphs)
    assert not replays._rooms
    region.settle()


# --- memory ---------------------------------------------------------------------------------------
def test_parts_of_a_room() -> None:
    room = torch.zeros(5 * memory.ALIGNMENT, dtype=torch.uint8)
    parts, count = memory.Parts(room), memory.Counted()
    forms: list[Any] = [
        ((3, 5), (5, 1), torch.float32), ((0, 4), (4, 1), torch.float16), ((2, 3, 4), (12, 1, 3), torch.float64),
        ((), (), torch.uint8), ((513,), (1,), torch.uint8),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "allocate", lambda s, t, d: torch.empty_strided(s, t, dtype=d))
        made = [parts(*form) for form in forms]
        for form in forms:
            count(*form)
    assert parts.end == count.size == room.numel()
    for number, (tensor, (shape, strides, dtype)) in enumerate(zip(made, forms, strict=True)):
        assert (tuple(tensor.shape), tensor.stride(), tensor.dtype) == (shape, strides, dtype)
        assert (tensor.data_ptr() - room.data_ptr()) % memory.ALIGNMENT == 0 or not tensor.numel()
        tensor.fill_(number + 1)
    for number, tensor in enumerate(made):
        assert (tensor == number + 1).all()
    with pytest.raises(MemoryError):
        parts((1,), (1,), torch.uint8)


def test_memory_of_another_thread_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "empty", lambda *_: "torch's")
    found: list[Any] = []
    with memory.instead(lambda *_: "ours"):  # type: ignore[arg-type, return-value]
        found.append(memory.empty((1,), (1,), torch.uint8))
        thread = threading.Thread(target=lambda: found.append(memory.empty((1,), (1,), torch.uint8)))
        thread.start(), thread.join()
    found.append(memory.empty((1,), (1,), torch.uint8))
    assert found == ["ours", "torch's", "torch's"]


# --- a capture --------------------------------------------------------------------------------------
class Driver:
    """The driver's functions; ``fails`` names one that does not succeed. ``log``: what was called, and with what."""

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_RELAXED = "relaxed"

    CUresult = CUstream = int

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails = ""

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        made = {
            "cuThreadExchangeStreamCaptureMode": ("global",), "cuStreamGetPriority": (-1,),
            "cuStreamCreateWithPriority": (64,), "cuStreamEndCapture": ("graph",), "cuGraphInstantiate": (4096,),
            "cuGetErrorString": (b"it failed",),
        }.get(name, ())  # fmt: skip

        def call(*told: Any) -> tuple[Any, ...]:
            if name != "cuGetErrorString":
                self.log.append(f"{name.removeprefix('cu')} {' '.join(map(str, told))}")
            return (1, *[None for _ in made]) if name == self.fails else (0, *made)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: made)
    monkeypatch.setattr(launch, "bind_context", lambda: None)
    monkeypatch.setattr(launch, "function", lambda name: lambda *told: len(told))
    monkeypatch.setattr(launch, "pointer", lambda handle: handle)
    graphs._side.cache_clear()
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: f"{handle} on {device}")

    @contextlib.contextmanager
    def stream(which: str) -> Iterator[None]:
        made.log.append(f"to {which}")
        try:
            yield
        finally:
            made.log.append("back")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    yield made
    graphs._side.cache_clear()


def captured(driver: Driver, queue: Callable[[], object]) -> graphs.Graph:
    with graphs.relaxed():
        return graphs.capture(queue, 0, 7, torch.empty(0))


SIDE = ["ThreadExchangeStreamCaptureMode relaxed", "StreamGetPriority 7", "StreamCreateWithPriority 1 -1", "to 64 on 0"]


def test_what_a_capture_does(driver: Driver) -> None:
    graph = captured(driver, lambda: driver.log.append("kernels"))
    assert driver.log == [
        *SIDE, "StreamBeginCapture 64 relaxed", "kernels", "StreamEndCapture 64", "back", "GraphInstantiate graph 0",
        "GraphDestroy graph", "ThreadExchangeStreamCaptureMode global",
    ]  # fmt: skip
    assert graph.start() == 2
    driver.log.clear()
    del graph
    assert driver.log == ["GraphExecDestroy 4096"]
    captured(driver, lambda: None)
    assert "StreamCreateWithPriority 1 -1" not in driver.log  # it is there


def test_what_a_capture_leaves_behind_where_it_fails(driver: Driver) -> None:
    def torchs() -> None:
        torch.ones(3) + 1

    with pytest.raises(graphs.UncapturableError, match=r"aten\.ones"):
        captured(driver, torchs)
    assert driver.log[-4:] == [
        "StreamEndCapture 64",
        "GraphDestroy graph",
        "back",
        "ThreadExchangeStreamCaptureMode global",
    ]
    for name, last in (
        ("cuStreamBeginCapture", ["StreamBeginCapture 64 relaxed", "back"]),
        ("cuStreamEndCapture", ["StreamEndCapture 64", "back"]),
        ("cuGraphInstantiate", ["back", "GraphInstantiate graph 0", "GraphDestroy graph"]),
    ):
        driver.fails = name
        driver.log.clear()
        with pytest.raises(CudaError, match=f"^{name}: it failed$"):
            captured(driver, lambda: None)
        assert driver.log[-1 - len(last) :] == [*last, "ThreadExchangeStreamCaptureMode global"]
    driver.fails = "cuStreamEndCapture"  # the capture was invalidated, and that is how it shows
    with pytest.raises(ValueError, match="first"):
        captured(driver, lambda: (_ for _ in ()).throw(ValueError("the first error is told")))
    assert driver.log[-2:] == ["back", "ThreadExchangeStreamCaptureMode global"]


def test_what_stays_is_allocated_in_a_thread_of_its_own(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same stream; what fails there fails here."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "this stream")
    here, threads = threading.get_ident(), list[int]()

    def call() -> Tensor:
        threads.append(threading.get_ident())
        driver.log.append("allocates")
        return torch.zeros(2)

    assert graphs.elsewhere(call).numel() == 2
    assert here not in threads
    mode = "ThreadExchangeStreamCaptureMode"
    assert driver.log == ["to this stream", f"{mode} relaxed", "allocates", f"{mode} global", "back"]

    def fails() -> Tensor:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.elsewhere(fails)


def test_copies_lie_in_memory_for_kernels() -> None:
    x, room = torch.randn(3, 4), torch.zeros(4096, dtype=torch.uint8)
    parts = memory.Parts(room)
    with memory.instead(parts), graphs.Copies():
        assert x.unsqueeze(0).view(torch.int32).data_ptr() == x.data_ptr()
        assert parts.end == 0
        made = [
            x.t().contiguous(), x[:, ::2].clone(), x.t().clone(), x.clone(memory_format=torch.contiguous_format),
            torch.empty_strided((4, 3), (1, 4), dtype=torch.float64).copy_(x.t()),
        ]  # fmt: skip
        for work in (lambda: x + 1, lambda: x.sum(), lambda: x.add_(1), lambda: torch.rand(2), lambda: x.double()):
            with pytest.raises(graphs.UncapturableError):
                work()
    assert parts.end == len(made) * memory.ALIGNMENT
    expected = [
        x.t().contiguous(), x[:, ::2].clone(), x.t().clone(), x.clone(memory_format=torch.contiguous_format),
        torch.empty_strided((4, 3), (1, 4), dtype=torch.float64).copy_(x.t()),
    ]  # fmt: skip
    for number, (tensor, like) in enumerate(zip(made, expected, strict=True)):
        assert tensor.data_ptr() - room.data_ptr() == number * memory.ALIGNMENT
        assert torch.equal(tensor, like) and tensor.dtype is like.dtype and tensor.stride() == like.stride()
