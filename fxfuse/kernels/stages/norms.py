"""Normalisations, means, maxima and softmaxes as statistics and pointwise arithmetic: what kernels are made of.

``(x - mean) / sqrt(var + eps) * weight + bias`` needs x twice: for ``statistics``, which the kernel that
makes x can gather on its way, and for arithmetic that joins the pointwise chain behind it. So does a softmax over all
of space; but where no kernel gathers on its way, one kernel that goes through rows has less to read. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from fxfuse.instr import Instr, Operand, Ref, TensorType
from fxfuse.kernels.codegen.chains import needed_by
from fxfuse.kernels.codegen.reductions import MOST_CHANNELS, fold_of, rows_of
from fxfuse.kernels.stages.moments import MOMENTS, over_flattened
from fxfuse.kernels.stages.splitter import Splitter, affine_steps
from fxfuse.program import Program


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
    splitter = Splitter(program, types, gathered)
    viewed = {back.outs[0]: (there, middle) for there, middle, back in _between_views(program, types)}
    for instr in program.body:
        between = viewed.get(instr.outs[0])
        if between is not None and _sees_through(splitter, *between, instr.outs[0], wanted):
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


def _sees_through(s: Splitter, there: Instr, middle: Instr, out: str, wanted: Callable[[str], bool]) -> bool:
    """Whether ``out``, which a view behind ``middle`` makes, is made of what the view ``there`` is of."""
    (value,), see = there.reads(), _THROUGH_VIEWS.get((there.op, middle.op))
    return see is not None and s.fits(value, wanted) and see(s, there, middle, value, out)


def group_norm(s: Splitter, instr: Instr, value: str) -> bool:
    return _sample_norm(s, instr, value, dict(instr.attributes)["groups"])


def instance_norm(s: Splitter, instr: Instr, value: str) -> bool:
    return _sample_norm(s, instr, value, s.channels(value))


def _sample_norm(s: Splitter, instr: Instr, value: str, groups: int) -> bool:
    mean, _, scale = s.statistics(value, batch=False, groups=groups, eps=dict(instr.attributes)["eps"])
    weight, bias = (s.per_channel(o, value) for o in instr.operands[1:3])
    s.affine(instr, value, mean, scale, weight, bias)
    return True


def layer_norm(s: Splitter, instr: Instr, value: str) -> bool:
    groups = _groups_over(s, instr, value)
    if groups is None:
        return row_norm(s, instr, value)
    mean, _, scale = s.statistics(value, batch=False, groups=groups, eps=dict(instr.attributes)["eps"])
    s.affine(instr, value, mean, scale, *instr.operands[1:3])
    return True


def row_norm(s: Splitter, instr: Instr, value: str) -> bool:
    """A norm over some of the spatial dims, whose statistics are many."""
    rank, over = len(s.types[value].shape), len(dict(instr.attributes)["shape"])
    dims = tuple(range(rank - over, rank))
    return 0 < over < rank and _normalised(s, instr, value, dims, affine_steps(instr.operands[1:]), instr.outs[0])


def _groups_over(s: Splitter, instr: Instr, value: str) -> int | None:
    """Groups of channels whose statistics are those over the last dims that a norm names; None for others."""
    whole = s.types[value].shape
    return {len(whole) - 1: 1, len(whole) - 2: whole[1]}.get(len(dict(instr.attributes)["shape"]))


def _over_channels(s: Splitter, there: Instr, norm: Instr, value: str, out: str) -> bool:
    """A norm over channels, which the permutation ``there`` makes the last dim: dim 1 of ``value`` and ``out``."""
    rank = len(s.types[value].shape)
    if dict(there.attributes)["dims"] != (0, *range(2, rank), 1) or len(dict(norm.attributes)["shape"]) > 1:
        return False
    parameters = [s.per_channel(o, value) for o in norm.operands[1:]]
    return _normalised(s, norm, value, (1,), affine_steps(parameters), out, last=True)


def _normalised(
    s: Splitter,
    instr: Instr,
    value: str,
    dims: tuple[int, ...],
    steps: list[tuple[str, Operand]],
    out: str,
    *,
    last: bool = False,
) -> bool:
    kind, eps = s.types[value], _eps(s, instr, value)
    narrow = kind.dtype is not torch.float32
    if eps is None or s.types[out].dtype is not kind.dtype:
        return False
    given = {"dims": dims, "eps": eps, "centred": instr.op == "layer_norm", "last": last}
    asked = Instr((out,), "normalise", (Ref(value),), tuple(given.items()))
    if rows_of(asked, kind) is None and (fold_of(asked, kind) is None or s.channels(value) > MOST_CHANNELS):
        return False  # torch has one kernel for all of it
    wide = s.call("cast", Ref(value), dtype=torch.float32) if narrow else value
    outs = None if steps or narrow else (out,)
    made = s.call("normalise", Ref(wide), outs=outs, **given)
    if outs is None:
        s.finish(made, steps, out)
    return True


def _eps(s: Splitter, instr: Instr, value: str) -> float | None:
    """What a norm adds to the variance; None where torch's number depends on its version."""
    given: float | None = dict(instr.attributes)["eps"]
    if given is None and s.types[value].dtype is torch.float32:
        return torch.finfo(torch.float32).eps
    return given


def batch_norm(s: Splitter, instr: Instr, value: str) -> bool:
    _, mean, var, weight, bias = (s.per_channel(o, value) if i else o for i, o in enumerate(instr.operands))
    shifted = s.call("add", var, dict(instr.attributes)["eps"])
    assert isinstance(mean, Ref)
    s.affine(instr, value, mean.name, s.call("rsqrt", Ref(shifted)), weight, bias)
    return True


def batch_statistics_norm(s: Splitter, instr: Instr, value: str) -> bool:
    count = s.count(value, batch=True)
    if count < 2:
        return False  # torch refuses it
    eps = dict(instr.attributes)["eps"]
    mean, var, scale = s.statistics(value, batch=True, groups=s.channels(value), eps=eps)
    weight, bias = (s.per_channel(o, value) for o in instr.operands[1:3])
    s.affine(instr, value, mean, scale, weight, bias)
    if len(instr.outs) > 1:
        s.vector(mean, 1.0, instr.outs[1])
        s.vector(var, count / (count - 1), instr.outs[2])
    return True


def centre(s: Splitter, instr: Instr, value: str) -> bool:
    count = s.count(value, batch=True)
    if count < 2 or any(s.types[o].dtype is not torch.float32 for o in instr.outs):
        return False
    mean, var, _ = s.statistics(value, batch=True, groups=s.channels(value))
    new, *vectors = instr.outs
    s.call("sub", Ref(value), Ref(mean), outs=(new,))
    s.map(value, [("sub", Ref(mean))], new)
    for source, factor, out in zip((mean, var, var), (1.0, 1.0, count / (count - 1)), vectors, strict=True):
        s.vector(source, factor, out)
    return True


_THROUGH_VIEWS: Mapping[tuple[str, str], Callable[[Splitter, Instr, Instr, str, str], bool]] = {
    ("permute", "layer_norm"): _over_channels,
    ("permute", "rms_norm"): _over_channels,
    ("reshape", "softmax"): over_flattened,
    ("reshape", "log_softmax"): over_flattened,
}
#: what takes an operator apart, or says that it has not this form
_SPLIT: Mapping[str, Callable[[Splitter, Instr, str], bool]] = {
    **MOMENTS,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "rms_norm": row_norm,  # over more, a mean of squares: Inf and -Inf leave no trace of their own in moments
    "batch_norm": batch_norm,
    "batch_norm_batch": batch_statistics_norm,
    "batch_norm_train": batch_statistics_norm,
    "centre": centre,
}
