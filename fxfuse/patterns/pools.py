"""Pools of pools and of monotone maps, and means of pools."""

from __future__ import annotations

from torch import fx

from fxfuse.chain import Builder, attributes, op_name, op_of, operands, sizes
from fxfuse.patterns.placement import (
    AFFINE,
    MONOTONE,
    composed_average,
    crops_convolution,
    moves_behind_pool,
    plain_average,
    source,
    stays_before_max_pool,
)
from fxfuse.patterns.rule import Legality, Match, P, Reject, Rule, X
from fxfuse.vocabulary.pools import output_size


class ComposeMaxPools(Rule):
    """max_pool(max_pool(x; k1, s1, p1); k2, s2, p2) = max_pool(x; k1 + (k2-1)*s1, s1*s2, p1 + s1*p2)

    Per dim, where the inner windows leave no gap (s1 <= k1, or k2 = 1) and nothing is dilated. With
    p2 = 0 and both in floor mode the output sizes agree: (floor(a/s1) - b) / s2 rounds as a/(s1*s2).
    Otherwise the composed pool could read inputs that no inner window reads, so the input is cropped
    to min(L, (O1-1)*s1 - p1 + k1), O1 the inner windows that the outer pool is given, and the sizes are
    compared. NaN wins in both; but ties between equal values route their gradient to another winner.
    """

    legality = Legality.BITWISE
    forward_only = True
    pattern = P("max_pool", X, name="outer")

    def match(self, root: fx.Node) -> Match | None:
        match = super().match(root)
        if match is None:
            return None
        inner = operands(root)[0]
        while op_name(inner) == "crop":  # left by an earlier composition
            match.nodes.append(inner)
            inner = operands(inner)[0]
        if op_name(inner) != "max_pool":
            return None
        match.nodes.append(inner)
        match.bound["inner"] = inner
        return match

    def check(self, match: Match) -> Reject | None:
        inner, outer = match["inner"], match["outer"]
        if len(attributes(inner)["kernel"]) != len(attributes(outer)["kernel"]):
            return Reject("the pools run over different dims", outer)
        for node in (inner, outer):
            if any(d != 1 for d in attributes(node)["dilation"]):
                return Reject(f"dilation {attributes(node)['dilation']} makes a window with holes", node)
        k1, s1, k2 = attributes(inner)["kernel"], attributes(inner)["stride"], attributes(outer)["kernel"]
        for k, s, second in zip(k1, s1, k2, strict=True):
            if s > k and second > 1:
                return Reject(f"stride {s} > kernel {k} leaves gaps between the inner windows", inner)
        if self._plain(inner, outer):
            return None
        if sizes(operands(inner)[0]) is None:
            return Reject("padding or ceil_mode of the outer pool needs sizes that are known", outer)
        if self._crop(inner, outer) is None:
            return Reject("no single window gives both pools' output sizes", outer)
        return None

    @staticmethod
    def _plain(inner: fx.Node, outer: fx.Node) -> bool:
        floors = not attributes(inner)["ceil_mode"] and not attributes(outer)["ceil_mode"]
        return floors and not any(attributes(outer)["padding"]) and operands(outer)[0] is inner

    @staticmethod
    def _composed(inner: fx.Node, outer: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        one, two = attributes(inner), attributes(outer)
        dims = range(len(one["kernel"]))
        kernel = tuple(one["kernel"][d] + (two["kernel"][d] - 1) * one["stride"][d] for d in dims)
        stride = tuple(one["stride"][d] * two["stride"][d] for d in dims)
        padding = tuple(one["padding"][d] + one["stride"][d] * two["padding"][d] for d in dims)
        return kernel, stride, padding

    def _crop(self, inner: fx.Node, outer: fx.Node) -> tuple[tuple[int, ...], bool] | None:
        """The input extent that the inner windows read, and the composed ceil_mode; None if no mode fits."""
        kernel, stride, padding = self._composed(inner, outer)
        length = sizes(operands(inner)[0])
        between, wanted = sizes(operands(outer)[0]), sizes(outer)
        assert length is not None and between is not None and wanted is not None
        first = len(length) - len(kernel)
        one = attributes(inner)
        extent = tuple(
            min(length[first + d], (between[first + d] - 1) * one["stride"][d] - one["padding"][d] + one["kernel"][d])
            for d in range(len(kernel))
        )
        for ceil_mode in (False, True):
            if ceil_mode and any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
                continue  # written out as explicit padding, where ceil_mode counts otherwise
            if all(
                output_size(extent[d], kernel[d], stride[d], padding[d], 1, ceil_mode) == wanted[first + d]
                for d in range(len(kernel))
            ):
                return extent, ceil_mode
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        inner, outer = match["inner"], match["outer"]
        kernel, stride, padding = self._composed(inner, outer)
        x, ceil_mode = operands(inner)[0], False
        if not self._plain(inner, outer):
            crop = self._crop(inner, outer)
            assert crop is not None
            extent, ceil_mode = crop
            if extent != tuple(x.meta["val"].shape[-len(extent) :]):
                x = build.call("crop", x, extent=extent)
        return build.call(
            "max_pool",
            x,
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=(1,) * len(kernel),
            ceil_mode=ceil_mode,
        )


class ComposeAvgPools(Rule):
    """avg_pool(avg_pool(x; k1, s1); k2, s2) = avg_pool(x; k1 + (k2-1)*s1, s1*s2)

    Per dim, where the inner windows tile (s1 = k1) or k2 = 1: then every input of the composed window
    counts once. Unpadded, floor mode, the divisor the window's size.
    """

    legality = Legality.REASSOCIATING
    pattern = P("avg_pool", P("avg_pool", name="inner"), name="outer")

    def check(self, match: Match) -> Reject | None:
        return composed_average(match["inner"], match["outer"])

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        one, two = attributes(match["inner"]), attributes(match["outer"])
        dims = range(len(one["kernel"]))
        return build.call(
            "avg_pool",
            operands(match["inner"])[0],
            kernel=tuple(one["kernel"][d] + (two["kernel"][d] - 1) * one["stride"][d] for d in dims),
            stride=tuple(one["stride"][d] * two["stride"][d] for d in dims),
            padding=(0,) * len(dims),
            ceil_mode=False,
            count_include_pad=True,
            divisor_override=None,
        )


class MergeAvgPoolIntoMean(Rule):
    """mean(avg_pool(x; k, s)) = mean(x up to the last position that a window reads)

    Over space alone, and all dims that windows have, where these tile (s = k): each of these positions
    counts once. Unpadded, floor mode, the divisor the window's size. Where windows leave positions out,
    x is made of the outputs of a convolution, of which as many are dropped.
    """

    legality = Legality.REASSOCIATING
    pattern = P("mean", P("avg_pool", X, name="pool"), name="reduce")

    def check(self, match: Match) -> Reject | None:
        pool, reduce = match["pool"], match["reduce"]
        value, given = operands(pool)[0], attributes(pool)
        refusal = plain_average(pool)
        if refusal is not None:
            return refusal
        alone = len(value.users) == 1  # or no rule moves it
        if alone and op_name(value) == "avg_pool" and composed_average(value, pool) is None:
            return Reject("the pool becomes one with the pool before it", pool)
        if alone and op_name(value) in AFFINE and not isinstance(moves_behind_pool(value, pool), Reject):
            return Reject("the map before the pool moves behind it, or into a convolution", value)
        if min(attributes(reduce)["dims"], default=0) < 2:
            return Reject("the mean runs over samples or channels, too", reduce)
        rank = pool.meta["val"].dim()
        dims = range(rank - len(given["kernel"]), rank)
        for dim, kernel, stride in zip(dims, given["kernel"], given["stride"], strict=True):
            if kernel != stride:
                return Reject(f"stride {stride} != kernel {kernel}: the windows overlap or leave gaps", pool)
            if kernel > 1 and dim not in attributes(reduce)["dims"]:
                return Reject(f"dim {dim}, along which windows lie, is kept", reduce)
        if sizes(pool) is None or sizes(value) is None:
            return Reject("which positions windows read depends on sizes that are not known", pool)
        if self._extent(pool) is not None and not crops_convolution(value, len(given["kernel"])):
            return Reject("positions that no window reads are not those of a convolution alone", value)
        return None

    @staticmethod
    def _extent(pool: fx.Node) -> tuple[int, ...] | None:
        """How many leading positions windows read per dim; None where they read all."""
        out, given, kernel = sizes(pool), sizes(operands(pool)[0]), attributes(pool)["kernel"]
        assert out is not None and given is not None
        read = tuple(o * k for o, k in zip(out[-len(kernel) :], kernel, strict=True))
        return None if read == given[-len(kernel) :] else read

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        pool, reduce = match["pool"], match["reduce"]
        value, extent = operands(pool)[0], self._extent(pool)
        if extent is not None:
            value = build.call("crop", value, extent=extent)
        return build.call("mean", value, **attributes(reduce))


class MoveMonotoneBehindMaxPool(Rule):
    """max_pool(f(x)) = f(max_pool(x)) for a non-decreasing f: relu, clamp, leaky_relu, + c, * c with c > 0

    The maximum of the images is the image of the maximum, also in floating point, where rounding is
    monotone; f then runs on fewer elements. NaN stays NaN, and -Inf, which padding holds, stays out of
    each window. Where f is constant on a window (relu on negative values) the gradient goes elsewhere.
    """

    legality = Legality.BITWISE
    forward_only = True
    pattern = P("max_pool", P(MONOTONE, name="map"), name="pool")

    def check(self, match: Match) -> Reject | None:
        refusal = stays_before_max_pool(match["map"], match["pool"])
        if refusal is None and source(match["map"]) is not None:
            return Reject("the map folds into the convolution's weights instead", match["map"])
        return refusal

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        node, pool = match["map"], match["pool"]
        (value,) = (o for o in operands(node) if isinstance(o, fx.Node))
        smaller = build.call("max_pool", value, **attributes(pool))
        return build.call(op_of(node).name, *(smaller if o is value else o for o in operands(node)), **attributes(node))
