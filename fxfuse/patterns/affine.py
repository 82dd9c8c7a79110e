"""Per-channel arithmetic folded into a transposed convolution's weights.

A fold is part of the graph and runs on every call, so it follows any change of the weights. It
touches the weights once, which are far smaller than the activations it saves a pass over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfuse.chain import Builder, attributes, dtype, op_name, op_of, operands, sizes
from fxfuse.patterns.rule import Legality, Match, P, Pat, Reject, Rule

#: scaling 16-bit weights would round them a second time
_WIDE = (torch.float32, torch.float64)
OTHER = Pat(name="other")


def channel_constant(value: Any, conv: fx.Node) -> Reject | None:
    """None where ``value`` is one number per output channel of ``conv`` (or one in all)."""
    if not isinstance(value, fx.Node):
        return Reject("its other operand is None") if value is None else None
    shape, out = sizes(value), sizes(conv)
    channel_dim = conv.meta["val"].dim() - len(attributes(conv)["stride"]) - 1
    rank = conv.meta["val"].dim()
    if shape is None or len(shape) > rank:
        return Reject("its other operand does not have one value per channel")
    padded = (1,) * (rank - len(shape)) + shape
    if any(s != 1 for d, s in enumerate(padded) if d != channel_dim):
        return Reject("its other operand does not have one value per channel")
    if padded[channel_dim] != 1 and out is not None and padded[channel_dim] != out[channel_dim]:
        return Reject("its other operand broadcasts over the channels")
    return None


def foldable(conv: fx.Node) -> Reject | None:
    """None where arithmetic may move into ``conv``'s weights."""
    if dtype(conv) not in _WIDE:
        return Reject(f"folding would round the {dtype(conv)} weights a second time", conv)
    return None


def _channels(conv: fx.Node) -> int:
    return int(operands(conv)[1].meta["val"].shape[1]) * int(attributes(conv)["groups"])


def _vector(build: Builder, value: Any, conv: fx.Node) -> fx.Node:
    """``value`` as a (Cout,) vector in the weight's dtype."""
    return build.call("to_channels", value, operands(conv)[1], channels=_channels(conv))


def _conv(build: Builder, conv: fx.Node, weight: Any, bias: Any) -> fx.Node:
    return build.call("conv_transpose", operands(conv)[0], weight, bias, **attributes(conv))


class _FoldPointwise(Rule):
    """What folding of ``conv op constant`` has in common."""

    def check(self, match: Match) -> Reject | None:
        conv, root = match["conv"], match.root
        if dtype(root) is not dtype(conv):
            return Reject(f"the result is {dtype(root)}, the convolution {dtype(conv)}")
        if root.meta["val"].dim() != conv.meta["val"].dim():
            return Reject("its other operand adds dims")
        return foldable(conv) or (channel_constant(match["other"], conv) if "other" in match.bound else None)


class FoldScaleIntoConvTranspose(_FoldPointwise):
    """conv(x; W, b) * s = conv(x; W*s, b*s), s one number per output channel

    Also / s and negation. W is (Cin, Cout/groups, *kernel): s runs along its dim 1 and the groups.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("mul", "div"), P("conv_transpose", name="conv"), OTHER, commutative=True)

    def match(self, root: fx.Node) -> Match | None:
        if op_name(root) == "neg" and op_name(operands(root)[0]) == "conv_transpose":
            match = Match(root)
            match.nodes = [root, operands(root)[0]]
            match.bound = {"conv": operands(root)[0], "other": -1.0}
            return match
        return super().match(root)

    def check(self, match: Match) -> Reject | None:
        if op_name(match.root) == "div" and operands(match.root)[0] is not match["conv"]:
            return Reject("the convolution is the divisor")
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, scale = match["conv"], match["other"]
        if op_name(match.root) == "div":
            scale = build.call("reciprocal", scale) if isinstance(scale, fx.Node) else 1.0 / scale
        weight = build.call("scale_weight", operands(conv)[1], scale, groups=attributes(conv)["groups"])
        bias = operands(conv)[2]
        if bias is not None:
            bias = build.call("mul", bias, _vector(build, scale, conv))
        return _conv(build, conv, weight, bias)


class FoldShiftIntoConvTranspose(_FoldPointwise):
    """conv(x; W, b) + t = conv(x; W, b + t), t one number per output channel

    Also - t, and t - conv(x; W, b) = conv(x; -W, t - b).
    """

    legality = Legality.REASSOCIATING
    pattern = P(("add", "sub"), P("conv_transpose", name="conv"), OTHER, commutative=True)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, shift = match["conv"], match["other"]
        weight, bias = operands(conv)[1], operands(conv)[2]
        shift = _vector(build, shift, conv)
        if op_name(match.root) == "add":
            return _conv(build, conv, weight, shift if bias is None else build.call("add", bias, shift))
        if operands(match.root)[0] is conv:
            negative = build.call("neg", shift) if bias is None else build.call("sub", bias, shift)
            return _conv(build, conv, weight, negative)
        return _conv(build, conv, build.call("neg", weight), shift if bias is None else build.call("sub", shift, bias))


class FoldBatchNormIntoConvTranspose(Rule):
    """batch_norm(conv(x; W, b); m, v, g, h) = conv(x; W*a, (b - m)*a + h), a = g / sqrt(v + eps)

    With given statistics only (eval mode).
    """

    legality = Legality.REASSOCIATING
    pattern = P("batch_norm", P("conv_transpose", name="conv"), name="norm")

    def check(self, match: Match) -> Reject | None:
        conv, norm = match["conv"], match["norm"]
        if conv.meta["val"].dim() != len(attributes(conv)["stride"]) + 2:
            return Reject("an input without a batch dim has its channels elsewhere", conv)
        if any(isinstance(a, fx.Node) and dtype(a) is not dtype(conv) for a in operands(norm)[1:]):
            return Reject("the statistics are of another dtype than the convolution", norm)
        return foldable(conv)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, norm = match["conv"], match["norm"]
        _, mean, var, gamma, beta = operands(norm)
        scale = build.call("rsqrt", build.call("add", var, attributes(norm)["eps"]))
        if gamma is not None:
            scale = build.call("mul", scale, gamma)
        shift = build.call("neg", mean) if operands(conv)[2] is None else build.call("sub", operands(conv)[2], mean)
        bias = build.call("mul", shift, scale)
        if beta is not None:
            bias = build.call("add", bias, beta)
        return _conv(
            build, conv, build.call("scale_weight", operands(conv)[1], scale, groups=attributes(conv)["groups"]), bias
        )


class CancelBiasBeforeStatistics(Rule):
    """norm(conv(x; W, b)) = norm(conv(x; W, 0)) where the statistics are per channel

    For training-mode BatchNorm, InstanceNorm, and GroupNorm with one channel per group; a kept mean
    gets b back. b - b, zero unless b is Inf or NaN, is added so that these spread as before.
    """

    legality = Legality.REASSOCIATING
    pattern = P(
        ("batch_norm_train", "batch_norm_batch", "instance_norm", "group_norm"),
        P("conv_transpose", name="conv"),
        name="norm",
    )

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        return match if match is not None and operands(match["conv"])[2] is not None else None

    def check(self, match: Match) -> Reject | None:
        conv, norm = match["conv"], match["norm"]
        if conv.meta["val"].dim() != len(attributes(conv)["stride"]) + 2:
            return Reject("an input without a batch dim has its channels elsewhere", conv)
        if op_name(norm) == "group_norm" and attributes(norm)["groups"] != _channels(conv):
            return Reject(
                f"{attributes(norm)['groups']} groups of {_channels(conv)} channels: a group's mean mixes biases", norm
            )
        return foldable(conv)

    def rewrite(self, match: Match, build: Builder) -> fx.Node | tuple[fx.Node, ...]:
        conv, norm = match["conv"], match["norm"]
        bias = operands(conv)[2]
        plain = _conv(build, conv, operands(conv)[1], None)
        zero = build.call("sub", bias, bias)
        *_, gamma, beta = operands(norm)
        beta = zero if beta is None else build.call("add", beta, zero)
        new = build.call(op_of(norm).name, plain, gamma, beta, **attributes(norm))
        if op_of(norm).outputs == 1:
            return new
        y, mean, var = (build.output(new, i) for i in range(3))
        return y, build.call("add", mean, bias), build.call("add", var, zero)
