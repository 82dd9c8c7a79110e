"""Cut tails off late: a pool that never reads the tail of a convolution may as well be given it.

A convolution whose dead outputs are dropped (``extent``) often comes out a little longer from torch,
and cutting it makes a view that a pool would copy as a whole. So the pool gets the longer tensor, and
its own result, far smaller, is cut where it is longer at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import Instr
from fxfuse.vocabulary import Kind
from fxfuse.vocabulary.conv import conv_transpose_untrimmed, leading
from fxfuse.vocabulary.pools import output_size


def late_trims(body: Sequence[Instr], outputs: Sequence[str]) -> dict[int, Callable[..., Any]]:
    """What to call in place of some operators of ``body``, by position; the values in between are longer."""
    made = {out: i for i, instr in enumerate(body) for out in instr.outs}
    readers: dict[str, int] = {}
    for instr in body:
        for name in instr.reads():
            readers[name] = readers.get(name, 0) + 1
    replaced: dict[int, Callable[..., Any]] = {}
    for position, pool in enumerate(body):
        if pool.op not in ("max_pool", "avg_pool"):
            continue
        source: int | None = position
        while source is not None:
            names = list(body[source].reads())
            source = made.get(names[0])
            if source is None or readers[names[0]] > 1 or names[0] in outputs:
                break
            instr = body[source]
            extent = dict(instr.attributes).get("extent")
            if instr.op == "conv_transpose" and extent is not None:
                windows = _windows_inside(pool, extent)
                if windows is not None:
                    replaced[source] = conv_transpose_untrimmed
                    replaced[position] = functools.partial(_pool, vocabulary.lookup(pool.op), windows)
                break
            if vocabulary.lookup(instr.op).kind is not Kind.POINTWISE or len(list(instr.reads())) != 1:
                break
    return replaced


def _windows_inside(pool: Instr, extent: tuple[int, ...]) -> tuple[int, ...] | None:
    """How many windows a pool has on a tensor of size ``extent``; None where one crosses its end, into the padding.

    There it would meet the tail.
    """
    attributes = dict(pool.attributes)
    geometry = zip(extent, attributes["kernel"], attributes["stride"], attributes["padding"], strict=True)
    windows = []
    for (length, k, s, p), d in zip(geometry, attributes.get("dilation", (1,) * len(extent)), strict=True):
        size = output_size(length, k, s, p, d, attributes["ceil_mode"])
        if (size - 1) * s - p + d * (k - 1) + 1 > length:
            return None
        windows.append(size)
    return tuple(windows)


def _pool(op: vocabulary.Op, windows: tuple[int, ...], x: Tensor, **attributes: Any) -> Tensor:
    """``op`` on a tensor that may be longer than it was meant for, cut to the ``windows`` that it should have."""
    y: Tensor = op.fn(x, **attributes)
    return leading(y, windows)
