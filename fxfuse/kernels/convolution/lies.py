"""How x lies in memory, by its strides and its address: what kernels read where it is, and how much at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxfuse.kernels.convolution.specialisation import PLANE_UNIT, Specialisation


def three_dims(x: Tensor) -> Tensor:
    """(A, B, *spatial) with one to three spatial dims as (A, B, d, h, w)."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x


def samples_are_dense(x: Tensor) -> bool:
    """Whether every sample is a block of memory without holes, one behind the other."""
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last_3d)


def at_once_of(x: Tensor) -> int:
    """Positions of x, all of a channel neighbours, of which every so many can be read at once, 16 bytes; else 0."""
    n, c, d, h, w = x.stride()
    *_, height, width = x.shape
    count = 16 // x.element_size()
    whole = math.prod(x.shape[2:]) % count == 0 and x.data_ptr() % 16 == 0
    neighbours = w == 1 and h == width and d == height * width
    return count if whole and neighbours and n % count == 0 and c % count == 0 else 0


def channels_by_position(x: Tensor) -> bool:
    """Whether channels are neighbours, positions are not, and they follow each other: as `prepare` decides it."""
    _, c, d, h, w = x.stride()
    *_, height, width = x.shape
    return c == 1 and w != 1 and h == width * w and d == height * width * w


def lines_by_quads(x: Tensor) -> bool:
    """Whether positions along w are neighbours, and every four of them can be read at once."""
    *others, w = x.stride()
    aligned = x.data_ptr() % (4 * x.element_size()) == 0 and all(s % 4 == 0 for s in others)
    return w == 1 and x.shape[-1] % 4 == 0 and aligned


def planes_in_place(x: Tensor) -> bool:
    """Whether TMA can read x as planes of channels as it lies."""
    *others, w = x.stride()
    unit = PLANE_UNIT // x.element_size()
    return w == 1 and all(s % unit == 0 and s > 0 for s in others) and x.data_ptr() % PLANE_UNIT == 0


def rows_in_place(x: Tensor, made: Specialisation) -> bool:
    """Whether TMA can read x as rows of channels as it lies."""
    strides = x.stride()
    return (
        strides[1] == 1
        and not made.pads
        and all(s % 8 == 0 and s > 0 for i, s in enumerate(strides) if i != 1)
        and x.data_ptr() % 16 == 0
    )
