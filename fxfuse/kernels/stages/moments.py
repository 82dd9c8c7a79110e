"""Means, variances, maxima and softmaxes over all of space as statistics and arithmetic: see `norms`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxfuse.instr import Instr, Ref
from fxfuse.kernels.stages.splitter import Splitter

#: what statistics are made of where it is over all of space, of a value that is gathered
OVER_SPACE = frozenset({"adaptive_max_pool", "amax", "max", "amin", "min", "logsumexp", "softmax", "log_softmax"})


def mean(s: Splitter, instr: Instr, value: str) -> bool:
    return _mean(s, instr, value, dict(instr.attributes)["dims"], 1.0)


def total(s: Splitter, instr: Instr, value: str) -> bool:
    dims = dict(instr.attributes)["dims"]
    return _mean(s, instr, value, dims, float(s.size(value, dims)))


def adaptive_avg_pool(s: Splitter, instr: Instr, value: str) -> bool:
    size, spatial = dict(instr.attributes)["size"], tuple(range(2, len(s.types[value].shape)))
    return size == (1,) * len(spatial) and _mean(s, instr, value, spatial, 1.0)


def _mean(s: Splitter, instr: Instr, value: str, dims: tuple[int, ...], factor: float) -> bool:
    """The mean over all spatial dims, and perhaps over samples or channels, times ``factor``."""
    over = s.over(instr, value, dims)
    if over is None:
        return False
    # (mean of steps) = (steps of mean), as far as the steps are the same for all samples and channels in it
    source, before = s.mapped.get(value, (value, ())) if dims[0] == 2 else (value, ())
    made = s.statistics(source, **over)[0]
    for op, operand in (*before, *([("mul", factor)] if factor != 1.0 else [])):
        made = s.call(op, Ref(made), operand)
    return s.reduced(instr, value, made)


def deviation(s: Splitter, instr: Instr, value: str) -> bool:
    attributes = dict(instr.attributes)
    over, count = s.over(instr, value, attributes["dims"]), s.size(value, attributes["dims"])
    freedom = count - attributes["correction"]
    if over is None or freedom <= 0:
        return False
    var = s.statistics(value, **over)[1]
    if freedom != count:
        var = s.call("mul", Ref(var), count / freedom)
    return s.reduced(instr, value, s.call("sqrt", Ref(var)) if instr.op == "std" else var)


def vector_norm(s: Splitter, instr: Instr, value: str) -> bool:
    """The root of the sum of squares, where nothing but squares are wanted of ``value``."""
    attributes = dict(instr.attributes)
    over, count = s.over(instr, value, attributes["dims"]), s.size(value, attributes["dims"])
    if over is None or attributes["ord"] != 2 or count == 1 or s.readers[value] != 1:
        return False
    narrow = s.types[value].dtype is not torch.float32
    wide = s.call("cast", Ref(value), dtype=torch.float32) if narrow else value
    squares = s.statistics(s.call("square", Ref(wide)), **over)[0]
    summed = s.call("mul", Ref(squares), float(count))
    return s.reduced(instr, value, s.call("sqrt", Ref(summed)))


def adaptive_max_pool(s: Splitter, instr: Instr, value: str) -> bool:
    """One window, all of space, as a reduction: many threads make it, and not one."""
    size, spatial = dict(instr.attributes)["size"], tuple(range(2, len(s.types[value].shape)))
    if size != (1,) * len(spatial):
        return False
    if s.gathered(value):
        return s.reduced(instr, value, s.once("extremes", value)[0])
    s.call("amax", Ref(value), outs=instr.outs, dims=spatial, keepdim=True)
    return True


def maximum(s: Splitter, instr: Instr, value: str) -> bool:
    return _over_space(s, instr, value) and s.reduced(instr, value, s.once("extremes", value)[0])


def minimum(s: Splitter, instr: Instr, value: str) -> bool:
    return _over_space(s, instr, value) and s.reduced(instr, value, s.once("extremes", value)[1])


def logsumexp(s: Splitter, instr: Instr, value: str) -> bool:
    return _over_space(s, instr, value) and s.reduced(instr, value, s.once("exponentials", value)[3])


def softmax(s: Splitter, instr: Instr, value: str) -> bool:
    return _over_space(s, instr, value) and _softmax(s, value, instr.outs[0], log=instr.op == "log_softmax")


def _over_space(s: Splitter, instr: Instr, value: str) -> bool:
    attributes, kind = dict(instr.attributes), s.types[value]
    dims = attributes.get("dims") or (attributes["dim"],)
    alike = s.types[instr.outs[0]].dtype is kind.dtype
    return alike and tuple(dims) == tuple(range(2, len(kind.shape))) and s.gathered(value)


def over_flattened(s: Splitter, there: Instr, instr: Instr, value: str, out: str) -> bool:
    """A softmax over the last dims, which the reshape ``there`` makes one."""
    shape, flat = s.types[value].shape, dict(there.attributes)["shape"]
    count = len(shape) - len(flat) + 1
    if dict(instr.attributes)["dim"] != len(flat) - 1 or count < 1 or shape[: len(flat) - 1] != flat[:-1]:
        return False
    log = instr.op == "log_softmax"
    if count != len(shape) - 2 or not _softmax(s, value, out, log=log):
        s.call("softmax_over", Ref(value), outs=(out,), count=count, log=log)
    return True


def _softmax(s: Splitter, value: str, out: str, *, log: bool) -> bool:
    """Over all of space: an exponential's part of their sum, or its logarithm."""
    if not s.gathered(value):
        return False
    most, scale, logarithm, _ = map(Ref, s.once("exponentials", value))
    steps = [("sub", most), ("sub", logarithm)] if log else [("exp_below", most), ("mul", scale)]
    s.finish(value, steps, out)
    return True


#: what takes an operator apart, or says that it has not this form
MOMENTS: Mapping[str, Callable[[Splitter, Instr, str], bool]] = {
    "mean": mean,
    "sum": total,
    "var": deviation,
    "std": deviation,
    "vector_norm": vector_norm,
    "adaptive_avg_pool": adaptive_avg_pool,
    "adaptive_max_pool": adaptive_max_pool,
    "amax": maximum,
    "max": maximum,
    "amin": minimum,
    "min": minimum,
    "logsumexp": logsumexp,
    "softmax": softmax,
    "log_softmax": softmax,
}
