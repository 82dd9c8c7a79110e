"""Where the statistics of a value lie in memory, and what their parts are merged to. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set

import torch

from fxfuse.instr import Instr, TensorType
from fxfuse.kernels.codegen.operands import Place
from fxfuse.kernels.codegen.statistics import KINDS
from fxfuse.kernels.convolution.workspace import ALIGNMENT
from fxfuse.kernels.stages.steps import Gather


@dataclasses.dataclass(frozen=True)
class Merged:
    """Where the merged parts of a value lie: of every kind (N, pieces, C, its numbers) in float64, for as many pieces
    of every sample; of moments how many elements, their mean, and the sum of squares around it, of every channel.

    They come behind ``front`` bytes of the same tensor, for statistics that are made of them. ``places``: where each
    kind begins, in bytes. ``room``: the tensor's elements.
    """

    pieces: int
    front: int
    places: tuple[tuple[str, int], ...]
    room: tuple[int]

    @staticmethod
    def of(kind: TensorType, gathers: Sequence[str], pieces: int = 1, front: int = 0) -> Merged:
        n, c = kind.shape[0] or 0, kind.shape[1] or 0
        places, end = [], front
        for one in gathers:
            places.append((one, end))
            end += 8 * n * pieces * c * KINDS[one].merged
        return Merged(pieces, front, tuple(places), (end // 8,))


def front_of(step: Gather, tensors: Set[str]) -> int:
    """Bytes that the first statistics of a step take in front of what is merged; none where they are read as tensors.

    One tensor takes half of the time of two, and both are small.
    """
    first = step.instrs[0]
    if not tensors.isdisjoint(first.outs):
        return 0
    shape, _ = form_of_statistics(first, step.kind)
    return -(-math.prod(shape) * torch.float32.itemsize // ALIGNMENT) * ALIGNMENT


def merged_name(value: str) -> str:
    """The name under which a value's merged parts are handed from the kernel that makes them to :class:`Gather`."""
    return f"merged parts of {value}"


def statistics_name(instr: Instr) -> str:
    """The name of the one tensor in which the results of an instruction lie."""
    return f"statistics {' '.join(instr.outs)}"


def statistics_places(instr: Instr, kind: TensorType) -> dict[str, Place]:
    """Where in that tensor they lie: the mean, the variance and the scale of a value, or what another kind has."""
    shape, strides = form_of_statistics(instr, kind)
    size = strides[0] * torch.float32.itemsize
    return {
        out: Place(statistics_name(instr), i * size, torch.float32, shape[1:], strides[1:])
        for i, out in enumerate(instr.outs)
    }


def form_of_statistics(instr: Instr, kind: TensorType) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n, c = kind.shape[0] or 0, kind.shape[1] or 0
    rows = 1 if dict(instr.attributes).get("batch") else n
    return (len(instr.outs), rows, c, *(1 for _ in kind.shape[2:])), (rows * c, c, *(1 for _ in kind.shape[1:]))
