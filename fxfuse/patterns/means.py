"""Means and sums over space: of affine maps, and of a transposed convolution."""

from __future__ import annotations

import math

import torch
from torch import fx

from fxfuse.chain import Builder, attributes, dtype, op_name, op_of, operands, sizes
from fxfuse.patterns.affine import channel_constant, foldable
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule


class MoveAffineBehindMean(Rule):
    """mean(a*y + c) = a*mean(y) + c over dims along which a and c are constant

    Multiplication, division, addition, subtraction, negation, and BatchNorm with given statistics.
    An affine map of a convolution is left to the rules that fold it into the weights.
    """

    legality = Legality.REASSOCIATING
    pattern = P("mean", P(("mul", "div", "add", "sub", "neg", "batch_norm"), name="map"), name="mean")

    def check(self, match: Match) -> Reject | None:
        node, mean = match["map"], match["mean"]
        dims = attributes(mean)["dims"]
        if op_name(node) == "batch_norm":
            value = operands(node)[0]
            if 1 in dims:
                return Reject("the mean runs over the channels", mean)
            if 0 in dims and not attributes(mean)["keepdim"]:
                return Reject("the channels would be another dim", mean)
        else:
            value = self._value(node)
            if value is None:
                return Reject("both operands vary along the averaged dims", node)
            if operands(node)[0] is not value and op_name(node) == "div":
                return Reject("the value is the divisor", node)
        if dtype(node) is not dtype(value):
            return Reject("the map changes the dtype", node)
        if not dtype(node).is_floating_point:
            return Reject("a mean of integers", node)
        if not attributes(mean)["keepdim"] and sizes(mean) is None:
            return Reject("dropped dims need sizes that are known", mean)
        conv = value if op_name(value) == "conv_transpose" else None
        if conv is not None and foldable(conv) is None:
            other = self._other(node, value)
            if op_name(node) == "batch_norm" or channel_constant(other, conv) is None:
                return Reject("the map folds into the convolution's weights instead", node)
        return None

    def _value(self, node: fx.Node) -> fx.Node | None:
        """The operand of ``node``'s own shape, where all others are constant along the averaged dims."""
        (mean,) = node.users
        dims = attributes(mean)["dims"]
        tensors = [o for o in operands(node) if isinstance(o, fx.Node)]
        if len(set(tensors)) < len(tensors):
            return None
        for value in tensors:
            if sizes(value) is None or sizes(value) != sizes(node):
                continue
            if all(o is value or _constant_along(o, dims, node) for o in tensors):
                return value
        return None

    @staticmethod
    def _other(node: fx.Node, value: fx.Node) -> object:
        rest = [a for a in operands(node) if a is not value]
        return rest[0] if rest else 1.0

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        node, mean = match["map"], match["mean"]
        value = operands(node)[0] if op_name(node) == "batch_norm" else self._value(node)
        kept = build.call("mean", value, dims=attributes(mean)["dims"], keepdim=True)
        new = build.call(op_of(node).name, *(kept if a is value else a for a in operands(node)), **attributes(node))
        if attributes(mean)["keepdim"]:
            return new
        return build.call("reshape", new, shape=sizes(mean))


#: attributes of a convolution that have one value per spatial dim
_GEOMETRY = ("stride", "padding", "output_padding", "dilation")


def _known(node: fx.Node) -> tuple[int, ...]:
    shape = sizes(node)
    assert shape is not None
    return shape


def _constant_along(operand: fx.Node, dims: tuple[int, ...], node: fx.Node) -> bool:
    """Whether an operand of ``node`` has size 1 along ``dims`` (of ``node``'s shape)."""
    shape = sizes(operand)
    return shape == () or (
        shape is not None and len(shape) == len(sizes(node) or ()) and all(shape[d] == 1 for d in dims)
    )


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
        conv, reduce = match["conv"], match["reduce"]
        spatial = len(attributes(conv)["stride"])
        if conv.meta["val"].dim() != spatial + 2:
            return Reject("an input without a batch dim has its channels elsewhere", conv)
        dims = attributes(reduce)["dims"]
        if not dims or min(dims) < 2:
            return Reject(f"dims {dims} are not dims of space alone", reduce)
        if len(dims) < spatial and dtype(conv) not in (torch.float32, torch.float64):
            return Reject(f"sums along some dims may overflow in {dtype(conv)}", reduce)
        out, x, weight = sizes(conv), sizes(operands(conv)[0]), sizes(operands(conv)[1])
        if out is None or x is None or weight is None:
            return Reject("the boxes of inputs need sizes that are known", conv)
        if attributes(conv)["extent"] is not None:
            return Reject("some outputs are already dropped", conv)
        if 0 in (*out, *x):
            return Reject("the tensor is empty", conv)
        boxes = self._boxes(conv)
        if any(not any(high > low for low, high in boxes[d - 2]) for d in dims):
            return Reject("no tap reaches an output", conv)
        return None

    @staticmethod
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

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, reduce = match["conv"], match["reduce"]
        x, weight, bias = operands(conv)
        narrow, wide = dtype(conv), torch.promote_types(dtype(conv), torch.float32)
        if narrow is not wide:  # sums of 16-bit values overflow: as torch, accumulate in float32
            x, weight = (build.call("cast", v, dtype=wide) for v in (x, weight))
            bias = None if bias is None else build.call("cast", bias, dtype=wide)
        dims, boxes = attributes(reduce)["dims"], self._boxes(conv)
        live = tuple(tuple(t for t, (low, high) in enumerate(boxes[d - 2]) if high > low) for d in dims)
        kept = tuple(tuple(boxes[d - 2][t] for t in taps) for d, taps in zip(dims, live, strict=True))
        sums = build.call("tap_sums", x, dims=dims, boxes=kept)
        rest = [d for d in range(len(boxes)) if d + 2 not in dims]
        along = {k: tuple(attributes(conv)[k][d] for d in rest) for k in _GEOMETRY}
        total = build.call(
            "contract_taps", sums, weight, dims=dims, taps=live, groups=attributes(conv)["groups"], **along
        )
        count = math.prod(_known(conv)[d] for d in dims)
        if op_name(reduce) == "mean":
            total = build.call("mul", total, 1.0 / count)
        if bias is not None:
            column = build.call("reshape", bias, shape=(-1, *(1 for _ in boxes)))
            total = build.call("add", total, column if op_name(reduce) == "mean" else build.call("mul", column, count))
        if not attributes(reduce)["keepdim"]:
            total = build.call("reshape", total, shape=sizes(reduce))
        return total if narrow is wide else build.call("cast", total, dtype=narrow)
