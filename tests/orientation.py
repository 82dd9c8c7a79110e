"""Whether rows of a convolution's matrix instructions are output channels, for tests of either way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from fxfuse.kernels import specialise
from fxfuse.kernels.convolution import Specialisation
from fxfuse.kernels.convolution_kernels import Convolution


@contextlib.contextmanager
def by_channel_always() -> Iterator[None]:
    """Channels are rows wherever they may be, whether that is expected to be the faster or not."""
    usual: Callable[..., float] = specialise.sample_seconds

    def seconds(made: Specialisation, *rest: Any) -> float:
        return usual(made, *rest) * (1 if made.by_channel else 1e6)

    with chosen_anew(), mock.patch.object(specialise, "sample_seconds", seconds):
        yield


@contextlib.contextmanager
def by_channel_never() -> Iterator[None]:
    """Positions are rows, as for all other layers."""
    with chosen_anew(), mock.patch.object(specialise, "_by_channel", return_value=specialise._Kernels(())):
        yield


@contextlib.contextmanager
def chosen_anew() -> Iterator[None]:
    """No layer has a kernel yet, nor has one afterwards."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    specialise.specialise.cache_clear()
    Convolution.of.cache_clear()
