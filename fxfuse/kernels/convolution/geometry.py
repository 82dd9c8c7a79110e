"""A convolution as residue classes of taps: the arithmetic of positions, per dim and over the three of them.

An output position of a transposed convolution is ``o = stride*q + r`` with a residue ``r`` below the
stride. It reads ``x[q + delta]`` for the taps ``k`` with ``delta = (r + padding - dilation*k) / stride``
whole: ``delta`` does not depend on ``q``, so every residue class is a dense convolution of stride 1. So is the sum
of all classes of a position, with the taps of all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

ONE = (1, 1, 1)


def three_of(sizes: Sequence[int | None]) -> tuple[int, int, int]:
    """Sizes of up to three spatial dims, with ones in front; zero for those that are not known."""
    d, h, w = (*ONE, *(s or 0 for s in sizes))[-3:]
    return d, h, w


@dataclasses.dataclass(frozen=True)
class Tap:
    """One weight position (index into the flattened kernel) and what it is multiplied with, ``x[q + delta]``."""

    index: int
    delta: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Residue:
    """The outputs ``stride*q + at`` of all q, and their taps."""

    at: tuple[int, int, int]
    taps: tuple[Tap, ...]


def deltas_of(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[list[int]]:
    """Per dim the delta of every ``k``: one residue class has a tap there, and no other."""
    geometry = zip(kernel, stride, padding, dilation, strict=True)
    return [[-((k * e - p) // s) for k in range(size)] for size, s, p, e in geometry]


def residues_of(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    beside: Sequence[int] = (),
) -> tuple[Residue, ...]:
    """The residue classes of a transposed convolution in three dims, w varying fastest; a class may have no tap.

    ``beside``: dims along which all that taps read is at one position.
    """
    deltas = deltas_of(kernel, stride, padding, dilation)
    per_dim = [
        [
            [(k, 0 if dim in beside else deltas[dim][k]) for k in range(size) if (r + p - k * e) % s == 0]
            for r in range(s)
        ]
        for dim, (size, s, p, e) in enumerate(zip(kernel, stride, padding, dilation, strict=True))
    ]
    found = []
    for at in itertools.product(*(range(s) for s in stride)):
        taps = [
            Tap((d[0] * kernel[1] + h[0]) * kernel[2] + w[0], (d[1], h[1], w[1]))
            for d, h, w in itertools.product(*(per_dim[i][at[i]] for i in range(3)))
        ]
        found.append(Residue((at[0], at[1], at[2]), tuple(taps)))
    return tuple(found)


def sum_of(residues: Sequence[Residue]) -> Residue:
    """The sum of all classes of a position as one class: it may have several taps of one delta."""
    return Residue((0, 0, 0), tuple(t for r in residues for t in r.taps))


def reach(residues: Sequence[Residue]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The least and the greatest delta per dim; zeros where there is no tap."""
    deltas = [t.delta for r in residues for t in r.taps] or [(0, 0, 0)]
    low = tuple(min(d[i] for d in deltas) for i in range(3))
    high = tuple(max(d[i] for d in deltas) for i in range(3))
    return low, high  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Step:
    """Taps of ``count`` residue classes of a pass, from ``first`` on, that read the same rows of x: of each class one,
    or none, or several, whose weights are added where they read the same position of a row.
    """

    delta: tuple[int, int, int]
    first: int
    taps: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return len(self.taps)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Residue classes whose accumulators are held at the same time; None fills up."""

    residues: tuple[Residue, ...]
    steps: tuple[Step, ...]


def steps_of(residues: Sequence[Residue], *, filled: bool = False, whole: bool = False) -> tuple[Step, ...]:
    """The steps of a pass over ``residues``: per delta, every run of neighbouring classes that have it; by run.

    ``filled``: one run per delta, from the first class to the last that has it; ``whole``: one of all classes.
    """
    by_delta: dict[tuple[int, int, int], dict[int, tuple[int, ...]]] = {}
    for i, residue in enumerate(residues):
        for tap in residue.taps:
            together = by_delta.setdefault(tap.delta, {})
            together[i] = (*together.get(i, ()), tap.index)
    steps = []
    for delta, taps in sorted(by_delta.items()):
        if filled or whole:
            count = len(residues) if whole else max(taps) + 1
            steps.append(Step(delta, 0, tuple(taps.get(i, ()) for i in range(count))))
            continue
        for first in taps:
            if first - 1 not in taps:
                run = list(itertools.takewhile(taps.__contains__, range(first, len(residues))))
                steps.append(Step(delta, first, tuple(taps[i] for i in run)))
    return tuple(sorted(steps, key=lambda s: (s.first, s.count, s.delta)))


def steps_of_sum(residue: Residue, *, added: bool) -> tuple[Step, ...]:
    """The steps of a pass over what :func:`sum_of` made: one per tap, or one per delta, with all weights ``added``."""
    by_delta: dict[tuple[int, int, int], list[int]] = {}
    for tap in residue.taps:
        by_delta.setdefault(tap.delta, []).append(tap.index)
    steps = []
    for delta, taps in sorted(by_delta.items()):
        together = [tuple(sorted(taps))] if added else [(tap,) for tap in sorted(taps)]
        steps += [Step(delta, 0, (one,)) for one in together]
    return tuple(steps)
