"""Where the statistics of a value lie in memory, and the moments that they are made of. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Set

import torch

from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.operands import Place
from fxfuse.kernels.steps import Gather
from fxfuse.kernels.workspace import ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Moments:
    """Where the moments of a value lie, (N, pieces, C, 3) in float64 for as many pieces of every sample: how many
    elements, their mean, and the sum of squares around it, of every channel.

    They come behind ``front`` bytes of the same tensor, for statistics that are made of them. ``room``: its elements.
    """

    pieces: int
    front: int
    room: tuple[int]

    @staticmethod
    def of(kind: TensorType, pieces: int = 1, front: int = 0) -> Moments:
        n, c = kind.shape[0] or 0, kind.shape[1] or 0
        return Moments(pieces, front, (front // 8 + n * pieces * c * 3,))


def front_of(step: Gather, tensors: Set[str]) -> int:
    """Bytes that the first statistics of a step take in front of the moments; none where they are read as tensors.

    One tensor takes half of the time of two, and both are small.
    """
    first = step.instrs[0]
    if not tensors.isdisjoint(first.outs):
        return 0
    _, (size, *_) = form_of_statistics(first, step.kind)
    return -(-3 * size * torch.float32.itemsize // ALIGNMENT) * ALIGNMENT


def moments_name(value: str) -> str:
    """The name under which a value's moments are handed from the kernel that makes them to :class:`Gather`."""
    return f"moments of {value}"


def statistics_name(instr: Instr) -> str:
    """The name of the one tensor in which the results of ``statistics`` lie."""
    return f"statistics {' '.join(instr.outs)}"


def statistics_places(instr: Instr, kind: TensorType) -> dict[str, Place]:
    """Where in that tensor the mean, the variance and the scale of a value lie."""
    shape, strides = form_of_statistics(instr, kind)
    size = strides[0] * torch.float32.itemsize
    return {
        out: Place(statistics_name(instr), i * size, torch.float32, shape[1:], strides[1:])
        for i, out in enumerate(instr.outs)
    }


def form_of_statistics(instr: Instr, kind: TensorType) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n, c = kind.shape[0] or 0, kind.shape[1] or 0
    rows = 1 if dict(instr.attributes)["batch"] else n
    return (3, rows, c, *(1 for _ in kind.shape[2:])), (rows * c, c, *(1 for _ in kind.shape[1:]))
