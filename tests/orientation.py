"""What rows of a convolution's matrix instructions are, for tests of every way: channels, positions, samples."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from fxfuse.kernels.convolution import adapted, specialise
from fxfuse.kernels.convolution import kernels as convolution_kernels
from fxfuse.kernels.convolution.kernels import Convolution
from fxfuse.kernels.convolution.sets import SETS
from fxfuse.kernels.convolution.specialisation import Specialisation, Unsupported
from fxfuse.kernels.convolution.tiling import tile


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


def of_sets(made: Specialisation, finite: bool, stored: tuple[int, int, int], row: int) -> list[Specialisation]:
    """Those with samples side by side that there are for outputs of these sizes."""
    d, h, w = (-(-e // s) for e, s in zip(stored, made.layer.stride, strict=True))
    found = []
    for one in specialise.kernels_of_sets(made, finite) if adapted.may_have_sets(made) else ():
        for size in SETS:
            for inner in (1, 2):
                with contextlib.suppress(Unsupported):
                    with_set = dataclasses.replace(one, samples=size, inner=inner)
                    tile(with_set, (d, h, w), row)
                    found.append(with_set)
    return found


@contextlib.contextmanager
def sets_always() -> Iterator[None]:
    """Samples lie side by side wherever they may, in one of the ways."""

    def one_of(
        made: Specialisation, samples: int, stored: tuple[int, int, int], row: int, *_: int, finite: bool, **__: bool
    ) -> Specialisation:
        ways = of_sets(made, finite, stored, row)
        return random.Random(str((made.layer, stored, samples))).choice(ways) if ways else made

    with chosen_anew(), mock.patch.object(convolution_kernels, "with_sets", one_of):
        yield


@contextlib.contextmanager
def pingpong_always() -> Iterator[None]:
    """Each warpgroup has tiles of its own wherever it may."""

    def each(
        made: Specialisation, samples: int, stored: tuple[int, int, int], row: int, itemsize: int, *, keeps: bool
    ) -> Specialisation:
        stride = (1, 1, 1) if made.pooled else made.layer.stride
        d, h, w = (-(-e // s) for e, s in zip(stored, stride, strict=True))
        for buffers in (2, 1) if adapted.may_pingpong(made) else ():
            with contextlib.suppress(Unsupported):
                other = dataclasses.replace(made, pingpong=True, stages=1, x_buffers=buffers)
                tile(other, (d, h, w), row, itemsize)
                return other
        return made

    with chosen_anew(), mock.patch.object(convolution_kernels, "as_pingpong", each):
        yield


@contextlib.contextmanager
def chosen_anew() -> Iterator[None]:
    """No layer has a kernel yet, nor has one afterwards."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    specialise.specialise.cache_clear()
    specialise.kernels_of_sets.cache_clear()
    Convolution.of.cache_clear()
