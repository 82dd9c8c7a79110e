"""What a launch hands to the driver, on a machine without one: arguments in place, kept ones included, and threads."""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import execute, running
from fxfuse.kernels.convolution.emit import Epilogue
from fxfuse.kernels.convolution.kernels import KERNELS, Convolution
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.specialisation import Shared
from fxfuse.kernels.planning.observe import examples
from fxfuse.kernels.planning.schedule import schedule
from fxfuse.kernels.runtime import convolution_engine, launch, prepared, tail_engine
from fxfuse.kernels.runtime import memory as kernels_memory
from fxfuse.kernels.runtime.convolution_engine import Calls
from fxfuse.kernels.runtime.launch import Chain, CudaError, Kernel, Launch, sender
from fxfuse.kernels.runtime.prepared import Prepared
from fxfuse.kernels.stages.steps import Map, Torch
from fxfuse.program import Program

Call = tuple[str, tuple[int, ...], list[bytes]]


class Driver:
    """Keeps what is launched: the function, the grid, and the bytes of every argument as they lie at that moment.

    ``overlaps``: of each launch, whether it may begin before the one in front of it has ended.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.overlaps: list[bool] = []
        self.delay = 0.0
        self.sizes: dict[int, list[int]] = {}

    def start(self, config: Any, function: Any, pointers: Any, _: None) -> int:
        config, pointers = config._obj, pointers._obj
        assert config.stream == 77
        time.sleep(self.delay)  # a thread that fills the same buffer shows
        sizes = self.sizes[ctypes.addressof(pointers)]
        told = [ctypes.string_at(p, s) for p, s in zip(pointers, sizes, strict=True)]
        self.calls.append((function, tuple(config.grid), told))
        self.overlaps.append(bool(config.count))
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    started = Launch.__init__

    def make(self: Launch, kernel: Kernel, grid: Any, block: int, arguments: Any, shared: int = 0) -> None:
        started(self, kernel, grid, block, arguments, shared)
        at = ctypes.addressof(self.start.args[2]._obj)
        made.sizes[at] = getattr(kernel, "sizes", None) or [ctypes.sizeof(a) for a in arguments]

    monkeypatch.setattr(Launch, "__init__", make)
    monkeypatch.setattr(launch, "_launcher", lambda: made.start)
    monkeypatch.setattr(Kernel, "allow_shared", lambda self, size: None)
    for where in (convolution_engine, tail_engine):
        monkeypatch.setattr(where, "stream_of", lambda device: 77)
    return made


# --- parameters side by side ----------------------------------------------------------------------
def kernel(*sizes: int) -> Kernel:
    made = Kernel("kernel", overlaps=True)  # type: ignore[arg-type]
    made.sizes = list(sizes)  # type: ignore[attr-defined]
    return made


def test_every_parameter_has_a_place(driver: Driver) -> None:
    call = sender(kernel(8, 24, 4, 8, 12), 5, 128, "q", "qqii", "i", "d", "i8s")
    for first in (1, 2):
        call(77, first, 2, 3, 4, 5, 6, 0.5, 7, b"abc")
    for first, (function, grid, told) in zip((1, 2), driver.calls, strict=True):
        assert (function, grid) == ("kernel", (5, 1, 1))
        expected = ("<q", first), ("<qqii", 2, 3, 4, 5), ("<i", 6), ("<d", 0.5), ("<i8s", 7, b"abc")
        assert told == [struct.pack(*e) for e in expected]
    assert len(driver.sizes) == 1  # one buffer served both


def test_what_stays_as_it_is_is_no_value_of_a_call(driver: Driver) -> None:
    constant = struct.pack("<i", 9)
    call = sender(kernel(16, 4, 12, 4), 5, 128, ("q", constant, "i"), constant, ("i", constant, "f"), "i")
    for first in (1, 2):
        call(77, first, 3, 4, 0.5, 5)
    for first, (_, _, told) in zip((1, 2), driver.calls, strict=True):
        expected = ("<qii", first, 9, 3), ("<i", 9), ("<iif", 4, 9, 0.5), ("<i", 5)
        assert told == [struct.pack(*e) for e in expected]
    with pytest.raises(TypeError):
        call(77, 1, 3)


def test_threads_have_buffers_of_their_own(driver: Driver) -> None:
    call, driver.delay = sender(kernel(8), 1, 32, "q"), 2e-3
    threads = [threading.Thread(target=lambda n=n: [call(77, n) for _ in range(20)]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [struct.unpack("<q", told[0])[0] for _, _, told in driver.calls]
    assert sorted(seen) == sorted(n for n in range(6) for _ in range(20))


# --- what the driver is told ------------------------------------------------------------------------
def test_structs_are_the_drivers() -> None:
    theirs = pytest.importorskip("cuda.bindings.driver")
    attribute = theirs.CUlaunchAttribute()
    attribute.id = theirs.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    assert ctypes.string_at(attribute.getPtr(), 72) == bytes(launch.OVERLAP)
    config = theirs.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 1, 2, 3
    config.blockDimX, config.blockDimY, config.blockDimZ = 4, 5, 6
    config.sharedMemBytes, config.hStream, config.attrs, config.numAttrs = 7, 8, [attribute], 1
    ours = launch._Config((1, 2, 3), (4, 5, 6), 7, 8, ctypes.pointer(launch.OVERLAP), 1)
    told = ctypes.string_at(config.getPtr(), ctypes.sizeof(ours))
    place = launch._Config.attributes
    behind = place.offset + place.size
    assert (told[: place.offset], told[behind : behind + 4]) == (bytes(ours)[: place.offset], b"\1\0\0\0")


def test_only_what_follows_our_own_kernels_overlaps(driver: Driver) -> None:
    first, second = (Launch(kernel(), 1, 32, []) for _ in range(2))
    stays = Launch(Kernel("stays"), 1, 32, [])  # type: ignore[arg-type]
    Chain([first, stays, second])(77)
    Chain([first, second], follows=True)(77)
    sender(kernel(8), 1, 32, "q")(77, 1)
    sender(kernel(8), 1, 32, "q", follows=True)(77, 1)
    assert driver.overlaps == [False, False, True, True, True, False, True]


def test_a_chain_goes_to_the_stream_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int | None] = []

    def start(config: Any, *_: object) -> int:
        streams.append(config._obj.stream)
        return 0

    monkeypatch.setattr(launch, "_launcher", lambda: start)
    made = Chain([Launch(kernel(), 1, 32, []) for _ in range(2)])
    for stream in (0, 5, 5, 6, 0):
        made(stream)
    assert streams == [None, None, 5, 5, 5, 5, 6, 6, None, None]
    streams.clear()
    send = sender(kernel(8), 1, 32, "q")
    for stream in (0, 5, 5, 6, 0):
        send(stream, 1)
    assert streams == [None, 5, 5, 6, None]


@pytest.mark.parametrize("make", [lambda k: Chain([Launch(k, 1, 32, [])]), lambda k: sender(k, 1, 32)])
def test_a_threads_first_launch_makes_its_context(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    bound: list[int] = []
    monkeypatch.setattr(launch, "_launcher", lambda: lambda *_: 0 if bound else launch.NO_CONTEXT)
    monkeypatch.setattr(launch, "bind_context", lambda: bound.append(1))
    make(kernel())(0)
    assert bound == [1]


def test_a_launch_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(CUresult=int, cuGetErrorString=lambda status: (0, f"status {status}".encode()))
    monkeypatch.setattr(launch, "_launcher", lambda: lambda *_: 701)
    monkeypatch.setattr(launch, "_driver", lambda: told)
    with pytest.raises(CudaError, match=r"^cuLaunchKernelEx: status 701$"):
        Chain([Launch(kernel(), 1, 32, [])])(0)
    with pytest.raises(CudaError, match=r"^cuLaunchKernelEx: status 701$"):
        sender(kernel(8), 1, 32, "q")(0, 1)
    with pytest.raises(CudaError, match=r"a grid of \(2147483648, 1, 1\) blocks"):
        Launch(kernel(), 2**31, 32, [])


# --- the convolution ------------------------------------------------------------------------------
@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Stands in for the GPU's memory; what is put here is handed out next, else something new."""
    given: list[Tensor] = []

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert type(shape) is tuple and type(strides) is tuple  # the allocator takes nothing else
        if given and dtype is torch.uint8:
            return given.pop(0)
        return torch.empty_strided(shape, strides, dtype=dtype)

    def module(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(kernels={n: Kernel(n, overlaps=True) for n in (*KERNELS, "prepare", "merge", *TAIL)})

    monkeypatch.setattr(kernels_memory, "empty", empty)
    for where in (convolution_engine, tail_engine):
        monkeypatch.setattr(where, "_module", module)
    for name in ("_calls", "_launches"):
        monkeypatch.setattr(running, name, {})
    monkeypatch.setattr(tail_engine, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(convolution_engine, "_processors", lambda device: 132)
    monkeypatch.setattr(
        convolution_engine, "rows_map", lambda *told, **more: repr((told, more)).encode().ljust(128, b" ")[:128]
    )
    monkeypatch.setattr(prepared, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return given


TAIL = ("pool", "fold", "whole", "any", "measure", "finish_statistics", "bundle")
LAYER = Layer(16, 16, 1, (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))


def calls_of(dtype: torch.dtype, *, gathers: bool = False, shares: Shared = Shared.NOTHING) -> Calls:
    """Runs of a convolution that nothing else has run."""
    made = Convolution.of.__wrapped__(LAYER, dtype, dtype, dtype, Epilogue(gathers=("statistics",) if gathers else ()))
    return Calls(made, (7, 7, 7), shares=shares)


def operands(dtype: torch.dtype, last: bool) -> list[Tensor]:
    x, w = torch.randn(1, 16, 4, 4, 4), torch.randn(16, 16, 3, 3, 3)
    b, out = torch.randn(16), torch.empty(1, 16, 7, 7, 7)
    x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    return [t.to(dtype) for t in (x, w, b, out)]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kept_arguments_are_those_of_a_first_call(
    driver: Driver, memory: list[Tensor], dtype: torch.dtype, last: bool
) -> None:
    """Every pointer follows, whichever of the tensors and the workspace moved."""
    kept = calls_of(dtype)
    first = operands(dtype, last)
    spaces = [torch.empty(1 << 22, dtype=torch.uint8) for _ in range(2)]
    moved = operands(dtype, last)
    cases = [(first, 0), (first, 0), (first, 1)]
    cases += [([*first[:i], moved[i], *first[i + 1 :]], space) for i in range(4) for space in (1, 0)]
    for (x, w, b, out), space in cases:
        told = []
        for calls in (kept, calls_of(dtype)):
            memory.append(spaces[space])
            driver.calls.clear()
            calls.run(x, w, b, out)
            told.append(list(driver.calls))
        wide = dtype is torch.float32
        names = [*(["measure"] if wide else []), "prepare", "convolution", *(["direct"] if wide else [])]
        assert [c[0] for c in told[0]] == names
        assert told[0] == told[1]
    assert [len(free) for free in kept.free.values()] == [1]


@pytest.mark.parametrize("given", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("shares", [Shared.ROWS, Shared.ALL], ids=str)
def test_kept_arguments_follow_both_blocks_of_memory(
    driver: Driver, memory: list[Tensor], shares: Shared, given: bool
) -> None:
    """What is handed on to a second run, and what is a run's own, of which this second one may need nothing."""
    kept = calls_of(torch.float32, gathers=True, shares=shares)
    x, w, b, out = operands(torch.float32, False)
    moments = torch.empty(1, 1, 16, 3, dtype=torch.float64)
    handed, own = ([torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2)] for _ in range(2))
    for i, j in ((0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (0, 1)):
        told = []
        for calls in (kept, calls_of(torch.float32, gathers=True, shares=shares)):
            memory[:] = [own[j]] if given else [handed[i]]  # a first run's own lies behind what it hands on
            driver.calls.clear()
            prepared = handed[i] if given else None
            made = calls.run(x, w, b, out, moments=moments.data_ptr(), prepared=prepared)
            assert made is handed[i] and not memory
            told.append(list(driver.calls))
            (((call,),),) = (calls.free.values(),)  # the one that was kept
            blocks = handed[i].data_ptr(), own[j].data_ptr() if given else handed[i].data_ptr() + call.workspace.handed
            assert call.bases == blocks and call.workspace.handed and call.workspace.own
            assert call.room == (call.workspace.own + (0 if given else call.workspace.handed),)
        assert told[0] == told[1]
    assert [len(free) for free in kept.free.values()] == [1]


def test_other_strides_are_another_call(driver: Driver, memory: list[Tensor]) -> None:
    calls = calls_of(torch.float16)
    for last in (False, True, False, True):
        x, w, b, out = operands(torch.float16, last)
        calls.run(x, w, b, out)
    x, w, b, out = operands(torch.float16, True)
    odd = torch.empty(x.numel() + 1, dtype=torch.float16)[1:].as_strided(x.shape, x.stride())
    calls.run(odd, w, b, out)
    assert [len(free) for free in calls.free.values()] == [1, 1, 1]


def test_threads_have_calls_of_their_own(driver: Driver, memory: list[Tensor]) -> None:
    calls = calls_of(torch.float32)
    driver.delay = 1e-3
    tensors = [operands(torch.float32, False) for _ in range(4)]

    def work(number: int) -> None:
        x, w, b, out = tensors[number]
        for _ in range(5):
            calls.run(x, w, b, out)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # `direct` reads x and the weights, and its last argument begins with the output's address
    seen = [
        tuple(struct.unpack("<q", t[:8])[0] for t in (c[2][0], c[2][1], c[2][4]))
        for c in driver.calls
        if c[0] == "direct"
    ]
    expected = [(x.data_ptr(), w.data_ptr(), out.data_ptr()) for x, w, _, out in tensors for _ in range(5)]
    assert sorted(seen) == sorted(expected)


# --- a region -------------------------------------------------------------------------------------
CHAIN = """
def chain(x: f32[2, 8, 6, 6, 6], w: f32[8, 16, 3, 3, 3], b: f32[16], g: f32[16, 1, 1, 1]):
    y = conv_transpose(x, w, b, stride={two}, padding={no}, output_padding={no}, dilation={one}, groups=1)
    z = relu(y)
    s = mul(z, g)
    o = {}
    return {}
"""


POOL = "max_pool(s, kernel=(3, 3, 3), stride=(3, 3, 3), padding=(0, 0, 0), dilation=(1, 1, 1), ceil_mode=False)"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of any size are worth a kernel."""
    for name in ("fxfuse.kernels.stages.tail", "fxfuse.kernels.planning.schedule"):
        monkeypatch.setattr(f"{name}.LEAST_ELEMENTS", 1)


@pytest.mark.parametrize(
    ("operator", "outputs", "kernels", "asks_torch", "apart"),
    [
        (POOL, "o", ["pool"], False, True),
        (POOL, "o, o", ["pool"], False, False),
        ("softmax(s, dim=1)", "o", [], False, True),
        ("softmax(s, dim=1)", "o, s", ["fold"], False, True),
        ("reshape(s, shape=(2, -1))", "o", [], True, False),
        ("reshape(s, shape=(2, -1))", "o, s", [], True, False),
        (POOL, "o, x", ["pool"], False, False),
    ],
)
def test_a_region_says_what_its_outputs_are(
    driver: Driver, memory: list[Tensor], small: None, operator: str, outputs: str, kernels: list[str],
    asks_torch: bool, apart: bool,
) -> None:  # fmt: skip
    program = Program.parse(CHAIN.format(operator, outputs, no=(0,) * 3, one=(1,) * 3, two=(2,) * 3))[1]
    inputs = [torch.randn([s or 0 for s in kind.shape]) for _, kind in program.inputs]
    made = schedule(program, examples(program))
    assert made.kernel is not None
    ready = Prepared.of(program, made, execute.convolution_of(made.kernel), torch.device("cpu"))
    assert (ready.asks_torch, ready.apart) == (asks_torch, apart)
    for _ in range(2):
        driver.calls.clear(), driver.overlaps.clear()
        results = ready.run(inputs)
        assert [c[0] for c in driver.calls] == ["measure", "prepare", "convolution", "direct", *kernels]
        assert driver.overlaps == [False, *[True] * (len(driver.calls) - 1)]
        assert len(results) == len(program.outputs)
        memories = [t.untyped_storage().data_ptr() for t in (*results, *inputs)]
        assert (len({*memories}) == len(memories)) or not ready.apart


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_weights_with_holes_are_copied(driver: Driver, memory: list[Tensor], known: bool) -> None:
    program = Program.parse(CHAIN.format("relu(s)", "o", no=(0,) * 3, one=(1,) * 3, two=(2,) * 3))[1]
    made = schedule(program, examples(program))
    assert made.kernel is not None
    x, w, b, g = (torch.randn([s or 0 for s in kind.shape]) for _, kind in program.inputs)
    turned, spread = w.transpose(2, 4), torch.randn(32)[::2]
    for weight, bias in ((w, b), (turned, b), (w, spread)):
        inputs, copied = [x, weight, b if bias is b else spread, g], [weight is turned, bias is spread]
        how = (torch.device("cpu"), None, inputs) if known else (torch.device("cpu"),)
        ready = Prepared.of(program, made, execute.convolution_of(made.kernel), *how)  # type: ignore[arg-type]
        driver.calls.clear()
        with torch.no_grad():
            ready.run(inputs)
        (told,) = [c[2] for c in driver.calls if c[0] == "measure"]
        found = [struct.unpack("<q", t[:8])[0] for t in told[:2]]
        assert [at != t.data_ptr() for at, t in zip(found, (weight, bias), strict=True)] == copied


def test_behind_torchs_operators_a_kernel_waits_as_usual(driver: Driver, memory: list[Tensor], small: None) -> None:
    length = f"vector_norm(s, ord=1.0, dims=(1,), keepdim=True)\n    p = {POOL.replace('(s,', '(o,')}"
    text = CHAIN.format(length, "p", no=(0,) * 3, one=(1,) * 3, two=(2,) * 3)
    program = Program.parse(text)[1]
    made = schedule(program, examples(program))
    assert made.kernel is not None and [type(s) for s in made.steps] == [Torch, Map]
    ready = Prepared.of(program, made, execute.convolution_of(made.kernel), torch.device("cpu"))
    ready.run([torch.randn([s or 0 for s in kind.shape]) for _, kind in program.inputs])
    assert [c[0] for c in driver.calls] == ["measure", "prepare", "convolution", "direct", "pool"]
    assert driver.overlaps == [False, True, True, True, False]
