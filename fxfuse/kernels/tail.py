"""What runs behind a convolution: pointwise chains with their pools, and statistics, as kernels; the rest as torch.

Pure: :func:`plan` cuts a program into steps in the order in which they run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from fxfuse import vocabulary
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.chains import SMALL, Chain, Values, dense, elements, layouts_of, needed, needed_by
from fxfuse.kernels.collapsed import Sums, sums_of
from fxfuse.kernels.contraction import Contraction, contraction_of
from fxfuse.kernels.emit_bundle import Emitted
from fxfuse.kernels.expression import Expression
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: elements of a tensor from which on a kernel of ours is worth its launch
LEAST_ELEMENTS = 2**20
#: elements of a tensor that a kernel counts; samples, where they are a dim of its grid
MOST_ELEMENTS, MOST_SAMPLES = 2**31 - 1, 65535
#: how often an element may be computed again because windows overlap
MOST_OVERLAP = 2.0


@dataclasses.dataclass(frozen=True)
class Window:
    """A pool, per spatial dim (three of them). ``combine``: "Maximum" or "Sum".

    Output o looks at ``kernel`` inputs from ``o*stride - padding`` on, ``dilation`` apart, as far as there are
    any. A sum is divided by ``divisor``; for 0 by the inputs that it has, for -1 by those that it has with
    padding. ``adaptive``: windows are ``[o*L // O, ceil((o+1)*L / O))`` instead.
    """

    combine: str
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    divisor: int = 1
    adaptive: bool = False


#: channels that a thread holds
MOST_CHANNELS_EACH = 64
_FOLDS = {
    "sum": "Sum",
    "mean": "Mean",
    "amax": "Maximum",
    "max": "Maximum",
    "amin": "Minimum",
    "min": "Minimum",
    "logsumexp": "LogSumExp",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
}


@dataclasses.dataclass(frozen=True)
class Fold:
    """A reduction over ``channels``: of ``combine``, as ``cuh/fold.cuh`` names it."""

    combine: str
    channels: int

    @property
    def keeps(self) -> bool:
        """Whether every channel has a result."""
        return self.combine.endswith("Softmax")

    def lanes(self, last: bool, last_made: bool) -> int:
        """Threads per position: where channels are neighbours on both sides, neighbouring threads take them."""
        each, most = (4, 32) if last and (last_made or not self.keeps) else (MOST_CHANNELS_EACH, 4)
        return min(most, 1 << (-(-self.channels // each) - 1).bit_length())


#: elements of a row from which on a block takes it, and not a warp; and rows that are enough for blocks
LONG_ROW, ENOUGH_ROWS = 1024, 128


@dataclasses.dataclass(frozen=True)
class Rows:
    """A reduction over the last dims of a contiguous value, of ``combine``, as ``cuh/map_rows.cuh`` names it.

    ``length``: elements that are reduced, one behind the other: a row.
    """

    combine: str
    length: int

    @property
    def keeps(self) -> bool:
        """Whether every element has a result."""
        return self.combine.endswith("Softmax")

    @property
    def long(self) -> bool:
        """Whether a block takes a row, and not a warp."""
        return self.length >= LONG_ROW


@dataclasses.dataclass(frozen=True)
class Map:
    """One kernel: reads ``value``, which is ``given``, and operands; stores ``stored``, of the type ``kind``.

    Both are dense, in the memory formats ``layouts``, which differ only where there is a ``window`` or a ``fold``.
    There is at most one of ``window``, ``fold`` and ``rows``.
    ``body``: the instructions that it stands for.
    """

    value: str
    given: TensorType
    stored: str
    kind: TensorType
    strides: tuple[int, ...]
    layouts: tuple[str, str]
    stages: tuple[str, ...]
    before: Expression | None = None
    window: Window | None = None
    fold: Fold | None = None
    rows: Rows | None = None
    after: Expression | None = None
    body: tuple[Instr, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        operands = [f.value for e in (self.before, self.after) if e is not None for f in e.fields]
        return tuple(dict.fromkeys([self.value, *operands]))

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.stored,)

    def __str__(self) -> str:
        return f"one kernel: {' > '.join(self.stages)} -> {self.kind}"


@dataclasses.dataclass(frozen=True)
class Gather:
    """The ``statistics`` of ``value``: of all ``instrs``, from one pass over it.

    ``layout``: the memory format of ``value``; "" where the kernel that makes it gathers on its way.
    """

    value: str
    kind: TensorType
    layout: str
    instrs: tuple[Instr, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.value,)

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(o for i in self.instrs for o in i.outs)

    def __str__(self) -> str:
        where = f"one pass over {self.value}" if self.layout else "gathered on the way"
        return f"statistics of {self.value}, {where}"


@dataclasses.dataclass(frozen=True)
class Torch:
    """Instructions by torch's operators."""

    program: Program

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.program.inputs)

    @property
    def makes(self) -> tuple[str, ...]:
        return self.program.outputs

    def __str__(self) -> str:
        return " > ".join(i.op for i in self.program.body)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Pointwise operators on small tensors, and views, as one kernel that stands for ``program``.

    ``kinds``, ``strides``: of the outputs, none of which shares memory with an input. ``doubtful``: inputs that torch
    makes, with the strides that the kernel takes them to have; where they have others, torch runs the program.
    """

    program: Program
    made: Emitted
    kinds: tuple[TensorType, ...]
    strides: tuple[tuple[int, ...], ...]
    doubtful: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.program.inputs)

    @property
    def makes(self) -> tuple[str, ...]:
        return self.program.outputs

    @property
    def body(self) -> tuple[Instr, ...]:
        return self.program.body

    def __str__(self) -> str:
        return f"one kernel on small tensors: {' > '.join(i.op for i in self.body)}"


Step = Map | Gather | Torch | Bundle | Sums | Contraction


def plan(program: Program, values: Mapping[str, Tensor], gathered: str | None = None) -> tuple[Step, ...]:
    """Cut ``program`` into steps. ``values``: all of its values, without their elements.

    ``gathered``: the input whose statistics the kernel that makes it gathers.
    """
    return _Planner(program, values, gathered).plan()


class _Planner:
    def __init__(self, program: Program, values: Mapping[str, Tensor], gathered: str | None) -> None:
        self.program, self.gathered = program, gathered
        self.values = Values(program, values)
        self.there = {n for n, _ in program.inputs}
        self.left = needed_by(program.body, program.outputs)
        self.steps: list[Step] = []
        self.torch: list[Instr] = []
        self.largest = max(map(elements, self.values.types.values()), default=0)

    def plan(self) -> tuple[Step, ...]:
        while self.left:
            for view in [i for i in self.left if vocabulary.lookup(i.op).kind is Kind.SHAPE]:
                self._take(self._cheap(view))
            if not self.left:
                break
            instr = next((i for i in self.left if not self._waits(i)), self.left[-1])
            step, body = self._step(instr)
            if step is None:
                self._take(needed(self.left, instr))
                continue
            # operands that wait have to be there
            self._take([i for i in needed_by(self.left, step.reads) if all(i is not b for b in body)])
            self._flush(step.reads)
            self.steps.append(step)
            self.there.update(step.makes)
            self.left = [i for i in self.left if all(i is not b for b in body)]
            # what the chain computed for itself may be needed elsewhere, or by nobody any more
            self.left = needed_by(self.left, self.program.outputs)
        self._flush(())
        return tuple(self.steps)

    def _cheap(self, view: Instr) -> list[Instr]:
        """A view and the small operands that it is made of; nothing where it needs more than those."""
        body = needed(self.left, view)
        made = {o for i in body for o in i.outs}
        cheap = all(
            (self._waits(i) or vocabulary.lookup(i.op).kind is Kind.SHAPE) and {*i.reads()} <= self.there | made
            for i in body
        )
        return body if cheap else []

    def _waits(self, instr: Instr) -> bool:
        """Whether a chain may compute this small operand for itself: it waits until something else needs it."""
        small = elements(self.values.types[instr.outs[0]]) * SMALL <= self.largest
        return small and vocabulary.lookup(instr.op).kind is Kind.POINTWISE

    def _take(self, body: Sequence[Instr]) -> None:
        """Let torch run these."""
        self.torch += body
        self.there.update(o for i in body for o in i.outs)
        self.left = [i for i in self.left if all(i is not b for b in body)]

    def _flush(self, reads: Sequence[str]) -> None:
        """A step of what torch has to run so far, ``reads`` being wanted next."""
        if not self.torch:
            return
        made = {o for i in self.torch for o in i.outs}
        wanted = {*self.program.outputs, *reads, *(n for i in self.left for n in i.reads())}
        read = dict.fromkeys(n for i in self.torch for n in i.reads() if n not in made)
        outputs = tuple(o for i in self.torch for o in i.outs if o in wanted)
        inputs = tuple((n, self.values.types[n]) for n in read)
        self.steps.append(Torch(Program(inputs, tuple(self.torch), outputs)))
        self.torch = []

    def _step(self, instr: Instr) -> tuple[Step | None, Sequence[Instr]]:
        """A kernel that begins with ``instr``, and what it takes; None for torch."""
        op = vocabulary.lookup(instr.op)
        if op.name == "statistics":
            return self._gather(instr)
        if op.name in ("tap_sums", "contract_taps"):
            return self._collapsed(instr)
        if op.kind is Kind.POOL:
            value = instr.operands[0]
            assert isinstance(value, Ref)
            if self._readable(value.name):
                found = self._pooled(value.name, Chain(value.name), instr)
                return found or (None, ())
        if op.kind is Kind.REDUCTION:
            value = instr.operands[0]
            assert isinstance(value, Ref)
            if self._readable(value.name):
                return self._folded(value.name, Chain(value.name), instr) or (None, ())
        if op.kind is Kind.POINTWISE:
            for name in instr.reads():
                same = self.values.types[name].shape == self.values.types[instr.outs[0]].shape
                if same and self._readable(name):
                    found = self._map(name, instr)
                    if found is not None:
                        return found
        return None, ()

    def _readable(self, name: str) -> bool:
        """Whether kernels read ``name`` as their value, and it is large enough for one."""
        kind = self.values.types[name]
        return (
            name in self.there
            and 3 <= len(kind.shape) <= 5
            and LEAST_ELEMENTS <= elements(kind) <= MOST_ELEMENTS
            and self.values.storable(name)
        )

    def _missing(self) -> set[str]:
        return {o for i in self.left for o in i.outs}

    def _layouts(self, value: str, stored: str) -> tuple[str, str]:
        """A memory format of each: the same one, if that is possible."""
        first, second = (layouts_of(self.values.types[n].shape, self.values.strides[n]) for n in (value, stored))
        both = [layout for layout in first if layout in second]
        return (both[0], both[0]) if both else (first[0], second[0])

    def _collapsed(self, instr: Instr) -> tuple[Step | None, Sequence[Instr]]:
        """A part of a collapsed mean."""
        if instr.op == "contract_taps":
            made = contraction_of(instr, self.values, self._missing(), self.there)
            return made, () if made is None else made.chain  # its operands stay: others may need them
        (name,) = instr.reads()
        return sums_of(instr, self.values.types[name], self.values.strides[name], self.values.types[instr.outs[0]]), [
            instr
        ]

    # --- maps -----------------------------------------------------------------------------------------
    def _map(self, value: str, first: Instr) -> tuple[Step, Sequence[Instr]] | None:
        """The longest chain from ``value`` that has ``first`` in it."""
        chain = self.values.longest(value, "Before", self._missing(), there=self.there, kept=True)
        if not any(i is first for i in chain.body):
            return None
        reader = self.values.only_reader(chain.result)
        found = None
        if reader is not None and vocabulary.lookup(reader.op).kind is Kind.POOL:
            found = self._pooled(value, chain, reader)
        elif reader is not None and vocabulary.lookup(reader.op).kind is Kind.REDUCTION:
            found = self._folded(value, chain, reader)
        if found is not None:
            return found
        return self._made(value, chain, None, Chain(chain.result), ())

    def _pooled(self, value: str, before: Chain, pool: Instr) -> tuple[Step, Sequence[Instr]] | None:
        """The chain, the pool behind it, and the chain behind that."""
        kind = self.values.types[before.result]
        window = window_of(pool, len(kind.shape) - 2)
        out = self.values.types[pool.outs[0]]
        if window is None or out.dtype is not kind.dtype or len(kind.shape) < 3:
            return None
        looked_at = math.prod(window.kernel) * elements(out)
        if before.body and not window.adaptive and looked_at > MOST_OVERLAP * elements(kind):
            return None
        after = self.values.longest(pool.outs[0], "After", self._missing(), there=self.there)
        if not self.values.storable(after.result):
            return None
        stage = pool.op if window.adaptive else f"{pool.op} {'x'.join(map(str, dict(pool.attributes)['kernel']))}"
        return self._made(value, before, window, after, (pool,), stage)

    def _folded(self, value: str, before: Chain, reduction: Instr) -> tuple[Step, Sequence[Instr]] | None:
        """The chain, the reduction over channels or over the last dims behind it, and the chain behind that."""
        kind, out = (self.values.types[n] for n in (before.result, reduction.outs[0]))
        fold = fold_of(reduction, kind) or rows_of(reduction, kind)
        if fold is None or out.dtype is not kind.dtype:
            return None
        after = Chain(reduction.outs[0])
        if len(out.shape) == len(kind.shape):
            after = self.values.longest(after.result, "After", self._missing(), there=self.there)
        elif self.values.strides[after.result] != dense(out.shape, "contiguous"):
            return None
        return self._made(value, before, fold, after, (reduction,), reduction.op)

    def _made(
        self,
        value: str,
        before: Chain,
        how: Window | Fold | Rows | None,
        after: Chain,
        pool: Sequence[Instr],
        stage: str = "",
    ) -> tuple[Step, Sequence[Instr]] | None:
        window, fold = how if isinstance(how, Window) else None, how if isinstance(how, Fold) else None
        if fold is not None and len(self.values.types[after.result].shape) < 3:
            return None
        if isinstance(how, Rows):
            layouts = "contiguous", "contiguous"
            if any(
                self.values.strides[n] != dense(self.values.types[n].shape, layouts[0]) for n in (value, after.result)
            ):
                return None
        else:
            layouts = self._layouts(value, after.result)
        if elements(self.values.types[after.result]) > MOST_ELEMENTS:
            return None  # an adaptive pool makes any number of them
        if how is None:
            samples = self.values.types[value].shape[0] or 0
            if layouts[0] != layouts[1] or (layouts[0] == "channels_last" and samples > MOST_SAMPLES):
                return None
        if fold is not None:
            lanes = fold.lanes(*(layout != "contiguous" for layout in layouts))
            if -(-fold.channels // lanes) > MOST_CHANNELS_EACH:
                return None
        body = [*before.body, *pool, *after.body]
        stages = [*(i.op for i in before.body), *([stage] if pool else []), *(i.op for i in after.body)]
        kind, strides = self.values.types[after.result], self.values.strides[after.result]
        step = Map(
            value=value,
            given=self.values.types[value],
            stored=after.result,
            kind=kind,
            strides=strides,
            layouts=layouts,
            stages=tuple(stages),
            before=before.expression,
            window=window,
            fold=fold,
            rows=how if isinstance(how, Rows) else None,
            after=after.expression,
            body=tuple(body),
        )
        # small operands stay: others may need them, and they are dropped where nobody does
        small = {i.outs[0] for i in body if self.values.types[i.outs[0]].shape not in self._shapes(value, step)}
        return step, [i for i in body if i.outs[0] not in small]

    def _shapes(self, value: str, step: Map) -> tuple[tuple[int | None, ...], ...]:
        return self.values.types[value].shape, step.kind.shape

    # --- statistics -----------------------------------------------------------------------------------
    def _gather(self, instr: Instr) -> tuple[Step | None, Sequence[Instr]]:
        (value,) = instr.reads()
        kind = self.values.types[value]
        instrs = tuple(i for i in self.left if i.op == "statistics" and value in i.reads())
        if value == self.gathered:
            return Gather(value, kind, "", instrs), instrs
        if not self._readable(value):
            return None, ()
        return Gather(value, kind, layouts_of(kind.shape, self.values.strides[value])[0], instrs), instrs


def fold_of(reduction: Instr, kind: TensorType) -> Fold | None:
    """The reduction of a (N, C, *spatial) value over its channels; None for others."""
    attributes, combine = dict(reduction.attributes), _FOLDS.get(reduction.op)
    dims = attributes.get("dims", (attributes.get("dim"),))
    channels = kind.shape[1]
    if combine is None or dims != (1,) or not channels:
        return None
    return Fold(combine, channels)


def rows_of(reduction: Instr, kind: TensorType) -> Rows | None:
    """The reduction of a value over its last dims, with rows enough for a GPU; None for others."""
    attributes, combine = dict(reduction.attributes), _FOLDS.get(reduction.op)
    dims = attributes.get("dims", (attributes.get("dim"),))
    rank, shape = len(kind.shape), [s or 0 for s in kind.shape]
    if combine is None or dims != tuple(range(rank - len(dims), rank)) or not math.prod(shape):
        return None
    rows = Rows(combine, math.prod(shape[rank - len(dims) :]))
    count = math.prod(shape) // rows.length
    return rows if count >= ENOUGH_ROWS or not rows.long else None


def window_of(pool: Instr, rank: int) -> Window | None:
    """The pool over ``rank`` spatial dims as a window; None for one that kernels do not make."""
    attributes = dict(pool.attributes)

    def three(values: Collection[int], fill: int) -> tuple[int, int, int]:
        d, h, w = (*[fill] * (3 - len(values)), *values)
        return d, h, w

    one, zero = (1, 1, 1), (0, 0, 0)
    combine = "Maximum" if "max" in pool.op else "Sum"
    if pool.op.startswith("adaptive"):
        if len(attributes["size"]) != rank:
            return None  # no dim of samples
        return Window(combine, one, one, zero, one, 0, adaptive=True)
    kernel, stride, padding = (attributes[k] for k in ("kernel", "stride", "padding"))
    if len(kernel) != rank:
        return None
    dilation = attributes.get("dilation", (1,) * rank)
    divisor = 1
    if combine == "Sum":
        divisor = attributes["divisor_override"] or (-1 if attributes["count_include_pad"] else 0)
        if rank == 1 and attributes["divisor_override"]:
            return None
        whole = not any(padding) and not attributes["ceil_mode"]
        if whole and divisor <= 0:
            divisor = math.prod(kernel)
    return Window(combine, three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1), divisor)
