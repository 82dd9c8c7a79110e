"""Normalisations, means, maxima and softmaxes as statistics and pointwise arithmetic: what kernels are made of.

``(x - mean) / sqrt(var + eps) * weight + bias`` needs x twice: for ``statistics``, which the kernel that
makes x can gather on its way, and for arithmetic that joins the pointwise chain behind it. So does a softmax over all
of space; but where no kernel gathers on its way, one kernel that goes through rows has less to read. Pure.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fxfuse import vocabulary
from fxfuse.instr import Instr, Operand, Ref, TensorType
from fxfuse.kernels.codegen.chains import needed_by
from fxfuse.kernels.codegen.reductions import MOST_CHANNELS, fold_of, rows_of
from fxfuse.program import Program

#: dtypes whose statistics kernels gather
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: what statistics are made of where it is over all of space, of a value that is gathered
OVER_SPACE = frozenset({"adaptive_max_pool", "amax", "max", "amin", "min", "logsumexp", "softmax", "log_softmax"})


def nothing(_value: str) -> bool:
    """No value."""
    return False


def split_norms(
    program: Program,
    types: Mapping[str, TensorType],
    wanted: Callable[[str], bool],
    gathered: Callable[[str], bool] = nothing,
) -> Program:
    """``program`` with the norms and means of ``wanted`` values, as far as they have this form, taken apart.

    ``types``: of every value of the program. ``gathered``: values of which maxima, minima and softmaxes over all of
    space are as well.
    """
    splitter = _Splitter(program, types, gathered)
    viewed = {back.outs[0]: (there, middle) for there, middle, back in _between_views(program, types)}
    for instr in program.body:
        between = viewed.get(instr.outs[0])
        if between is not None and splitter.sees_through(*between, instr.outs[0], wanted):
            continue
        first, split = instr.operands[0], _SPLIT.get(instr.op)
        fits = split is not None and isinstance(first, Ref) and splitter.fits(first.name, wanted)
        if not fits or not split(splitter, instr, first.name):  # type: ignore[misc, union-attr]
            splitter.body.append(instr)
            splitter.follow(instr)
    body = needed_by(splitter.body, program.outputs)  # views that were seen through lead nowhere
    return Program(program.inputs, tuple(body), program.outputs)


def _between_views(program: Program, types: Mapping[str, TensorType]) -> Iterator[tuple[Instr, Instr, Instr]]:
    """What stands between two permutations or two reshapes that cancel: those and it, by nothing else read."""
    readers: dict[str, list[Instr]] = {}
    for instr in program.body:
        for name in instr.reads():
            readers.setdefault(name, []).append(instr)

    def reader_of(instr: Instr) -> Instr | None:
        found = readers.get(instr.outs[0], [])
        alone = len(found) == 1 and instr.outs[0] not in program.outputs
        return found[0] if alone and found[0].operands[0] == Ref(instr.outs[0]) else None

    for there in program.body:
        if there.op not in ("permute", "reshape"):
            continue
        middle = reader_of(there)
        back = reader_of(middle) if middle is not None else None
        if middle is None or back is None or back.op != there.op:
            continue
        if there.op == "permute":
            first, second = (dict(i.attributes)["dims"] for i in (there, back))
            cancels = [first[d] for d in second] == [*range(len(first))]
        else:
            cancels = types[back.outs[0]].shape == types[next(there.reads())].shape
        if cancels:
            yield there, middle, back


def _affine(parameters: Sequence[Operand]) -> list[tuple[str, Operand]]:
    """``* weight + bias``, as far as there are any."""
    return [(op, o) for op, o in zip(("mul", "add"), parameters, strict=False) if o is not None]


class _Splitter:
    def __init__(
        self, program: Program, types: Mapping[str, TensorType], gathered: Callable[[str], bool] = nothing
    ) -> None:
        self.types, self.gathered = types, gathered
        self.taken = {*types}
        self.readers = collections.Counter(n for i in program.body for n in i.reads())
        self.readers.update(program.outputs)
        self.casts = {i.outs[0]: i for i in program.body if i.op == "cast"}
        self.body: list[Instr] = []
        #: value -> the value and the steps per channel that it is made of
        self.mapped: dict[str, tuple[str, tuple[tuple[str, Operand], ...]]] = {}
        self.made: dict[tuple[object, ...], tuple[str, ...]] = {}

    def fits(self, name: str, wanted: Callable[[str], bool]) -> bool:
        source = self.mapped.get(name, (name,))[0]
        kind = self.types[source]
        known = 3 <= len(kind.shape) <= 5 and all(kind.shape)
        return known and kind.dtype in _DTYPES and wanted(source)

    # --- building -----------------------------------------------------------------------------------
    def call(self, op: str, *operands: Operand, outs: tuple[str, ...] | None = None, **attributes: Any) -> str:
        """Add an instruction; the name of its first result."""
        found = vocabulary.lookup(op)
        if outs is None:
            outs = tuple(self._name(f"{op}{len(self.body)}") for _ in range(found.outputs))
        self.body.append(Instr(outs, op, operands, tuple(found.complete(attributes).items())))
        return outs[0]

    def _name(self, wanted: str) -> str:
        while wanted in self.taken:
            wanted += "_"
        self.taken.add(wanted)
        return wanted

    def statistics(self, value: str, *, batch: bool, groups: int, eps: float = 0.0) -> tuple[str, ...]:
        """Names of the mean, the variance and the scale."""
        return self._once("statistics", value, batch=batch, groups=groups, eps=eps)

    def _once(self, op: str, value: str, **attributes: Any) -> tuple[str, ...]:
        key = op, value, *attributes.values()
        if key not in self.made:
            self.call(op, Ref(value), **attributes)
            self.made[key] = self.body[-1].outs
        return self.made[key]

    def per_channel(self, operand: Operand, value: str) -> Operand:
        """A vector of channels in the place of ``value``'s channels."""
        if not isinstance(operand, Ref):
            return operand
        spatial, cast = len(self.types[value].shape) - 2, self.casts.get(operand.name)
        source = operand if cast is None else cast.operands[0]  # a view of an input is no operator's affair
        made = self.call("reshape", source, shape=(-1, *(1 for _ in range(spatial))))
        return Ref(made if cast is None else self.call("cast", Ref(made), **dict(cast.attributes)))

    def affine(self, instr: Instr, value: str, mean: str, scale: str, weight: Operand, bias: Operand) -> None:
        """``(value - mean) * scale * weight + bias``, as the first result of ``instr``."""
        steps = [("sub", Ref(mean)), ("mul", Ref(scale)), *_affine((weight, bias))]
        if all(not isinstance(o, Ref) or self._per_channel(o, value) for _, o in steps):
            self.map(value, steps, instr.outs[0])
        self.finish(value, steps, instr.outs[0])

    def map(self, value: str, steps: Sequence[tuple[str, Operand]], out: str) -> None:
        """Remember that ``out`` is made of ``value`` by these steps."""
        source, before = self.mapped.get(value, (value, ()))
        self.mapped[out] = source, (*before, *steps)

    def _per_channel(self, operand: Ref, value: str) -> bool:
        """Whether an operand of ``value`` is the same all over a channel: what was made here is."""
        if operand.name not in self.types:
            return True
        spatial = len(self.types[value].shape) - 2
        return all(s == 1 for s in self.types[operand.name].shape[-spatial:])

    def finish(self, value: str, steps: Sequence[tuple[str, Operand]], out: str) -> None:
        """The steps, in float32 at least, and rounded once."""
        narrow = self.types[out].dtype is not torch.float32
        for i, (op, operand) in enumerate(steps):
            last = i == len(steps) - 1 and not narrow
            value = self.call(op, Ref(value), operand, outs=(out,) if last else None)
        if narrow:
            self.call("cast", Ref(value), outs=(out,), dtype=self.types[out].dtype)

    def follow(self, instr: Instr) -> None:
        """Numbers that a value made of steps meets are steps, too."""
        if instr.op not in ("add", "sub", "mul", "div") or len(instr.operands) != 2:
            return
        first, second = instr.operands
        if isinstance(first, Ref) and first.name in self.mapped and isinstance(second, (int, float)):
            same = self.types[first.name] == self.types[instr.outs[0]]
            if same and self.types[first.name].dtype.is_floating_point:
                self.map(first.name, [(instr.op, second)], instr.outs[0])

    # --- one operator each; False where it has not this form ----------------------------------------
    def group_norm(self, instr: Instr, value: str) -> bool:
        return self._sample_norm(instr, value, dict(instr.attributes)["groups"])

    def instance_norm(self, instr: Instr, value: str) -> bool:
        return self._sample_norm(instr, value, self._channels(value))

    def _sample_norm(self, instr: Instr, value: str, groups: int) -> bool:
        mean, _, scale = self.statistics(value, batch=False, groups=groups, eps=dict(instr.attributes)["eps"])
        weight, bias = (self.per_channel(o, value) for o in instr.operands[1:3])
        self.affine(instr, value, mean, scale, weight, bias)
        return True

    def layer_norm(self, instr: Instr, value: str) -> bool:
        groups = self._groups_over(instr, value)
        if groups is None:
            return self._rows(instr, value)
        mean, _, scale = self.statistics(value, batch=False, groups=groups, eps=dict(instr.attributes)["eps"])
        self.affine(instr, value, mean, scale, *instr.operands[1:3])
        return True

    def rms_norm(self, instr: Instr, value: str) -> bool:
        return self._rows(instr, value)  # others have means of squares, of which Inf and -Inf leave no trace in moments

    def _groups_over(self, instr: Instr, value: str) -> int | None:
        """Groups of channels whose statistics are those over the last dims that a norm names; None for others."""
        whole = self.types[value].shape
        return {len(whole) - 1: 1, len(whole) - 2: whole[1]}.get(len(dict(instr.attributes)["shape"]))

    def _eps(self, instr: Instr, value: str) -> float | None:
        """What a norm adds to the variance; None where torch's number depends on its version."""
        given: float | None = dict(instr.attributes)["eps"]
        if given is None and self.types[value].dtype is torch.float32:
            return torch.finfo(torch.float32).eps
        return given

    def _rows(self, instr: Instr, value: str) -> bool:
        """A norm over some of the spatial dims, whose statistics are many."""
        rank, over = len(self.types[value].shape), len(dict(instr.attributes)["shape"])
        dims = tuple(range(rank - over, rank))
        return 0 < over < rank and self._normalised(instr, value, dims, _affine(instr.operands[1:]), instr.outs[0])

    # --- what stands between two views that cancel --------------------------------------------------
    def sees_through(self, there: Instr, middle: Instr, out: str, wanted: Callable[[str], bool]) -> bool:
        """Whether ``out``, which a view behind ``middle`` makes, is made of what the view ``there`` is of."""
        (value,), see = there.reads(), _THROUGH_VIEWS.get((there.op, middle.op))
        return see is not None and self.fits(value, wanted) and see(self, there, middle, value, out)

    def _over_channels(self, there: Instr, norm: Instr, value: str, out: str) -> bool:
        """A norm over channels, which the permutation ``there`` makes the last dim: dim 1 of ``value`` and ``out``."""
        rank = len(self.types[value].shape)
        if dict(there.attributes)["dims"] != (0, *range(2, rank), 1) or len(dict(norm.attributes)["shape"]) > 1:
            return False
        parameters = [self.per_channel(o, value) for o in norm.operands[1:]]
        return self._normalised(norm, value, (1,), _affine(parameters), out, last=True)

    def _over_flattened(self, there: Instr, softmax: Instr, value: str, out: str) -> bool:
        """A softmax over the last dims, which the reshape ``there`` makes one."""
        shape, flat = self.types[value].shape, dict(there.attributes)["shape"]
        count = len(shape) - len(flat) + 1
        if dict(softmax.attributes)["dim"] != len(flat) - 1 or count < 1 or shape[: len(flat) - 1] != flat[:-1]:
            return False
        log = softmax.op == "log_softmax"
        if count != len(shape) - 2 or not self._softmax(value, out, log=log):
            self.call("softmax_over", Ref(value), outs=(out,), count=count, log=log)
        return True

    def _normalised(
        self,
        instr: Instr,
        value: str,
        dims: tuple[int, ...],
        steps: list[tuple[str, Operand]],
        out: str,
        *,
        last: bool = False,
    ) -> bool:
        kind, eps = self.types[value], self._eps(instr, value)
        narrow = kind.dtype is not torch.float32
        if eps is None or self.types[out].dtype is not kind.dtype:
            return False
        given = {"dims": dims, "eps": eps, "centred": instr.op == "layer_norm", "last": last}
        asked = Instr((out,), "normalise", (Ref(value),), tuple(given.items()))
        if rows_of(asked, kind) is None and (fold_of(asked, kind) is None or self._channels(value) > MOST_CHANNELS):
            return False  # torch has one kernel for all of it
        wide = self.call("cast", Ref(value), dtype=torch.float32) if narrow else value
        outs = None if steps or narrow else (out,)
        made = self.call("normalise", Ref(wide), outs=outs, **given)
        if outs is None:
            self.finish(made, steps, out)
        return True

    def batch_norm(self, instr: Instr, value: str) -> bool:
        _, mean, var, weight, bias = (self.per_channel(o, value) if i else o for i, o in enumerate(instr.operands))
        shifted = self.call("add", var, dict(instr.attributes)["eps"])
        assert isinstance(mean, Ref)
        self.affine(instr, value, mean.name, self.call("rsqrt", Ref(shifted)), weight, bias)
        return True

    def batch_norm_batch(self, instr: Instr, value: str) -> bool:
        return self._batch_norm(instr, value)

    def batch_norm_train(self, instr: Instr, value: str) -> bool:
        return self._batch_norm(instr, value)

    def _batch_norm(self, instr: Instr, value: str) -> bool:
        count = self._count(value, batch=True)
        if count < 2:
            return False  # torch refuses it
        eps = dict(instr.attributes)["eps"]
        mean, var, scale = self.statistics(value, batch=True, groups=self._channels(value), eps=eps)
        weight, bias = (self.per_channel(o, value) for o in instr.operands[1:3])
        self.affine(instr, value, mean, scale, weight, bias)
        if len(instr.outs) > 1:
            self._vector(mean, 1.0, instr.outs[1])
            self._vector(var, count / (count - 1), instr.outs[2])
        return True

    def centre(self, instr: Instr, value: str) -> bool:
        count = self._count(value, batch=True)
        if count < 2 or any(self.types[o].dtype is not torch.float32 for o in instr.outs):
            return False
        mean, var, _ = self.statistics(value, batch=True, groups=self._channels(value))
        new, *vectors = instr.outs
        self.call("sub", Ref(value), Ref(mean), outs=(new,))
        self.map(value, [("sub", Ref(mean))], new)
        for source, factor, out in zip((mean, var, var), (1.0, 1.0, count / (count - 1)), vectors, strict=True):
            self._vector(source, factor, out)
        return True

    def _vector(self, source: str, factor: float, out: str) -> None:
        """A statistic of the batch times ``factor`` as ``out``, (C,)."""
        kind = self.types[out]
        if factor != 1.0:
            source = self.call("mul", Ref(source), factor)
        narrow = kind.dtype is not torch.float32
        flat = self.call("reshape", Ref(source), shape=kind.shape, outs=None if narrow else (out,))
        if narrow:
            self.call("cast", Ref(flat), outs=(out,), dtype=kind.dtype)

    def mean(self, instr: Instr, value: str) -> bool:
        return self._mean(instr, value, dict(instr.attributes)["dims"], 1.0)

    def sum(self, instr: Instr, value: str) -> bool:
        dims = dict(instr.attributes)["dims"]
        return self._mean(instr, value, dims, float(self._size(value, dims)))

    def adaptive_avg_pool(self, instr: Instr, value: str) -> bool:
        size, spatial = dict(instr.attributes)["size"], tuple(range(2, len(self.types[value].shape)))
        return size == (1,) * len(spatial) and self._mean(instr, value, spatial, 1.0)

    def adaptive_max_pool(self, instr: Instr, value: str) -> bool:
        """One window, all of space, as a reduction: many threads make it, and not one."""
        size, spatial = dict(instr.attributes)["size"], tuple(range(2, len(self.types[value].shape)))
        if size != (1,) * len(spatial):
            return False
        if self.gathered(value):
            return self._reduced(instr, value, self._once("extremes", value)[0])
        self.call("amax", Ref(value), outs=instr.outs, dims=spatial, keepdim=True)
        return True

    def _mean(self, instr: Instr, value: str, dims: tuple[int, ...], factor: float) -> bool:
        """The mean over all spatial dims, and perhaps over samples or channels, times ``factor``."""
        over = self._over(instr, value, dims)
        if over is None:
            return False
        # (mean of steps) = (steps of mean), as far as the steps are the same for all samples and channels in it
        source, before = self.mapped.get(value, (value, ())) if dims[0] == 2 else (value, ())
        mean = self.statistics(source, **over)[0]
        for op, operand in (*before, *([("mul", factor)] if factor != 1.0 else [])):
            mean = self.call(op, Ref(mean), operand)
        return self._reduced(instr, value, mean)

    def var(self, instr: Instr, value: str) -> bool:
        return self._deviation(instr, value)

    def std(self, instr: Instr, value: str) -> bool:
        return self._deviation(instr, value)

    def _deviation(self, instr: Instr, value: str) -> bool:
        attributes = dict(instr.attributes)
        over, count = self._over(instr, value, attributes["dims"]), self._size(value, attributes["dims"])
        freedom = count - attributes["correction"]
        if over is None or freedom <= 0:
            return False
        var = self.statistics(value, **over)[1]
        if freedom != count:
            var = self.call("mul", Ref(var), count / freedom)
        return self._reduced(instr, value, self.call("sqrt", Ref(var)) if instr.op == "std" else var)

    def vector_norm(self, instr: Instr, value: str) -> bool:
        """The root of the sum of squares, where nothing but squares are wanted of ``value``."""
        attributes = dict(instr.attributes)
        over, count = self._over(instr, value, attributes["dims"]), self._size(value, attributes["dims"])
        if over is None or attributes["ord"] != 2 or count == 1 or self.readers[value] != 1:
            return False
        narrow = self.types[value].dtype is not torch.float32
        wide = self.call("cast", Ref(value), dtype=torch.float32) if narrow else value
        mean = self.statistics(self.call("square", Ref(wide)), **over)[0]
        total = self.call("mul", Ref(mean), float(count))
        return self._reduced(instr, value, self.call("sqrt", Ref(total)))

    # --- over all of space, of values that are gathered on the way -----------------------------------
    def maximum(self, instr: Instr, value: str) -> bool:
        return self._over_space(instr, value) and self._reduced(instr, value, self._once("extremes", value)[0])

    def minimum(self, instr: Instr, value: str) -> bool:
        return self._over_space(instr, value) and self._reduced(instr, value, self._once("extremes", value)[1])

    def logsumexp(self, instr: Instr, value: str) -> bool:
        return self._over_space(instr, value) and self._reduced(instr, value, self._once("exponentials", value)[3])

    def softmax(self, instr: Instr, value: str) -> bool:
        return self._over_space(instr, value) and self._softmax(value, instr.outs[0], log=instr.op == "log_softmax")

    def _over_space(self, instr: Instr, value: str) -> bool:
        attributes, kind = dict(instr.attributes), self.types[value]
        dims = attributes.get("dims") or (attributes["dim"],)
        alike = self.types[instr.outs[0]].dtype is kind.dtype
        return alike and tuple(dims) == tuple(range(2, len(kind.shape))) and self.gathered(value)

    def _softmax(self, value: str, out: str, *, log: bool) -> bool:
        """Over all of space: an exponential's part of their sum, or its logarithm."""
        if not self.gathered(value):
            return False
        maximum, scale, logarithm, _ = map(Ref, self._once("exponentials", value))
        steps = [("sub", maximum), ("sub", logarithm)] if log else [("exp_below", maximum), ("mul", scale)]
        self.finish(value, steps, out)
        return True

    def _over(self, instr: Instr, value: str, dims: tuple[int, ...]) -> dict[str, Any] | None:
        """Which statistics are those over ``dims``, all spatial ones among them, as a reduction makes them."""
        kind = self.types[value]
        if not {*range(2, len(kind.shape))} <= {*dims} or self.types[instr.outs[0]].dtype is not kind.dtype:
            return None
        return {"batch": 0 in dims, "groups": 1 if 1 in dims else self._channels(value)}

    def _reduced(self, instr: Instr, value: str, made: str) -> bool:
        """What a reduction makes, of a number that every channel has, (N, C, 1, ...) or (1, C, 1, ...)."""
        kind, (out,) = self.types[value], instr.outs
        shape, narrow = tuple(s or 0 for s in self.types[out].shape), kind.dtype is not torch.float32
        alike = 1 in dict(instr.attributes).get("dims", ())  # all channels have the same one
        if alike:
            made = self.call("reshape", Ref(made), shape=(math.prod(shape), self._channels(value)))
            made = self.call("crop", Ref(made), extent=(1,))
        flat = self.call("reshape", Ref(made), shape=shape, outs=None if narrow or alike else (out,))
        if narrow:
            self.call("cast", Ref(flat), outs=(out,), dtype=kind.dtype)
        elif alike:
            self.call("contiguous", Ref(flat), outs=(out,))
        return True

    def _channels(self, value: str) -> int:
        return self.types[value].shape[1] or 0

    def _size(self, value: str, dims: Sequence[int]) -> int:
        """Elements along these dims."""
        return math.prod(self.types[value].shape[d] or 0 for d in dims)

    def _count(self, value: str, *, batch: bool) -> int:
        """Elements that a channel's statistics are of."""
        n, _, *spatial = (s or 0 for s in self.types[value].shape)
        return math.prod(spatial) * (n if batch else 1)


_THROUGH_VIEWS: Mapping[tuple[str, str], Callable[[_Splitter, Instr, Instr, str, str], bool]] = {
    ("permute", "layer_norm"): _Splitter._over_channels,
    ("permute", "rms_norm"): _Splitter._over_channels,
    ("reshape", "softmax"): _Splitter._over_flattened,
    ("reshape", "log_softmax"): _Splitter._over_flattened,
}
_SPLIT: Mapping[str, Callable[[_Splitter, Instr, str], bool]] = {
    "group_norm": _Splitter.group_norm,
    "instance_norm": _Splitter.instance_norm,
    "layer_norm": _Splitter.layer_norm,
    "rms_norm": _Splitter.rms_norm,
    "batch_norm": _Splitter.batch_norm,
    "batch_norm_batch": _Splitter.batch_norm_batch,
    "batch_norm_train": _Splitter.batch_norm_train,
    "centre": _Splitter.centre,
    "mean": _Splitter.mean,
    "sum": _Splitter.sum,
    "var": _Splitter.var,
    "std": _Splitter.std,
    "vector_norm": _Splitter.vector_norm,
    "adaptive_avg_pool": _Splitter.adaptive_avg_pool,
    "adaptive_max_pool": _Splitter.adaptive_max_pool,
    "amax": _Splitter.maximum,
    "max": _Splitter.maximum,
    "amin": _Splitter.minimum,
    "min": _Splitter.minimum,
    "logsumexp": _Splitter.logsumexp,
    "softmax": _Splitter.softmax,
    "log_softmax": _Splitter.softmax,
}
