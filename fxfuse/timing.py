"""Timing several ways of doing the same thing, fairly: in turns, so that a drifting machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
        _timed(way)
    started = time.perf_counter()
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in order:
            taken[name].append(_timed(ways[name]))
        if seconds is not None and number >= 2 and time.perf_counter() - started > seconds:
            break
    return {name: statistics.median(times) for name, times in taken.items()}


def queued(ways: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.01) -> dict[str, float]:
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


def _timed(way: Callable[[], Any]) -> float:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
