"""A rewritten chain cut in three: what runs first, one convolution kernel, the steps behind it.

The kernel takes the transposed convolution, the pointwise chain behind it, and a pool where that is
made of whole residue classes: a window and a step that are multiples of the convolution's stride. It
then stores one value per position q instead of ``stride`` per dim. It takes a reduction over channels
and the chain behind that where a tile of its accumulators holds all channels. Where a normalisation
follows, it gathers the statistics of what it stores. Pure: sizes and strides in, a printable
:class:`~fxfuse.kernels.steps.Schedule` out, or :class:`~fxfuse.kernels.observe.Unscheduled` with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels import planar
from fxfuse.kernels.bundle import Bundler, reads_of
from fxfuse.kernels.candidate import convolution_of
from fxfuse.kernels.chains import SMALL, STORED, Chain, Values, dense, elements, layout_of, needed_by
from fxfuse.kernels.convolution import Unsupported
from fxfuse.kernels.estimate import BANDWIDTH, LAUNCH, launch_seconds, size_of
from fxfuse.kernels.geometry import ONE, three_of
from fxfuse.kernels.layer import Layer
from fxfuse.kernels.norms import OVER_SPACE, nothing, split_norms
from fxfuse.kernels.observe import Unscheduled, observe
from fxfuse.kernels.prologue import steps_in_front
from fxfuse.kernels.reductions import Rows, fold_of, reduces, rows_of
from fxfuse.kernels.specialise import check_holding
from fxfuse.kernels.steps import Gather, Launch, Schedule, Torch
from fxfuse.kernels.tail import LEAST_BEHIND_OURS, LEAST_ELEMENTS, MOST_ELEMENTS, MOST_SAMPLES, plan
from fxfuse.kernels.uncrop import uncropped
from fxfuse.kernels.unfold import unfold
from fxfuse.kernels.windows import Pooling, pooling
from fxfuse.program import Program, program_of
from fxfuse.vocabulary import Kind


def schedule(program: Program, inputs: Sequence[Tensor], *, anchored: bool = True, exact: bool = False) -> Schedule:
    """Cut ``program`` for inputs of these sizes, dtypes, strides and devices: no element of them is read.

    ``anchored``: a kernel makes the convolution; else torch does, and only the steps behind it are cut.
    ``exact``: float32 convolutions have float32's accuracy, not TF32's, which takes more registers.
    """
    observed = observe(program, inputs)
    least = least_elements(anchored)
    found = versions(program, observed, inputs, least, anchored=anchored)
    if not anchored:
        whole, values = next((p, v) for p, v in found if _same_forms(program, observed, v))
        return _bundled(Schedule(Program((), (), ()), None, whole, plan(whole, values, least=least)), values)
    return best(program, observed, [(cut(version, values, exact=exact), values) for version, values in found])


def gathering(program: Program, inputs: Sequence[Tensor], *, exact: bool = False) -> tuple[Schedule, str] | None:
    """The schedule whose kernel gathers maxima, minima or sums of exponentials of the value that it makes, and that.

    None where it has none to gather: there :func:`schedule` has all. Arguments as of that.
    """
    if OVER_SPACE.isdisjoint(i.op for i in program.body):
        return None
    observed, least = observe(program, inputs), least_elements(anchored=True)

    def cut_for(gathered: Callable[[str], bool]) -> tuple[Schedule, Mapping[str, Form]]:
        version, values = versions(program, observed, inputs, least, gathered=gathered)[0]
        return cut(version, values, exact=exact), values

    kernel = cut_for(lambda _: True)[0].kernel
    assert kernel is not None
    made = best(program, observed, [cut_for(lambda value: value == kernel.stored)])
    assert made.kernel is not None
    return (made, kernel.stored) if {*made.kernel.gathers} - {"statistics"} else None


def cut(program: Program, values: Mapping[str, Form], *, exact: bool) -> Schedule:
    """``program`` in three, its ``rest`` not yet cut into steps. ``values``: as of :func:`observe`."""
    return _Cutter(program, values, exact=exact).schedule()


def best(
    program: Program, observed: Mapping[str, Form], cuts: Sequence[tuple[Schedule, Mapping[str, Form]]]
) -> Schedule:
    """Of the ``cuts`` of ``program``, each with all values that it names, the best one, with its steps.

    ``observed``: the values of ``program``, whose outputs tell which forms results have.
    """
    found = []
    for one, values in cuts:
        for made in _layouts(one, program.outputs, observed):
            assert made.kernel is not None
            there = {**values, made.kernel.stored: _stored(made.kernel, values[made.kernel.x].device)}
            there |= observe(made.rest, [there[name] for name, _ in made.rest.inputs])
            if _same_forms(program, observed, there):
                found.append(_bundled(_with_steps(made, there), there))
    if not found:
        raise Unscheduled("a result would come out in another layout than from torch's operators")
    return min(found, key=_passes_by_torch)  # the first of equals


def least_elements(anchored: bool) -> int:
    """Of a tensor that kernels read behind a convolution: of ours, if ``anchored``, or of torch."""
    return LEAST_BEHIND_OURS if anchored else LEAST_ELEMENTS


def versions(
    program: Program,
    observed: dict[str, Form],
    inputs: Sequence[Tensor],
    least: int,
    *,
    anchored: bool = True,
    gathered: Callable[[str], bool] = nothing,
) -> list[tuple[Program, dict[str, Form]]]:
    """What means the same as ``program``, the best for kernels first, each with its values.

    ``least``: elements of a value that kernels take. ``anchored``: so does the convolution. ``gathered``: as of
    :func:`~fxfuse.kernels.norms.split_norms`.
    """
    plain = program if anchored else uncropped(program, observed, inputs)
    made = [observed[i.outs[0]] for i in program.body if i.op == "conv_transpose"]
    pools = any(vocabulary.lookup(i.op).kind is Kind.POOL for i in program.body)
    if not pools and any(y.numel() >= LEAST_ELEMENTS for y in made):
        plain = unfold(plain, numbers=not anchored)  # a pool of plain outputs is cheaper than one of scaled ones
    found = {plain: observe(plain, inputs)}
    split = _split(plain, found[plain], least, gathered)
    return [*({split: observe(split, inputs)} | found | {program: observed}).items()]


def _passes_by_torch(made: Schedule) -> int:
    """Instructions on large values that torch's operators run."""
    assert made.kernel is not None
    whole = elements(made.kernel.kind)
    programs = [s.program for s in made.steps if isinstance(s, Torch)]
    large = [p for p in programs if any(elements(k) * SMALL > whole for _, k in p.inputs)]
    return sum(vocabulary.lookup(i.op).kind is not Kind.SHAPE for p in large for i in p.body)


def _layouts(made: Schedule, outputs: Sequence[str], observed: Mapping[str, Form]) -> Iterator[Schedule]:
    """The schedule with the stored value laid out as it is and in the other way; an output, as torch has it."""
    kernel = made.kernel
    assert kernel is not None
    ways = [
        kernel.strides,
        dense(kernel.kind.shape, "contiguous" if kernel.layout == "channels_last" else "channels_last"),
    ]
    if kernel.squeezed:
        ways = ways[:1]
    elif kernel.stored in outputs:
        ways = [s for s in [observed[kernel.stored].stride()] if layout_of(kernel.kind.shape, s) is not None]
    if kernel.along is not None:  # rows of w are stored as such
        ways = [s for s in ways if layout_of(kernel.kind.shape, s) == "contiguous"]
    for strides in ways:
        yield dataclasses.replace(made, kernel=dataclasses.replace(kernel, strides=strides))


def _with_steps(made: Schedule, values: Mapping[str, Form]) -> Schedule:
    """The schedule with what runs behind its kernel."""
    kernel = made.kernel
    assert kernel is not None
    steps = plan(made.rest, values, None if kernel.reduces else kernel.stored, least=least_elements(anchored=True))
    gathers = next((s.gathers for s in steps if isinstance(s, Gather) and not s.layout), ())
    keeps = kernel.stored in made.rest.outputs or any(
        kernel.stored in s.reads for s in steps if not isinstance(s, Gather) or s.layout
    )
    return dataclasses.replace(made, kernel=dataclasses.replace(kernel, gathers=gathers, keeps=keeps), steps=steps)


def _bundled(made: Schedule, values: Mapping[str, Form]) -> Schedule:
    """The schedule with what torch had to run on small tensors as kernels, too."""
    kernel, measuring, outputs = made.kernel, made.measuring, made.rest.outputs
    first = steps_in_front(made, values)
    kernels = not all(isinstance(s, Torch) for s in (*made.steps, kernel))
    stored = [k.stored for k in (kernel, measuring) if k is not None]
    bundler = Bundler(values, (*first, *made.between, *made.steps), kernels=kernels, stored=stored)
    kernel, measuring = (None if k is None else _direct(k, bundler) for k in (kernel, measuring))
    first, between, rest = ([bundler.see_through(s) for s in steps] for steps in (first, made.between, made.steps))
    behind = bundler.needed(rest, outputs)
    late = {*outputs, *_reads(kernel), *(n for item in behind for n in reads_of(item))}
    middle = bundler.needed(between, late)
    wanted = {*late, *_reads(measuring), *(n for item in middle for n in reads_of(item))}
    ahead = bundler.needed(first, wanted)
    all_small = bundler.leaves_nothing([*ahead, *middle, *behind])
    body = needed_by(made.first.body, wanted)
    return dataclasses.replace(
        made,
        first=bundler.program(body, tuple(o for i in body for o in i.outs if o in wanted)),
        kernel=kernel,
        measuring=measuring,
        ahead=bundler.arrange(ahead, wanted, all_small=all_small),
        between=bundler.arrange(middle, late, all_small=all_small),
        steps=bundler.arrange(behind, outputs, all_small=all_small),
    )


def _direct(kernel: Launch, bundler: Bundler) -> Launch:
    """The kernel, with the operands that are views read where their sources lie."""
    before, after, behind = (bundler.direct(e) for e in (kernel.before, kernel.after, kernel.behind))
    return dataclasses.replace(kernel, before=before, after=after, behind=behind)


def _reads(kernel: Launch | None) -> tuple[str, ...]:
    return () if kernel is None else kernel.reads


def _split(program: Program, values: Mapping[str, Form], least: int, gathered: Callable[[str], bool]) -> Program:
    """The program with the norms of large values taken apart, and those of given statistics behind collapsed means."""
    behind = {i.outs[0] for i in program.body if i.op == "contract_taps"}
    for instr in program.body:
        behind.update(() if behind.isdisjoint(instr.reads()) else instr.outs)
    collapsed = behind & {next(i.reads()) for i in program.body if i.op == "batch_norm"}

    def wanted(name: str) -> bool:
        value = values[name]
        return (value.numel() >= least or name in collapsed) and layout_of(value.shape, value.stride()) is not None

    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}
    return split_norms(program, types, wanted, gathered)


def _same_forms(program: Program, values: Mapping[str, Form], others: Mapping[str, Form]) -> bool:
    """Whether the program's outputs have the same dtypes, sizes and strides, of dims that have any."""
    return all(values[name].lies_as(others[name]) for name in program.outputs)


def _stored(kernel: Launch, device: torch.device) -> Form:
    return Form(kernel.kind.dtype, tuple(s or 0 for s in kernel.kind.shape), kernel.strides, device)


class _Cutter:
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
        """``widened``: as of :meth:`~fxfuse.kernels.chains.Values.longest`."""
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
            stages=(*kernel.stages, reduction.op, *(i.op for i in behind.body)),
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
            stages=(*kernel.stages, *(f"{i.op} {window}" if i is pool else i.op for i in body)),
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
