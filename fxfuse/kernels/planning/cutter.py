"""What one convolution kernel takes of a chain, and what is left in front of it and behind it.

The kernel takes the transposed convolution, the pointwise chain behind it, and a pool where that is
made of whole residue classes: a window and a step that are multiples of the convolution's stride. It
then stores one value per position q instead of ``stride`` per dim. It takes a reduction over channels
and the chain behind that where a tile of its accumulators holds all channels, and one along w where a
tile has whole rows and an estimate says that it pays. Pure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.chains import STORED, Chain, Values, dense, layout_of, needed_by
from fxfuse.kernels.codegen.folds import reduces
from fxfuse.kernels.codegen.persistent import names_of
from fxfuse.kernels.codegen.reductions import Rows, fold_of, rows_of
from fxfuse.kernels.convolution import planar
from fxfuse.kernels.convolution.geometry import ONE, three_of
from fxfuse.kernels.convolution.layer import Layer
from fxfuse.kernels.convolution.passes import check_holding
from fxfuse.kernels.convolution.specialisation import Unsupported
from fxfuse.kernels.convolution.windows import Pooling, pooling
from fxfuse.kernels.planning.candidate import convolution_of
from fxfuse.kernels.planning.estimate import BANDWIDTH, LAUNCH, launch_seconds, size_of
from fxfuse.kernels.planning.observe import Unscheduled
from fxfuse.kernels.stages.steps import Launch, Schedule
from fxfuse.kernels.stages.tail import MOST_ELEMENTS, MOST_SAMPLES
from fxfuse.program import Program, program_of
from fxfuse.vocabulary import Kind


class Cutter:
    """Cuts one program. ``exact``: as of :func:`~fxfuse.kernels.schedule.schedule`."""

    def __init__(self, program: Program, values: Mapping[str, Form], *, exact: bool) -> None:
        self.program, self.exact = program, exact
        self.values = Values(program, values)
        self.types, self.strides = self.values.types, self.values.strides
        anchors = [i for i in program.body if i.op == "conv_transpose"]
        if len(anchors) != 1:
            raise Unscheduled(
                "nothing of the convolution is left" if not anchors else f"{len(anchors)} convolutions in one chain"
            )
        self.anchor = anchors[0]
        for name in self.anchor.outs:  # a cropped one has gaps where torch makes it; a kernel leaves none
            if name not in program.outputs and layout_of(self.types[name].shape, self.strides[name]) is None:
                last = self.types[name].shape[1] != 1 and self.strides[name][1] == 1
                self.strides[name] = dense(self.types[name].shape, "channels_last" if last else "contiguous")
        self.late = set(self.anchor.outs)  # what the convolution's value reaches
        for instr in program.body:
            if not self.late.isdisjoint(instr.reads()):
                self.late.update(instr.outs)

    def schedule(self, *, widened: bool = True) -> Schedule:
        """``widened``: as of :meth:`~fxfuse.kernels.codegen.chains.Values.longest`."""
        layer, extents = self._layer()
        value = self.anchor.outs[0]
        chain = self.values.longest(value, "Before", self.late, widened=widened)
        taken = [self.anchor, *chain.body]
        stages = [i.op for i in taken]
        pool, found = self._pool(chain.result, layer)
        if found is not None and found.step is not None and not chain.body and self._takes(layer, found.whole()):
            found = found.whole()
        after = Chain(chain.result)
        instead: dict[str, Instr] = {}  # of the pool
        if pool is not None and found is not None:
            name = "max_pool" if pool.op == "amax" else pool.op
            stages.append(f"{name} {'x'.join(map(str, found.window))}")
            taken.append(pool)
            if found.rest is None:
                after = self.values.longest(pool.outs[0], "After", self.late)
                taken += after.body
                stages += [i.op for i in after.body]
            else:
                after = Chain(self._name(f"{pool.outs[0]}_combined"))
                instead[pool.outs[0]] = dataclasses.replace(found.rest, operands=(Ref(after.result),))
                self._add(after.result, chain.result, found.sizes)
        x = _name(self.anchor, 0)
        weight, bias, scales = self._parameters(combined=found is not None)
        kernel = Launch(
            layer=layer,
            x=x,
            weight=weight,
            bias=bias,
            scales=scales,
            dtype=self.types[value].dtype,
            bias_dtype=self._bias_dtype(),
            extents=extents,
            stored=after.result,
            kind=self.types[after.result],
            strides=self.strides[after.result],
            stages=tuple(stages),
            x_layout=self._layout_of(x),
            planes=planar.possible(self.types[x].shape, self.strides[x], self.types[x].dtype.itemsize),
            combine=found.combine if found else "",
            factor=found.factor if found else 1.0,
            step=three_of(found.step) if found and found.rest is None and found.step else ONE,
            before=chain.expression,
            after=after.expression,
        )
        if not instead:
            kernel, folded = self._folded(kernel)
            taken += folded
        if widened and kernel.stored == chain.result and self._is_widened_for_rows(chain):
            return self.schedule(widened=False)  # their kernel takes the cast, too
        if not self.values.storable(kernel.stored):
            raise Unscheduled(f"{kernel.stored}: no kernel stores {kernel.kind} with the strides {kernel.strides}")
        return self._split(kernel, taken, instead)

    # --- the convolution ----------------------------------------------------------------------------
    def _layer(self) -> tuple[Layer, tuple[int, int, int]]:
        """The convolution in three dims, and the sizes of its output."""
        x, weight = (self.types[_name(self.anchor, i)] for i in (0, 1))
        y = self.types[self.anchor.outs[0]]
        geometry = dict(self.anchor.attributes)
        rank = len(geometry["stride"])
        if len(x.shape) != rank + 2:
            raise Unscheduled("the convolution's input has no batch dim")
        if x.dtype not in STORED or weight.dtype is not x.dtype:
            raise Unscheduled(f"no kernel convolves {x} with {weight}")
        sizes, out, kernel = (tuple(s or 0 for s in t.shape) for t in (x, y, weight))
        if 0 in (*sizes, *out, *kernel):
            raise Unscheduled("there is nothing to compute")
        if max(math.prod(sizes[1:]), math.prod(out[1:])) > MOST_ELEMENTS or sizes[0] > MOST_SAMPLES:
            raise Unscheduled(f"{x} or {y} is too large for 32-bit positions")
        one, zero = (1,) * (3 - rank), (0,) * (3 - rank)
        groups = geometry["groups"]
        layer = Layer(
            in_channels=sizes[1] // groups,
            out_channels=kernel[1],
            groups=groups,
            kernel=(*one, *kernel[2:]),  # type: ignore[arg-type]
            stride=(*one, *geometry["stride"]),
            padding=(*zero, *geometry["padding"]),
            dilation=(*one, *geometry["dilation"]),
        )
        return layer, (*one, *out[2:])  # type: ignore[return-value]

    def _layout_of(self, name: str) -> str:
        return layout_of(self.types[name].shape, self.strides[name]) or ""

    def _bias_dtype(self) -> torch.dtype:
        bias = self.anchor.operands[2]
        dtype = self.types[_name(self.anchor, 0)].dtype if bias is None else self.types[_name(self.anchor, 2)].dtype
        if dtype not in STORED:
            raise Unscheduled(f"no kernel adds a bias of {dtype}")
        return dtype

    def _parameters(self, *, combined: bool) -> tuple[str, str | None, tuple[float, float]]:
        """Weights, bias, and the numbers that the kernel multiplies these by as it scales the accumulators anyway.

        ``combined``: it makes one value of many, for which a scale may have to be positive.
        """
        weight = _name(self.anchor, 1)
        bias = None if self.anchor.operands[2] is None else _name(self.anchor, 2)
        given, scale = self._unscaled(weight, "scale_weight")
        if combined or scale == 1:
            return weight, bias, (1.0, 1.0)
        if bias is None:
            return given, None, (scale, 1.0)
        plain, other = self._unscaled(bias, "mul")
        return given, plain, (scale, other)

    def _unscaled(self, name: str, op: str) -> tuple[str, float]:
        """What ``op`` multiplies by a number to make a value of float32, and that; or the value itself, and one."""
        maker = next((i for i in self.program.body if name in i.outs), None)
        if maker is None or maker.op != op or self.types[name].dtype is not torch.float32:
            return name, 1.0
        numbers = [o for o in maker.operands if isinstance(o, (int, float))]
        values = [o.name for o in maker.operands if isinstance(o, Ref)]
        if len(numbers) != 1 or len(values) != 1 or self.types[values[0]] != self.types[name]:
            return name, 1.0
        limits = torch.finfo(torch.float32)
        normal = limits.tiny <= abs(numbers[0]) <= limits.max
        return (values[0], float(numbers[0])) if normal else (name, 1.0)

    # --- what the kernel takes ----------------------------------------------------------------------
    def _pool(self, value: str, layer: Layer) -> tuple[Instr | None, Pooling | None]:
        """The pool that alone reads ``value``, and how residue classes make it; None where they do not."""
        pool = self.values.only_reader(value)
        if pool is None or not (vocabulary.lookup(pool.op).kind is Kind.POOL or pool.op == "amax"):
            return None, None
        spatial = len(self.types[value].shape) - 2
        sizes, made = (self.types[n].shape[2:] for n in (value, pool.outs[0]))
        return pool, pooling(pool, layer.stride[3 - spatial :], sizes, made)  # type: ignore[arg-type]

    def _is_widened_for_rows(self, chain: Chain) -> bool:
        """Whether a chain ends with a cast to a wider dtype, and a kernel reduces rows of that."""
        if not chain.body or not self.values.widens(chain.body[-1]):
            return False
        reader = self.values.only_reader(chain.result)
        return reader is not None and rows_of(reader, self.types[chain.result]) is not None

    def _takes(self, layer: Layer, whole: Pooling) -> bool:
        """Whether a planar kernel makes all of a pool."""
        x = _name(self.anchor, 0)
        kind, strides, itemsize = self.types[x], self.strides[x], self.types[x].dtype.itemsize
        if (self.exact and kind.dtype is torch.float32) or not planar.possible(kind.shape, strides, itemsize):
            return False
        return planar.takes(layer, kind.shape[0] or 0, three_of(whole.sizes), three_of(whole.step or ()), itemsize)

    def _folded(self, kernel: Launch) -> tuple[Launch, Sequence[Instr]]:
        """The kernel with the reduction over channels that alone reads what it stores, and what it takes for that."""
        reduction = self.values.only_reader(kernel.stored)
        if reduction is None or not reduces(reduction):
            return kernel, ()
        fold, made = fold_of(reduction, kernel.kind), self.types[reduction.outs[0]]
        if made.dtype is not kernel.kind.dtype:
            return kernel, ()
        if fold is None:
            return self._along(kernel, reduction)
        behind = self.values.longest(reduction.outs[0], "Behind", self.late)
        shape, strides = self.types[behind.result].shape, self.strides[behind.result]
        squeezed = len(made.shape) < len(kernel.kind.shape)
        if not self.values.storable(behind.result) or (squeezed and strides != dense(shape, "contiguous")):
            return kernel, ()
        folding = dataclasses.replace(
            kernel,
            stored=behind.result,
            kind=self.types[behind.result],
            strides=strides,
            stages=(*kernel.stages, *names_of([reduction, *behind.body])),
            fold=fold,
            behind=behind.expression,
            squeezed=squeezed,
        )
        try:
            check_holding(
                kernel.layer,
                pooled=bool(kernel.combine),
                exact=self.exact and kernel.dtype is torch.float32,
                before=kernel.before is not None,
                merged=kernel.combine == "Sum" and kernel.before is None,
                rows=fold.keeps and folding.layout == "contiguous",
            )
        except Unsupported as reason:
            return dataclasses.replace(kernel, apart=str(reason)), ()
        return folding, (reduction, *behind.body)

    def _along(self, kernel: Launch, reduction: Instr) -> tuple[Launch, Sequence[Instr]]:
        """The kernel with a reduction over w of what it stores, and a pool of residue classes behind that, if tiles
        have whole rows and it saves time; and what it takes for that.
        """
        rows = rows_of(reduction, kernel.kind)
        if rows is None or rows.shares is None or kernel.combine:
            return kernel, ()
        taking = dataclasses.replace(kernel, along=rows)
        first = self.values.longest(reduction.outs[0], "After", self.late)
        pool, found = self._pool(first.result, kernel.layer)
        if pool is not None and found is not None and _has_whole_windows(found, rows, kernel.kind):
            last = self.values.longest(pool.outs[0], "Behind", self.late)
            body = [reduction, *first.body, pool, *last.body]
            taking = dataclasses.replace(
                taking, combine=found.combine, factor=found.factor, after=first.expression, behind=last.expression
            )
        else:
            last = self.values.longest(reduction.outs[0], "Behind", self.late)
            body = [reduction, *last.body]
            taking = dataclasses.replace(taking, behind=last.expression)
        window = "x".join(map(str, found.window)) if found is not None else ""
        taking = dataclasses.replace(
            taking,
            stored=last.result,
            kind=self.types[last.result],
            strides=self.strides[last.result],
            stages=(*kernel.stages, *(f"{n} {window}" if i is pool else n for i in body for n in names_of([i]))),
        )
        if not self.values.storable(last.result) or taking.layout != "contiguous":
            return kernel, ()
        reason = self._no_gain(kernel, taking)
        return (taking, body) if reason is None else (dataclasses.replace(kernel, apart=reason), ())

    def _no_gain(self, kernel: Launch, taking: Launch) -> str | None:
        """Why ``kernel`` and a kernel behind it are as fast as one that is ``taking`` both, by estimate; or None."""
        n, _, *sizes = (s or 0 for s in self.types[kernel.x].shape)
        try:
            together = launch_seconds(taking, convolution_of(taking, exact=self.exact).made, n, three_of(sizes))
        except Unsupported as reason:
            return str(reason)
        with contextlib.suppress(Unsupported):
            apart = launch_seconds(kernel, convolution_of(kernel, exact=self.exact).made, n, three_of(sizes))
            apart += (size_of(kernel.kind) + size_of(taking.kind)) / BANDWIDTH + LAUNCH
            if apart < together:
                return f"{apart * 1e6:.0f} us with a kernel of its own, {together * 1e6:.0f} us without, by estimate"
        return None

    def _name(self, wanted: str) -> str:
        while wanted in self.types:
            wanted += "_"
        return wanted

    def _add(self, name: str, like: str, sizes: tuple[int, ...]) -> None:
        """Enter a value of other spatial sizes, laid out as ``like``."""
        kind = self.types[like]
        shape = (*kind.shape[:2], *sizes)
        self.types[name] = TensorType(kind.dtype, shape)
        self.strides[name] = dense(shape, layout_of(kind.shape, self.strides[like]) or "contiguous")

    # --- the three programs -------------------------------------------------------------------------
    def _split(self, kernel: Launch, taken: Sequence[Instr], instead: dict[str, Instr]) -> Schedule:
        small = {i.outs[0] for i in taken if i.outs[0] not in self.late}  # others may need them, too
        body = [i for i in self.program.body if i not in taken or i.outs[0] in instead or i.outs[0] in small]
        needed, first = set(kernel.reads), []
        for instr in reversed(body):
            if not needed.isdisjoint(instr.outs) and self.late.isdisjoint(instr.outs):
                needed.update(instr.reads())
                first.append(instr)
        first.reverse()
        rest = needed_by([instead.get(i.outs[0], i) for i in body if i not in first], self.program.outputs)
        wanted = {*kernel.reads, *self.program.outputs, *(n for i in rest for n in i.reads())}
        given = tuple(out for i in first for out in i.outs if out in wanted)
        outputs = self.program.outputs
        return Schedule(program_of(first, given, self.types), kernel, program_of(rest, outputs, self.types), ())


def _has_whole_windows(pool: Pooling, rows: Rows, kind: TensorType) -> bool:
    """Whether a pool behind rows of ``kind`` is one of the residue classes of a position alone, and is of all of them:
    along w in one thread.
    """
    sizes = zip(pool.sizes, pool.window, kind.shape[2:], strict=True)
    whole = pool.rest is None and all(count * step <= (size or 0) for count, step, size in sizes)
    return whole and rows.shares is not None and rows.shares[1] % pool.window[-1] == 0


def _name(instr: Instr, operand: int) -> str:
    found = instr.operands[operand]
    if not isinstance(found, Ref):
        raise Unscheduled(f"`{instr}`: {found!r} is not a tensor")
    return found.name
