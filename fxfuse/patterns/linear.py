"""Linear operators behind a transposed convolution that become other weights of it.

They add weights up before an input meets them. Where an input is Inf, weights of opposite sign would
have made a NaN that their sum does not make: these rules need finite values.
"""

from __future__ import annotations

import math

from torch import fx

from fxfuse.chain import Builder, attributes, op_name, op_of, operands, sizes
from fxfuse.patterns.placement import batched, foldable, shifted
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule
from fxfuse.vocabulary.conv import output_size


class FoldChannelSumIntoConvTranspose(Rule):
    """sum over channels of conv(x; W, b) = conv(x; sum over output channels of W, sum of b)

    Also the mean over channels. The result has one output channel and no groups.
    """

    legality = Legality.FINITE_ONLY
    pattern = P(("sum", "mean"), P("conv_transpose", name="conv"), name="reduce")

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        return match if match is not None and attributes(root)["dims"] == (1,) else None

    def check(self, match: Match) -> Reject | None:
        conv, reduce = match["conv"], match["reduce"]
        if not batched(conv):
            return Reject("an input without a batch dim has its channels elsewhere", conv)
        if not attributes(reduce)["keepdim"] and sizes(reduce) is None:
            return Reject("dropped dims need sizes that are known", reduce)
        return foldable(conv)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, reduce = match["conv"], match["reduce"]
        x, weight, bias = operands(conv)
        channels = int(conv.meta["val"].shape[1])
        weight = build.call("sum", weight, dims=(1,), keepdim=True)
        bias = None if bias is None else build.call("sum", bias, dims=(0,), keepdim=True)
        if op_name(reduce) == "mean":
            weight = build.call("mul", weight, 1.0 / channels)
            bias = None if bias is None else build.call("mul", bias, 1.0 / channels)
        result = build.call("conv_transpose", x, weight, bias, **{**attributes(conv), "groups": 1})
        return result if attributes(reduce)["keepdim"] else build.call("reshape", result, shape=sizes(reduce))


class FoldAvgPoolIntoConvTranspose(Rule):
    """avg_pool(conv(x; W, b; s, p, d); k', s') = conv(x; G, b; s/s', P), G[t] = 1/k' * sum of W over one window

    Per dim, unpadded, floor mode, s a multiple of s'. z[j] = sum over i of x[i] * g(s'*j - s*i) with
    g(m) = 1/k' * sum of W[k] over m + p <= k*d < m + p + k'; so G[t] = g(s'*(t - P)) with
    P = floor((p + k' - 1) / s'). Applied where G has no more taps than W.
    """

    legality = Legality.FINITE_ONLY
    pattern = P("avg_pool", P("conv_transpose", name="conv"), name="pool")

    def check(self, match: Match) -> Reject | None:
        conv, pool = match["conv"], match["pool"]
        geometry = attributes(pool)
        if not batched(conv):
            return Reject("an input without a batch dim has its channels elsewhere", conv)
        if len(geometry["kernel"]) != len(attributes(conv)["stride"]):
            return Reject("the pool's dims are not the convolution's spatial dims", pool)
        if any(geometry["padding"]) or geometry["ceil_mode"] or geometry["divisor_override"] is not None:
            return Reject("padding, ceil_mode or divisor_override weigh border values differently", pool)
        for s, s2 in zip(attributes(conv)["stride"], geometry["stride"], strict=True):
            if s % s2:
                return Reject(f"the convolution's stride {s} is not a multiple of the pool's {s2}", pool)
        if sizes(pool) is None or sizes(operands(conv)[0]) is None or sizes(operands(conv)[1]) is None:
            return Reject("the merged kernel needs sizes that are known", conv)
        merged = math.prod(len(w) for w in self._windows(conv, pool)[0])
        plain = math.prod(operands(conv)[1].meta["val"].shape[2:])
        if merged > plain:
            return Reject(f"the merged kernel would have {merged} taps instead of {plain}", pool)
        return foldable(conv)

    @staticmethod
    def _windows(
        conv: fx.Node, pool: fx.Node
    ) -> tuple[tuple[tuple[tuple[int, int], ...], ...], tuple[int, ...], tuple[int, ...], bool]:
        """Per dim the ranges of W's taps behind G's; the new stride and padding; whether its output is too long."""
        x, weight, out = sizes(operands(conv)[0]), sizes(operands(conv)[1]), sizes(pool)
        assert x is not None and weight is not None and out is not None
        windows, strides, paddings, longer = [], [], [], False
        for d, s2 in enumerate(attributes(pool)["stride"]):
            s, p, dilation = (attributes(conv)[k][d] for k in ("stride", "padding", "dilation"))
            k, k2 = weight[2 + d], attributes(pool)["kernel"][d]
            padding = (p + k2 - 1) // s2
            taps = max(((k - 1) * dilation - p) // s2 + padding + 1, 1)
            plain = output_size(x[2 + d], taps, s // s2, padding, 0, 1)
            taps += max(out[2 + d] - plain, 0)  # zeros behind: they only lengthen the output
            longer |= plain > out[2 + d]
            starts = [s2 * (t - padding) + p for t in range(taps)]
            windows.append(tuple(_taps_within(m, m + k2, k, dilation) for m in starts))
            strides.append(s // s2)
            paddings.append(padding)
        return tuple(windows), tuple(strides), tuple(paddings), longer

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, pool = match["conv"], match["pool"]
        x, weight, bias = operands(conv)
        windows, stride, padding, longer = self._windows(conv, pool)
        count = math.prod(attributes(pool)["kernel"])
        weight = build.call("mul", build.call("window_sums", weight, windows=windows), 1.0 / count)
        shape = sizes(pool)
        assert shape is not None
        return build.call(
            "conv_transpose",
            x,
            weight,
            bias,
            stride=stride,
            padding=padding,
            output_padding=(0,) * len(stride),
            dilation=(1,) * len(stride),
            groups=attributes(conv)["groups"],
            extent=shape[2:] if longer else None,
        )


def _taps_within(low: int, high: int, kernel: int, dilation: int) -> tuple[int, int]:
    """The half-open range of taps k of ``kernel`` with low <= k*dilation < high; (0, 0) where there is none."""
    first, last = max(0, -(-low // dilation)), min(kernel, (high - 1) // dilation + 1)
    return (first, last) if first < last else (0, 0)


class DropShiftBeforeSoftmax(Rule):
    """softmax(y + c) = softmax(y) for a number c; log_softmax alike

    Softmax divides e^(y+c) by the sum of e^(y+c) along its dim: e^c cancels.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("softmax", "log_softmax"), P(("add", "sub"), name="shift"), name="softmax")

    def check(self, match: Match) -> Reject | None:
        value = shifted(match["shift"])
        return value if isinstance(value, Reject) else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        softmax = match["softmax"]
        return build.call(op_of(softmax).name, shifted(match["shift"]), **attributes(softmax))
