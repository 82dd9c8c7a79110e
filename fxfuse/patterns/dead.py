"""Work that nothing reads."""

from __future__ import annotations

from torch import fx

from fxfuse.chain import Builder, attributes, op_name, op_of, operands, sizes
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule, X
from fxfuse.vocabulary import Kind


class DropCopies(Rule):
    """clone(x) = x inside a region: nothing is written in place there"""

    legality = Legality.BITWISE
    pattern = P("clone", X)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        value: fx.Node = operands(match.root)[0]
        return value


class DropDeadOutputs(Rule):
    """pool(f(conv(x))) = pool(f(conv(x) up to the last position that a window reads))

    A floor-mode pool reads the first (O-1)*s - p + d*(k-1) + 1 positions per dim; f is any number of
    pointwise operators whose other operands do not vary over space. A convolution of another size may
    be summed in another order.
    """

    legality = Legality.REASSOCIATING
    pattern = P(("max_pool", "avg_pool"), X, name="pool")

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None:
            return None
        node, chain = operands(root)[0], []
        while isinstance(node, fx.Node) and op_name(node) != "conv_transpose":
            value = self._value(node)
            if value is None:
                return None
            chain.append(node)
            node = value
        if not isinstance(node, fx.Node):
            return None
        match.bound.update(conv=node, chain=chain)
        match.nodes += [*chain, node]
        if self._fits(node, root) and self._extent(node, root) is None:
            return None  # every output is read
        return match

    @staticmethod
    def _fits(conv: fx.Node, pool: fx.Node) -> bool:
        spatial = len(attributes(conv)["stride"])
        batched = conv.meta["val"].dim() == spatial + 2 and len(attributes(pool)["kernel"]) == spatial
        return batched and sizes(conv) is not None and sizes(pool) is not None

    @staticmethod
    def _value(node: fx.Node) -> fx.Node | None:
        """The one operand of a pointwise node that varies over space."""
        if op_name(node) is None or op_of(node).kind is not Kind.POINTWISE:
            return None
        same = [a for a in operands(node) if isinstance(a, fx.Node) and sizes(a) == sizes(node)]
        others = [a for a in operands(node) if isinstance(a, fx.Node) and a not in same]
        spatial = node.meta["val"].dim() - 2
        if len(set(same)) != 1 or any(s != 1 for o in others for s in (sizes(o) or (0,))[-spatial:]):
            return None
        if any(o.meta["val"].dim() not in (0, node.meta["val"].dim()) for o in others):
            return None
        return same[0]

    def check(self, match: Match) -> Reject | None:
        conv = match["conv"]
        if sizes(conv) is None:
            return Reject("which outputs are dead depends on sizes that are not known", conv)
        if not self._fits(conv, match["pool"]):
            return Reject("the pool's dims are not the convolution's spatial dims", conv)
        return None

    @staticmethod
    def _extent(conv: fx.Node, pool: fx.Node) -> tuple[int, ...] | None:
        shape, out = sizes(conv), sizes(pool)
        assert shape is not None and out is not None
        extent = []
        for d, k in enumerate(attributes(pool)["kernel"]):
            stride, padding = attributes(pool)["stride"][d], attributes(pool)["padding"][d]
            dilation = attributes(pool)["dilation"][d] if op_name(pool) == "max_pool" else 1
            window = dilation * (k - 1) + 1
            read = (out[2 + d] - 1) * stride - padding + window
            extent.append(min(shape[2 + d], max(read, window)))  # torch refuses a pool of less than a window
        return tuple(extent) if tuple(extent) != shape[2:] and min(extent) > 0 else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv, pool = match["conv"], match["pool"]
        extent = self._extent(conv, pool)
        value = build.call("conv_transpose", *operands(conv), **{**attributes(conv), "extent": extent})
        previous = conv
        for node in reversed(match["chain"]):
            given = [value if a is previous else a for a in operands(node)]
            value, previous = build.call(op_of(node).name, *given, **attributes(node)), node
        return build.call(op_of(pool).name, value, **attributes(pool))
