"""Timing several ways of doing the same thing, fairly.

On a CPU in turns, so that a drifting machine hits all alike; on a GPU as queued calls between two events, on inputs
in rotation, so that neither launches nor what the last call left in a cache are measured.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: calls that are queued at most before the GPU is waited for
MOST_QUEUED = 1000


def in_turns(
    ways: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float | None = None
) -> dict[str, float]:
    """Median seconds of each way over ``rounds`` rounds, after one round to warm up.

    In every round each way runs once, in an order that reverses from round to round. ``seconds``,
    where given, ends the measurement early, after at least three rounds. GPU work is waited for.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        once(way)
    started = time.perf_counter()
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in order:
            taken[name].append(once(ways[name]))
        if seconds is not None and number >= 2 and time.perf_counter() - started > seconds:
            break
    return {name: statistics.median(times) for name, times in taken.items()}


def queued_in_turns(
    ways: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.01
) -> dict[str, float]:
    """Median seconds of a call of each way, over ``rounds`` rounds in turns, while calls queue up behind each other.

    A round makes as many calls of a way, without waiting for the GPU, as take ``seconds`` together: what is
    measured is the longer one of the GPU's time and of the host's, as in a model that is called again and again.
    On a GPU the current stream of the current device is measured by events.
    """
    counts = {}
    for name, way in ways.items():
        _batch(way, 2)  # the first call of a way may allocate
        counts[name] = max(1, min(MOST_QUEUED, int(seconds / max(_batch(way, 3), 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            taken[name].append(_batch(ways[name], counts[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def _batch(way: Callable[[], Any], count: int) -> float:
    """Seconds of one of ``count`` calls in a row."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(count):
            way()
        return (time.perf_counter() - started) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        way()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / count


def queued(
    call: Callable[[Any], object], turns: Sequence[Any], *, calls: int = 20, repeats: int = 7, hold: bool = False
) -> float:
    """Median GPU seconds of ``call(turn)``: events around ``calls`` queued calls, ``repeats`` times, after three more.

    ``turns`` are taken in rotation; of tensors they should be larger than the cache together. ``hold`` keeps the GPU
    busy while the calls are queued, so that launches cost nothing however short the kernels are.
    """
    turn = itertools.cycle(turns)
    for _ in range(3):
        call(next(turn))
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if hold:
            torch.cuda._sleep(2_000_000)  # clock cycles
        start.record()
        for _ in range(calls):
            call(next(turn))
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def once(way: Callable[[], Any]) -> float:
    """Seconds of one call. GPU work is waited for."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
