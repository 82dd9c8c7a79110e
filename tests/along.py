"""Where rows of the output that are reduced along w come together, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from fxfuse.kernels import execute
from fxfuse.kernels.convolution import specialise
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.specialisation import Along
from fxfuse.kernels.planning import cutter


@contextlib.contextmanager
def rows_together(way: Along) -> Iterator[None]:
    """In the convolution's epilogue, in this ``way`` where it can be, whatever a kernel of their own would take."""
    cycles = {one: 0.0 if one is way else 1e9 for one in Along}
    with mock.patch.object(cutter, "BANDWIDTH", 1.0), mock.patch.object(specialise, "ALONG_CYCLES", cycles):
        _forget()
        yield
    _forget()


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """In a kernel of their own."""
    with mock.patch.object(cutter.Cutter, "_along", lambda _, kernel, reduction: (kernel, ())):
        yield


def ways_run() -> list[Along | None]:
    """Of the convolutions that were prepared."""
    found = [p.convolution for p in execute._prepared.values() if p is not None]
    return [c.made.along for c in found if c is not None]


def _forget() -> None:
    for cache in (specialise.specialise, Convolution.of):
        cache.cache_clear()
