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
                replaced[source] = conv_transpose_untrimmed
                replaced[position] = functools.partial(_pool, vocabulary.lookup(pool.op), extent)
                break
            if vocabulary.lookup(instr.op).kind is not Kind.POINTWISE or len(list(instr.reads())) != 1:
                break
    return replaced


def _pool(op: vocabulary.Op, extent: tuple[int, ...], x: Tensor, **attributes: Any) -> Tensor:
    """``op`` on a tensor that is at least ``extent`` long, cut to the windows that ``extent`` has.

    A dim in which the last window crosses the end, into the padding, is cut before: the tail is no padding.
    """
    kernel, stride, padding = attributes["kernel"], attributes["stride"], attributes["padding"]
    dilation = attributes.get("dilation", (1,) * len(extent))
    geometry = list(zip(extent, kernel, stride, padding, dilation, strict=True))
    sizes = tuple(output_size(*g, attributes["ceil_mode"]) for g in geometry)
    crosses = [
        (size - 1) * s - p + d * (k - 1) + 1 > length
        for size, (length, k, s, p, d) in zip(sizes, geometry, strict=True)
    ]
    given = x.shape[-len(extent) :]
    x = leading(x, tuple(e if cut else g for e, g, cut in zip(extent, given, crosses, strict=True)))
    return leading(op(x, **attributes), sizes)
