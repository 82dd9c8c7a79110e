"""What the instructions of a planar kernel multiply (``cuh/conv_planar.cuh``): tables that are compiled in. Pure.

An instruction multiplies sixteen positions with eight numbers each: those of a residue class, of every tap and input
channel one, eight at a time. Each lane picks its own of them, so that classes need no zeros for each other's taps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fxfuse.kernels.convolution.geometry import Pass

#: numbers of a position that an instruction multiplies; and positions and output channels of one
DEPTH, POSITIONS, CHANNELS = 8, 16, 8
#: clock cycles of a multiprocessor that an instruction takes, and what its lanes pick of x for all output channels
INSTRUCTION, PICKED = 2.0, 4.0


@dataclasses.dataclass(frozen=True)
class Factor:
    """A number of a position: a channel of x at ``delta``. Its weight is the sum of those of ``taps``."""

    delta: tuple[int, int, int]
    channel: int
    taps: tuple[int, ...]


def factors_of(one: Pass, channels: int) -> list[list[Factor]]:
    """Of every residue class of a pass."""
    found = []
    for number in range(len(one.residues)):
        taps: dict[tuple[int, int, int], tuple[int, ...]] = {}
        for step in one.steps:
            if step.first <= number < step.first + step.count:
                taps[step.delta] = (*taps.get(step.delta, ()), *step.taps[number - step.first])
        # neighbouring lanes have one channel, whose taps lie in different banks of shared memory, or are one number
        found.append([Factor(delta, c, some) for c in range(channels) for delta, some in taps.items() if some])
    return found


def instructions(passes: Sequence[Pass], channels: int) -> int:
    """How many there are for sixteen positions and eight output channels, of all classes."""
    return sum(-(-len(one) // DEPTH) for p in passes for one in factors_of(p, channels))


def factor_bytes(passes: Sequence[Pass], channels: int, columns: int) -> int:
    """Shared memory for weights, of ``columns`` output channels, and for where their factors lie."""
    return instructions(passes, channels) * (columns // CHANNELS * DEPTH * CHANNELS + DEPTH) * 4


def factor_cycles(passes: Sequence[Pass], channels: int, columns: int) -> float:
    """Clock cycles of a multiprocessor for 64 positions."""
    return instructions(passes, channels) * 64 / POSITIONS * (PICKED + columns / CHANNELS * INSTRUCTION)
