"""Means and sums, also over windows: of affine maps, of BatchNorm, and of a transposed convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxfuse.chain import Builder, attributes, dtype, op_name, op_of, operands, sizes
from fxfuse.patterns.placement import (
    AFFINE,
    LINEAR,
    WIDE,
    affine_value,
    batched,
    moves_behind,
    moves_behind_pool,
    of_numbers,
    source,
)
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule, X


class MoveAffineBehindMean(Rule):
    """mean(a*y + c) = a*mean(y) + c over dims along which a and c are constant

    Multiplication, division, addition, subtraction, negation, and BatchNorm with given statistics; of
    a sum, those without a shift. A map that folds into a convolution's weights is left to do so.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("mean", "sum"), P(AFFINE, name="map"), name="reduce")

    def check(self, match: Match) -> Reject | None:
        value = moves_behind(match["map"], match["reduce"])
        if isinstance(value, Reject):
            return value
        return _folds_instead(match["map"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        node, reduce = match["map"], match["reduce"]
        value = moves_behind(node, reduce)
        keepdim = attributes(reduce)["keepdim"] or not of_numbers(node)
        kept = build.call(op_of(reduce).name, value, dims=attributes(reduce)["dims"], keepdim=keepdim)
        new = _map_of(node, value, kept, build)
        return new if keepdim == attributes(reduce)["keepdim"] else build.call("reshape", new, shape=sizes(reduce))


class MoveAffineBehindAvgPool(Rule):
    """avg_pool(a*y + c) = a*avg_pool(y) + c where a and c are constant over space

    The weights of each window add up to 1: unpadded, floor mode, the divisor the window's size; or an
    adaptive pool, whose windows hold no padding.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("avg_pool", "adaptive_avg_pool"), P(AFFINE, name="map"), name="pool")

    def check(self, match: Match) -> Reject | None:
        value = moves_behind_pool(match["map"], match["pool"])
        return value if isinstance(value, Reject) else _folds_instead(match["map"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        node, pool = match["map"], match["pool"]
        value = moves_behind_pool(node, pool)
        assert isinstance(value, fx.Node)
        return _map_of(node, value, build.call(op_of(pool).name, value, **attributes(pool)), build)


def _folds_instead(node: fx.Node) -> Reject | None:
    return None if source(node) is None else Reject("the map folds into the convolution's weights instead", node)


def _map_of(node: fx.Node, value: fx.Node | Reject, other: fx.Node, build: Builder) -> fx.Node:
    """The map ``node`` of ``other`` in place of its operand ``value``."""
    return build.call(op_of(node).name, *(other if a is value else a for a in operands(node)), **attributes(node))


class SplitBatchNormBeforeMean(Rule):
    """mean(batch_norm_train(y; g, h)) = mean((y - m)*a + h), a = g / sqrt(v + eps), m and v the statistics of y's batch

    Scale and shift then move behind the mean, so that nothing is normalised but the mean: where nothing
    else reads the normalised value. The variance needs y - m anyway; and its mean, unlike the difference
    of two means, is as exact as before.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("batch_norm_train", "batch_norm_batch"), X, name="norm")

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None:
            return None
        readers = root.users
        if op_of(root).outputs > 1:
            readers = next((u.users for u in root.users if u.args[1] == 0), {})
        match.bound["means"] = [u for u in readers if op_name(u) == "mean"]
        match.bound["others"] = [u for u in readers if op_name(u) != "mean"]
        return match if match["means"] else None

    def check(self, match: Match) -> Reject | None:
        value, mean = operands(match["norm"])[0], match["means"][0]
        if match["others"] or len(match["means"]) > 1:
            return Reject("the normalised value is also used elsewhere")
        if 1 in attributes(mean)["dims"]:
            return Reject("the mean runs over the channels", mean)
        if not attributes(mean)["keepdim"] and sizes(mean) is None:
            return Reject("dropped dims need sizes that are known", mean)
        if dtype(value) not in WIDE:
            return Reject(f"a mean in {dtype(value)} would be rounded before it is normalised")
        conv = source(value)
        if conv is not None and conv is not value:
            return Reject("what lies before it folds into the convolution first", value)
        if conv is not None and batched(conv) and operands(conv)[2] is not None and len(conv.users) == 1:
            return Reject("the convolution's bias cancels first", conv)
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node | tuple[fx.Node, ...]:
        value, gamma, beta = operands(match["norm"])
        shape = (value.meta["val"].shape[1], *(1 for _ in range(value.meta["val"].dim() - 2)))
        statistics = build.call("centre", value)
        new, mean, var, unbiased = (build.output(statistics, i) for i in range(4))
        scale = build.call("rsqrt", build.call("add", var, attributes(match["norm"])["eps"]))
        if gamma is not None:
            scale = build.call("mul", scale, gamma)
        new = build.call("mul", new, build.call("reshape", scale, shape=shape))
        if beta is not None:
            new = build.call("add", new, build.call("reshape", beta, shape=shape))
        return new if op_of(match.root).outputs == 1 else (new, mean, unbiased)


#: attributes of a convolution that have one value per spatial dim
_GEOMETRY = ("stride", "padding", "output_padding", "dilation")


def _known(node: fx.Node) -> tuple[int, ...]:
    shape = sizes(node)
    assert shape is not None
    return shape


class CollapseMeanOfConvTranspose(Rule):
    """sum over outputs of conv(x; W, b) = Q*b + sum over taps t of W_t^T * (sum of x over R_t)

    Q is the number of outputs and R_t the box of inputs whose tap t lands inside, per dim
    [ceil((p - t*d)/s), floor((Q - 1 + p - t*d)/s)] within [0, L-1]. Over all of space no convolution
    remains; over some dims, one in the other dims does, with the taps of the summed dims as channels.
    A tap whose box is empty takes no part; Inf and NaN meet the same weights as in the convolution.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("mean", "sum"), P("conv_transpose", name="conv"), name="reduce")

    def check(self, match: Match) -> Reject | None:
        return _collapse_refusal(match["conv"], match["reduce"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, reduce = match["conv"], match["reduce"]
        return _narrowed(_collapsed(conv, reduce, build), reduce, build)


class CollapseNarrowMean(Rule):
    """mean(f(conv(x; W, b))) = f(mean(conv(x; W, b))) for an affine f per channel, in float32 until f is applied

    For float16 and bfloat16, where weights are not folded and a mean is not rounded before a shift; the
    mean collapses like that of the convolution alone. f is any number of multiplications, divisions,
    additions, subtractions, negations and BatchNorms with given statistics, the last one with a shift.
    """

    legality = Legality.REASSOCIATING
    pattern = P("mean", P(AFFINE, name="last"), name="reduce")

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None or dtype(root) in WIDE or op_name(match["last"]) in LINEAR:
            return None
        maps, value = [], match["last"]
        while op_name(value) in (*AFFINE, "clone"):
            maps.append(value)
            value = affine_value(value, attributes(root)["dims"], rounded=False) if _maps(value) else operands(value)[0]
            if isinstance(value, Reject):
                match.bound["refusal"] = value
                return match
        if op_name(value) != "conv_transpose":
            return None
        match.nodes += [*maps[1:], value]
        match.bound.update(conv=value, maps=[m for m in maps if _maps(m)], refusal=_collapse_refusal(value, root))
        return match

    def check(self, match: Match) -> Reject | None:
        refusal: Reject | None = match["refusal"]
        return refusal

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, reduce = match["conv"], match["reduce"]
        total, value = _collapsed(conv, reduce, build), conv
        for node in reversed(match["maps"]):
            value = affine_value(node, attributes(reduce)["dims"], rounded=False)
            given = [total if o is value else _widened(o, dtype(total), build) for o in operands(node)]
            total = build.call(op_of(node).name, *given, **attributes(node))
        return _narrowed(total, reduce, build)


def _maps(node: fx.Node) -> bool:
    return op_name(node) != "clone"


def _widened(value: Any, wide: torch.dtype, build: Builder) -> Any:
    """A tensor in the dtype ``wide``; a number or None as it is."""
    if not isinstance(value, fx.Node) or dtype(value) is wide:
        return value
    return build.call("cast", value, dtype=wide)


def _narrowed(total: fx.Node, reduce: fx.Node, build: Builder) -> fx.Node:
    """``total``, which has kept all dims, in the shape and the dtype of ``reduce``."""
    if dtype(total) is not dtype(reduce):
        total = build.call("cast", total, dtype=dtype(reduce))
    return total if attributes(reduce)["keepdim"] else build.call("reshape", total, shape=sizes(reduce))


def _collapse_refusal(conv: fx.Node, reduce: fx.Node) -> Reject | None:
    """Why the mean or sum ``reduce`` over the outputs of ``conv`` does not collapse; None where it does."""
    spatial = len(attributes(conv)["stride"])
    if not batched(conv):
        return Reject("an input without a batch dim has its channels elsewhere", conv)
    dims = attributes(reduce)["dims"]
    if not dims or min(dims) < 2:
        return Reject(f"dims {dims} are not dims of space alone", reduce)
    out, x, weight = sizes(conv), sizes(operands(conv)[0]), sizes(operands(conv)[1])
    if out is None or x is None or weight is None:
        return Reject("the boxes of inputs need sizes that are known", conv)
    if attributes(conv)["extent"] is not None and len(dims) < spatial:
        return Reject("some outputs are already dropped", conv)
    if 0 in (*out, *x):
        return Reject("the tensor is empty", conv)
    boxes = _boxes(conv)
    if any(not any(high > low for low, high in boxes[d - 2]) for d in dims):
        return Reject("no tap reaches an output", conv)
    return None


def _boxes(conv: fx.Node) -> list[list[tuple[int, int]]]:
    """Per dim, per tap, the half-open range of inputs that land inside the output."""
    x, weight, out = _known(operands(conv)[0]), _known(operands(conv)[1]), _known(conv)
    stride, padding, dilation = (attributes(conv)[k] for k in ("stride", "padding", "dilation"))
    return [
        [
            (
                max(0, -((t * dilation[d] - padding[d]) // stride[d])),
                min(x[2 + d], (out[2 + d] - 1 + padding[d] - t * dilation[d]) // stride[d] + 1),
            )
            for t in range(weight[2 + d])
        ]
        for d in range(len(x) - 2)
    ]


def _collapsed(conv: fx.Node, reduce: fx.Node, build: Builder) -> fx.Node:
    """The mean or sum over the outputs of ``conv``, all dims kept; in float32 at least."""
    x, weight, bias = operands(conv)
    dims, boxes = attributes(reduce)["dims"], _boxes(conv)
    live = tuple(tuple(t for t, (low, high) in enumerate(boxes[d - 2]) if high > low) for d in dims)
    kept = tuple(tuple(boxes[d - 2][t] for t in taps) for d, taps in zip(dims, live, strict=True))
    sums = build.call("tap_sums", x, dims=dims, boxes=kept)
    rest = [d for d in range(len(boxes)) if d + 2 not in dims]
    along = {k: tuple(attributes(conv)[k][d] for d in rest) for k in _GEOMETRY}
    total = build.call("contract_taps", sums, weight, dims=dims, taps=live, groups=attributes(conv)["groups"], **along)
    count = math.prod(_known(conv)[d] for d in dims)
    if op_name(reduce) == "mean":
        total = build.call("mul", total, 1.0 / count)
    if bias is None:
        return total
    column = _widened(build.call("reshape", bias, shape=(-1, *(1 for _ in boxes))), dtype(total), build)
    return build.call("add", total, column if op_name(reduce) == "mean" else build.call("mul", column, count))
