"""Timing several ways of doing the same thing, fairly: in turns, so that a drifting machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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


def _timed(way: Callable[[], Any]) -> float:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
