"""Timing in turns, and of queued calls."""

from __future__ import annotations

import pytest
import torch

from fxfuse import timing


def test_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round to warm up, then the order reverses from round to round; medians are of the rounds alone."""
    calls: list[str] = []
    taken = iter([50.0, 60.0, 1.0, 2.0, 20.0, 3.0, 5.0, 7.0])
    monkeypatch.setattr(timing, "once", lambda way: way() or next(taken))
    found = timing.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert found == {"a": 3.0, "b": 7.0}


def test_in_turns_ends_early() -> None:
    calls: list[int] = []
    timing.in_turns({"a": lambda: calls.append(0)}, rounds=1000, seconds=0.0)
    assert len(calls) == 1 + 3


def test_once() -> None:
    assert timing.once(lambda: sum(range(100_000))) > 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_queued() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    small, large = (timing.queued(lambda t: t @ t, [x[:n, :n].contiguous()]) for n in (1024, 4096))
    assert 0 < 8 * small < large < 1
    held = timing.queued(lambda t: t + 1, [x[:8, :8]], hold=True)
    assert held < timing.queued(lambda t: t + 1, [x[:8, :8]])
