"""Work that nothing reads."""

from __future__ import annotations

from torch import fx

from fxfuse.chain import Builder, attributes, dtype, op_name, op_of, operands, sizes
from fxfuse.patterns.placement import batched, value_over_space
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule, X, label_of


class DropCopies(Rule):
    """clone(x) = x inside a region: nothing is written in place there; nor does a cast to x's own dtype change it"""

    legality = Legality.BITWISE
    pattern = P(("clone", "cast"), X)

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        return match if match is not None and dtype(operands(root)[0]) is dtype(root) else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        value: fx.Node = operands(match.root)[0]
        return value


class DropDeadOutputs(Rule):
    """pool(f(conv(x))) = pool(f(conv(x) up to the last position that a window reads))

    A pool reads the first (O-1)*s - p + d*(k-1) + 1 positions per dim, at most; f is any number of
    pointwise operators whose other operands do not vary over space. Likewise where a rule has cropped
    f(conv(x)). A convolution of another size may be summed in another order.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("max_pool", "avg_pool", "crop"), X, name="reader")

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None:
            return None
        node, chain = operands(root)[0], []
        while isinstance(node, fx.Node) and op_name(node) != "conv_transpose":
            chain.append(node)
            node = value_over_space(node)
        if node is None:
            return None
        match.bound.update(conv=node, chain=chain)
        match.nodes += [*chain, node]
        if self._refusal(node, root) is None and self._extent(node, root) is None:
            return None  # every output is read
        return match

    def check(self, match: Match) -> Reject | None:
        return self._refusal(match["conv"], match["reader"])

    @staticmethod
    def _refusal(conv: fx.Node, reader: fx.Node) -> Reject | None:
        if sizes(conv) is None or sizes(reader) is None:
            return Reject("which outputs are dead depends on sizes that are not known", conv)
        if not batched(conv):
            return Reject("an input without a batch dim has its space elsewhere", conv)
        if op_name(reader) != "crop" and len(attributes(reader)["kernel"]) != len(attributes(conv)["stride"]):
            return Reject("the pool's dims are not the convolution's spatial dims", reader)
        return None

    @staticmethod
    def _extent(conv: fx.Node, reader: fx.Node) -> tuple[int, ...] | None:
        """How many leading outputs are read per dim; None where all are."""
        shape, out = sizes(conv), sizes(reader)
        assert shape is not None and out is not None
        if op_name(reader) == "crop":
            return out[2:]
        extent = []
        for d, k in enumerate(attributes(reader)["kernel"]):
            stride, padding = attributes(reader)["stride"][d], attributes(reader)["padding"][d]
            dilation = attributes(reader)["dilation"][d] if op_name(reader) == "max_pool" else 1
            window = dilation * (k - 1) + 1
            read = (out[2 + d] - 1) * stride - padding + window
            least = window if op_name(reader) == "avg_pool" else 1  # torch.avg_pool3d refuses less than a window
            extent.append(min(shape[2 + d], max(read, least)))
        return tuple(extent) if tuple(extent) != shape[2:] and min(extent) > 0 else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, reader = match["conv"], match["reader"]
        extent = self._extent(conv, reader)
        value = build.call("conv_transpose", *operands(conv), **{**attributes(conv), "extent": extent})
        value.meta["label"] = label_of(conv)
        previous = conv
        for node in reversed(match["chain"]):
            given = [value if a is previous else a for a in operands(node)]
            value, previous = build.call(op_of(node).name, *given, **attributes(node)), node
            value.meta["label"] = label_of(node)
        if op_name(reader) == "crop":
            return value
        return build.call(op_of(reader).name, value, **attributes(reader))
