"""Per-channel arithmetic folded into a transposed convolution's weights.

A fold is part of the graph and runs on every call, so it follows any change of the weights. It
touches the weights once, which are as a rule far smaller than the activations it saves a pass over;
where they are not, it is refused.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import fx

from fxfuse.chain import Builder, attributes, op_name, op_of, operands, sizes
from fxfuse.patterns.placement import batched, fold_refusal, foldable
from fxfuse.patterns.rule import Legality, Match, P, Pat, Reject, Rule

OTHER = Pat(name="other")


def _channels(conv: fx.Node) -> int:
    return int(operands(conv)[1].meta["val"].shape[1]) * int(attributes(conv)["groups"])


def _per_channel(build: Builder, value: Any, conv: fx.Node) -> Any:
    """``value`` in a form that broadcasts with a (Cout,) bias: a number, a 0-dim tensor or a vector."""
    if isinstance(value, fx.Node) and value.meta["val"].dim():
        return _vector(build, value, conv)
    return value


def _vector(build: Builder, value: Any, conv: fx.Node) -> fx.Node:
    """``value`` as a (Cout,) vector in the weight's dtype."""
    return build.call("to_channels", value, operands(conv)[1], channels=_channels(conv))


def _conv(build: Builder, conv: fx.Node, weight: Any, bias: Any) -> fx.Node:
    return build.call("conv_transpose", operands(conv)[0], weight, bias, **attributes(conv))


class FoldScaleIntoConvTranspose(Rule):
    """conv(x; W, b) * s = conv(x; W*s, b*s), s one number per output channel

    Also / s and negation. W is (Cin, Cout/groups, *kernel): s runs along its dim 1 and the groups.
    Outputs that no tap reaches are the bias; where there is none they are 0*s, which a NaN in s shows.
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
        return fold_refusal(match.root, match["conv"], match["conv"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, scale = match["conv"], match["other"]
        if op_name(match.root) == "div":
            scale = build.call("reciprocal", scale) if isinstance(scale, fx.Node) else 1.0 / scale
        weight = build.call("scale_weight", operands(conv)[1], scale, groups=attributes(conv)["groups"])
        bias = operands(conv)[2]
        if bias is not None:
            bias = build.call("mul", bias, _per_channel(build, scale, conv))
        elif isinstance(scale, fx.Node) and not _reaches_every_output(conv):
            bias = build.call("mul", _vector(build, scale, conv), 0.0)
        return _conv(build, conv, weight, bias)


def _reaches_every_output(conv: fx.Node) -> bool:
    """Whether each output position is reached by a tap from some input; False where sizes are not known."""
    x, weight, out = sizes(operands(conv)[0]), sizes(operands(conv)[1]), sizes(conv)
    if x is None or weight is None or out is None:
        return False
    first = len(out) - (len(weight) - 2)
    for d, (length, kernel, size) in enumerate(zip(x[first:], weight[2:], out[first:], strict=True)):
        stride, padding, dilation = (attributes(conv)[k][d] for k in ("stride", "padding", "dilation"))
        reached = {i * stride - padding + k * dilation for i, k in itertools.product(range(length), range(kernel))}
        if not reached.issuperset(range(size)):
            return False
    return True


class FoldShiftIntoConvTranspose(Rule):
    """conv(x; W, b) + t = conv(x; W, b + t), t one number per output channel

    Also - t, and t - conv(x; W, b) = conv(x; -W, t - b).
    """

    legality = Legality.REASSOCIATING
    pattern = P(("add", "sub"), P("conv_transpose", name="conv"), OTHER, commutative=True)

    def check(self, match: Match) -> Reject | None:
        return fold_refusal(match.root, match["conv"], match["conv"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, shift = match["conv"], match["other"]
        weight, bias = operands(conv)[1], operands(conv)[2]
        negative = op_name(match.root) == "sub" and operands(match.root)[0] is conv  # conv - t, not t - conv
        if op_name(match.root) == "sub" and not negative:
            weight = build.call("neg", weight)
        if bias is not None:
            shift = _per_channel(build, shift, conv)
            given = (bias, shift) if negative or op_name(match.root) == "add" else (shift, bias)
            return _conv(build, conv, weight, build.call(op_of(match.root).name, *given))
        if negative and not isinstance(shift, fx.Node):
            return _conv(build, conv, weight, _vector(build, -shift, conv))
        shift = _vector(build, shift, conv)
        return _conv(build, conv, weight, build.call("neg", shift) if negative else shift)


class FoldBatchNormIntoConvTranspose(Rule):
    """batch_norm(conv(x; W, b); m, v, g, h) = conv(x; W*a, (b - m)*a + h), a = g / sqrt(v + eps)

    With given statistics only (eval mode).
    """

    legality = Legality.REASSOCIATING
    pattern = P("batch_norm", P("conv_transpose", name="conv"), name="norm")

    def check(self, match: Match) -> Reject | None:
        return fold_refusal(match["norm"], match["conv"], match["conv"])

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
        weight = build.call("scale_weight", operands(conv)[1], scale, groups=attributes(conv)["groups"])
        return _conv(build, conv, weight, bias)


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
        if not batched(conv):
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
