"""Pools made of residue classes: when a kernel may combine all outputs of a position before it stores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from operator import floordiv, mul

from fxfuse.instr import Instr
from fxfuse.vocabulary.pools import output_size

COMBINE = {"max_pool": "Maximum", "adaptive_max_pool": "Maximum", "avg_pool": "Sum", "adaptive_avg_pool": "Sum"}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """``combine`` all residue classes of each position; ``sizes``: positions per dim that are stored.

    ``window``: the convolution's stride. ``factor``: of a sum, to make it a mean. ``rest``: the pool, or the
    maximum over space, that is left to do over the positions, or None. ``step``: positions per dim in each of its
    windows, where it is a mean of windows without padding that follow each other; what it makes is then a sum of all of
    them, with :meth:`whole`.
    """

    combine: str
    window: tuple[int, ...]
    sizes: tuple[int, ...]
    factor: float
    rest: Instr | None
    step: tuple[int, ...] | None = None

    def whole(self) -> Pooling:
        """The same with nothing left to do: ``sizes`` and ``window`` are those of the pool."""
        assert self.step is not None
        window, sizes = (tuple(map(by, of, self.step)) for by, of in ((mul, self.window), (floordiv, self.sizes)))
        return Pooling(self.combine, window, sizes, self.factor / math.prod(self.step), None, self.step)


@dataclasses.dataclass(frozen=True)
class _Dim:
    """A pool along one dim: over ``length`` values it makes ``count`` windows."""

    length: int
    count: int
    kernel: int
    stride: int
    padding: int


def pooling(pool: Instr, step: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> Pooling | None:
    """How ``pool``, or a reduction, is made of residue classes of a convolution of stride ``step``; None where not.

    ``lengths``, ``counts``: sizes of its input and of its result per dim. ``max_pool(y; k, t, p)`` is
    ``max_pool(m; k/s, t/s, p/s)`` with ``m[q]`` the maximum of ``y[s*q .. s*q + s-1]``, a mean over
    whole windows is the mean of means, and a maximum over all of space is that of any maxima.
    """
    if math.prod(step) == 1:
        return None
    if _is_over_space(pool, len(step)):  # its windows need not be whole
        sizes = tuple(-(-length // s) for length, s in zip(lengths, step, strict=True))
        return Pooling("Maximum", tuple(step), sizes, 1.0, pool)
    dims = _dims(pool, lengths, counts)
    if dims is None:
        return None
    combine = COMBINE[pool.op]
    if any(v % s for d, s in zip(dims, step, strict=True) for v in (d.kernel, d.stride, d.padding)):
        return None
    if combine == "Sum" and any((d.count - 1) * d.stride + d.kernel > d.length for d in dims):
        return None  # the last window has another divisor
    small = [
        _Dim(-(-d.length // s), d.count, d.kernel // s, d.stride // s, d.padding // s)
        for d, s in zip(dims, step, strict=True)
    ]
    sizes = tuple(min(d.length, (d.count - 1) * d.stride + d.kernel - d.padding) for d in small)
    ceil_mode = dict(pool.attributes).get("ceil_mode", False)
    for d, size in zip(small, sizes, strict=True):
        if size < 1 or output_size(size, d.kernel, d.stride, d.padding, 1, ceil_mode) != d.count:
            return None  # it would make windows beyond the last one
    factor = 1.0 / math.prod(step) if combine == "Sum" else 1.0
    done = all((d.kernel, d.stride, d.padding) == (1, 1, 0) for d in small)
    rest = None if done else _smaller(pool, small)
    follow = combine == "Sum" and not done and all((d.stride, d.padding) == (d.kernel, 0) for d in small)
    return Pooling(combine, tuple(step), sizes, factor, rest, tuple(d.kernel for d in small) if follow else None)


def _is_over_space(pool: Instr, rank: int) -> bool:
    """Whether it is a maximum over all of space, and perhaps over more."""
    attributes = dict(pool.attributes)
    if pool.op == "adaptive_max_pool":
        return bool(attributes["size"] == (1,) * rank)
    return pool.op == "amax" and {*range(2, 2 + rank)} <= {*attributes["dims"]}


def _dims(pool: Instr, lengths: Sequence[int], counts: Sequence[int]) -> list[_Dim] | None:
    attributes = dict(pool.attributes)
    if pool.op not in COMBINE:
        return None
    if pool.op.startswith("adaptive"):
        if any(length % count for length, count in zip(lengths, counts, strict=True)):
            return None  # windows of several sizes
        return [_Dim(e, n, e // n, e // n, 0) for e, n in zip(lengths, counts, strict=True)]
    padding = attributes["padding"]
    if pool.op == "max_pool" and any(e != 1 for e in attributes["dilation"]):
        return None
    if pool.op == "avg_pool" and (attributes["divisor_override"] is not None or any(padding)):
        return None
    rows = zip(lengths, counts, attributes["kernel"], attributes["stride"], padding, strict=True)
    return [_Dim(*row) for row in rows]


def _smaller(pool: Instr, dims: Sequence[_Dim]) -> Instr:
    """The same pool over positions."""
    if pool.op.startswith("adaptive"):
        return pool
    changed = {
        "kernel": tuple(d.kernel for d in dims),
        "stride": tuple(d.stride for d in dims),
        "padding": tuple(d.padding for d in dims),
    }
    return Instr(pool.outs, pool.op, pool.operands, tuple((k, changed.get(k, v)) for k, v in pool.attributes))
