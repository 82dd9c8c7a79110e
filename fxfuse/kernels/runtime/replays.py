"""Calls of a region that run as one CUDA graph: those whose tensors lie where those of a call before lay.

A launch costs the host 3 to 5 us, and a graph of them about 3, however many there are. A graph holds addresses, and in
a loop torch's allocator gives a call the same ones again and again. So outputs are allocated as ever, and where a graph
was captured on this stream for where inputs and outputs lie, it runs. What lies there is read then: weights may change
in place. What kernels have for themselves, workspaces and what is between them, lies in a room that stays, one of each
stream: graphs of a stream run one behind the other, and nothing in it outlives one.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels.compilation.switches import encoded, environment
from fxfuse.kernels.runtime import graphs, launch, memory

log = logging.getLogger(__name__)

#: bytes of a room; a region that needs more goes without graphs
MOST_HELD = 2**24
#: bytes to a multiple of which a room is made, for several regions to need the same one
ROOMS = 2**21
#: streams, of all devices, that have a room
MOST_STREAMS = 8
#: graphs of a region, and calls that are known without one
MOST_GRAPHS, MOST_SEEN = 16, 64
#: a region's captures, half a millisecond each, and one more for so many calls that were replayed
MOST_CAPTURES, REPLAYS_PER_CAPTURE = 64, 1024
#: calls without a graph, after which graphs are dropped that no call had meanwhile; where fewer were replayed than
#: ``LEAST_REPLAYS``, so many times in a row, the region goes without graphs from then on
PATIENCE, LEAST_REPLAYS, STRIKES = 256, 32, 4

#: whether the current stream is being captured; asked on every call
capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)

_GRAPHS, _OFF = encoded("FXFUSE_GRAPHS", "0")

Key = tuple[int, ...]
#: queues a call's kernels: of its inputs, and of outputs by name that they are to fill
Queue = Callable[[Sequence[Tensor], dict[str, Tensor]], list[Tensor]]
#: of a captured call: captures, sizes, and what is kept here, change for one thread at a time; the others do without
_one_at_a_time = threading.Lock()
_rooms: dict[tuple[int, int], Tensor] = {}  # by device and stream
_all: weakref.WeakSet[Replays] = weakref.WeakSet()


class Output(NamedTuple):
    """What a region makes, as it is allocated."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def wanted(device: torch.device) -> bool:
    """Whether graphs are to be had on a device, and FXFUSE_GRAPHS does not leave them out."""
    return device.type == "cuda" and not _switched_off()


def _switched_off() -> bool:
    return bool(environment.get(_GRAPHS) == _OFF)


class Replays:
    """The graphs of a region's calls, which have inputs of the same forms.

    ``device``: its index. ``inputs``: how many there are. ``outputs``: what the region's kernels make of them, each in
    memory of its own.
    """

    def __init__(self, device: int, inputs: int, outputs: Sequence[Output]) -> None:
        self.device, self.outputs = device, tuple(o.name for o in outputs)
        self.graphs: dict[Any, graphs.Graph | None] = {_MARK: None}  # the least recently used first
        self._space = space = _space(device, self.graphs)
        for i, (_, shape, strides, dtype) in enumerate(outputs):
            space |= {f"shape{i}": shape, f"strides{i}": strides, f"dtype{i}": dtype}
        given, made = ([f"{kind}{i}" for i in range(count)] for kind, count in (("t", inputs), ("o", len(outputs))))
        text = _RUN.format(
            given=f"{', '.join(given)},",
            made="\n    ".join(f"{o} = empty(shape{i}, strides{i}, dtype{i})" for i, o in enumerate(made)),
            places=", ".join(f"{t}.data_ptr()" for t in (*given, *made)),
            outputs=", ".join(made),
        )
        exec(text, space)  # noqa: S102 - written below
        #: the outputs of a call, of what queues its kernels, its inputs, and these replays; None: no graphs any more
        self.run: Callable[[Queue, Sequence[Tensor], Replays], list[Tensor]] | None = space.pop("run")
        self._seen: dict[Key, None] = {}  # calls that went without, once
        self._room: int | None = None  # bytes that kernels have for themselves
        self._captures = self._misses = self._strikes = self._hits = 0
        with _one_at_a_time:
            _all.add(self)

    def without(
        self, queue: Queue, inputs: Sequence[Tensor], key: Key, made: Sequence[Tensor], graph: graphs.Graph | None
    ) -> list[Tensor]:
        """A call for which there is no graph, or which must not run it: the user captures the stream's kernels."""
        given = dict(zip(self.outputs, made, strict=True))
        if graph is not None:
            self.graphs[key] = graph
        elif not capturing() and _one_at_a_time.acquire(blocking=False):
            try:
                if self._missed(queue, inputs, key, given):
                    return [*made]
            finally:
                _one_at_a_time.release()
        return queue(inputs, given)

    def _missed(self, queue: Queue, inputs: Sequence[Tensor], key: Key, given: dict[str, Tensor]) -> bool:
        """Learn from a call that had no graph; whether its kernels are queued."""
        self._misses += 1
        if self._misses % PATIENCE == 0:
            self._tidy()
        if self.run is None or _switched_off():
            return False
        if self._room is None:
            return self._measured(queue, inputs, given)
        if key not in self._seen:
            if len(self._seen) == MOST_SEEN:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = None
        elif self.captured < MOST_GRAPHS and self._captures < self._allowed():
            del self._seen[key]
            self._captures += 1
            graph = self._captured(queue, inputs, key[0], given, self._room)
            if graph is not None:
                status = graph.start()
                if status:
                    launch.again(graph.start, status, "cuGraphLaunch")
                self.graphs[key] = graph
                return True
        return False

    def _measured(self, queue: Queue, inputs: Sequence[Tensor], given: dict[str, Tensor]) -> bool:
        """Queue a call's kernels, if that is all there is to queue, and see what they are given for themselves."""
        count = memory.Counted()
        try:
            with memory.instead(count), graphs.Copies():
                queue(inputs, dict(given))
        except graphs.UncapturableError as error:
            self.stop(str(error))
            return False
        self._room = count.size
        if count.size > MOST_HELD:
            self.stop(f"its kernels need {count.size} bytes for themselves (at most {MOST_HELD})")
        return True

    def _captured(
        self, queue: Queue, inputs: Sequence[Tensor], stream: int, given: dict[str, Tensor], size: int
    ) -> graphs.Graph | None:
        try:
            room = _room_of(self.device, stream, size)
            if room is None:
                return None
            with graphs.relaxed(), memory.instead(memory.Parts(room)):
                return graphs.capture(lambda: queue(inputs, dict(given)), self.device, stream, room)
        except Exception as error:  # noqa: BLE001 - the call goes on without
            self.stop(f"{type(error).__name__}: {error}")
            return None

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return sum(g is not None for g in [*self.graphs.values()])

    def _allowed(self) -> int:
        return MOST_CAPTURES + self._replayed() // REPLAYS_PER_CAPTURE

    def _replayed(self) -> int:
        found: int = self._space["hits"]
        return found

    def _tidy(self) -> None:
        """Drop the graphs that no call has had since the last time."""
        for key in [*self.graphs]:
            if key is _MARK:
                break
            self.graphs.pop(key, None)
        self.graphs.pop(_MARK, None)
        self.graphs[_MARK] = None
        hits, self._hits = self._replayed() - self._hits, self._replayed()
        self._strikes = self._strikes + 1 if hits < LEAST_REPLAYS else 0
        if self._strikes == STRIKES:
            self.stop("its tensors lie elsewhere in every call")

    def stop(self, why: str) -> None:
        """Let the region go without graphs from now on."""
        log.debug("a region goes without CUDA graphs: %s", why)
        self.run = None
        self.drop()

    def drop(self) -> None:
        """Forget the graphs and the calls: they are captured anew."""
        self.graphs.clear()
        self.graphs[_MARK] = None
        self._seen.clear()


#: among the graphs: those in front of it were not used since it was put there
_MARK = "mark"

#: Written out for a region's tensors, since it is on the way of every call. A graph is for one thread at a time: it is
#: taken out while it is queued.
_RUN = """
def run(queue, inputs, replays):
    global hits
    {given} = inputs
    {made}
    key = stream_of(device), {places}
    graph = pop(key, None)
    if graph is None or capturing() or environment.get(switch) == off:
        return replays.without(queue, inputs, key, ({outputs},), graph)
    status = graph.start()
    if status:
        again(graph.start, status, "cuGraphLaunch")
    graphs[key] = graph
    hits += 1
    return [{outputs}]
"""


def _space(device: int, found: dict[Any, graphs.Graph | None]) -> dict[str, Any]:
    """What the text above names."""
    return {
        "hits": 0,
        "device": device,
        "graphs": found,
        "pop": found.pop,
        "empty": memory.allocate,
        "stream_of": launch.stream_of,
        "capturing": capturing,
        "again": launch.again,
        "environment": environment,
        "switch": _GRAPHS,
        "off": _OFF,
    }


def _room_of(device: int, stream: int, size: int) -> Tensor | None:
    """Memory of the stream for what its graphs' kernels have for themselves; None where too many streams have some.

    A graph keeps the one that it was captured with, which may be smaller than that of a later one.
    """
    room = _rooms.get((device, stream))
    if room is None and len(_rooms) == MOST_STREAMS:
        return None
    if room is None or room.numel() < size:
        whole = max(-(-size // ROOMS), 1) * ROOMS
        room = _rooms[device, stream] = graphs.elsewhere(lambda: memory.allocate((whole,), (1,), torch.uint8))
    return room


def forget() -> None:
    """Drop all graphs, and what they hold."""
    with _one_at_a_time:
        for replays in [*_all]:
            replays.drop()
        _rooms.clear()
