"""What runs behind a convolution: pointwise chains with their pools, and statistics, as kernels; the rest as torch.

Pure: :func:`plan` cuts a program into steps in the order in which they run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.chains import SMALL, Chain, Values, dense, elements, layouts_of, needed, needed_by
from fxfuse.kernels.codegen.folds import reduces
from fxfuse.kernels.codegen.persistent import names_of
from fxfuse.kernels.codegen.reductions import (
    MOST_CHANNELS_EACH,
    Fold,
    Rows,
    Window,
    fold_of,
    inner_of,
    rows_of,
    window_of,
)
from fxfuse.kernels.codegen.statistics import KINDS
from fxfuse.kernels.stages.collapsed import sums_of
from fxfuse.kernels.stages.contraction import contraction_of
from fxfuse.kernels.stages.steps import Gather, Map, Step, Torch
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: elements of a tensor from which on a kernel of ours is worth its launch; and behind a convolution of ours: a call's
#: kernels are launched as one graph, if torch runs none of it
LEAST_ELEMENTS, LEAST_BEHIND_OURS = 2**20, 1
#: elements of a tensor that a kernel counts; samples, where they are a dim of its grid
MOST_ELEMENTS, MOST_SAMPLES = 2**31 - 1, 65535
#: how often an element may be computed again because windows overlap
MOST_OVERLAP = 2.0
#: threads from which on a pool's kernel reduces what it makes: fewer leave most of a GPU idle
ENOUGH_THREADS = 2**15


def plan(program: Program, values: Mapping[str, Form], gathered: str | None = None, *, least: int) -> tuple[Step, ...]:
    """Cut ``program`` into steps. ``values``: all of its values, without their elements.

    ``gathered``: the input whose statistics the kernel that makes it gathers. ``least``: elements of a tensor that
    kernels read.
    """
    return _Planner(program, values, gathered, least).plan()


class _Planner:
    def __init__(self, program: Program, values: Mapping[str, Form], gathered: str | None, least: int) -> None:
        self.program, self.gathered, self.least = program, gathered, least
        self.values = Values(program, values)
        self.there = {n for n, _ in program.inputs}
        self.left = needed_by(program.body, program.outputs)
        self.steps: list[Step] = []
        self.torch: list[Instr] = []
        # what was before the program is no measure of what is small in it
        own = [*self.there, *(o for i in program.body for o in i.outs)]
        self.largest = max((elements(self.values.types[n]) for n in own), default=0)

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
        if op.name in KINDS:
            return self._gather(instr)
        if op.name in ("tap_sums", "contract_taps"):
            return self._collapsed(instr)
        if op.kind is Kind.POOL:
            value = instr.operands[0]
            assert isinstance(value, Ref)
            if self._readable(value.name):
                found = self._pooled(value.name, Chain(value.name), instr)
                return found or (None, ())
        if reduces(instr):
            value = instr.operands[0]
            assert isinstance(value, Ref)
            if self._readable(value.name):
                return self._folded(value.name, Chain(value.name), instr) or (None, ())
        if op.kind is Kind.POINTWISE and instr.outs[0] not in self.values.of_products:
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
            and self.least <= elements(kind) <= MOST_ELEMENTS
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
        elif reader is not None and reduces(reader):
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
        found = self._pooled_and_folded(value, before, window, after, pool, stage)
        return found or self._made(value, before, window, after, (pool,), stage)

    def _pooled_and_folded(
        self, value: str, before: Chain, window: Window, after: Chain, pool: Instr, stage: str
    ) -> tuple[Step, Sequence[Instr]] | None:
        """The same, the reduction over channels behind it, and the chain behind that: with threads enough for a GPU."""
        reduction, pooled = self.values.only_reader(after.result), self.values.types[after.result]
        if reduction is None or not reduces(reduction):
            return None
        fold, behind = fold_of(reduction, pooled), self._behind(reduction, pooled, "Behind")
        if fold is None or not fold.once or behind is None:
            return None
        places = elements(pooled) // fold.channels
        if places * fold.slices(window) < ENOUGH_THREADS or elements(pooled) > MOST_ELEMENTS:
            return None
        layouts = self._layouts(value, behind.result)
        kind = self.values.types[behind.result]
        if layouts != ("contiguous", "contiguous") or len(kind.shape) < 3:
            return None
        bodies = before.body, (pool,), after.body, (reduction,), behind.body
        stages = [[i.op for i in body] for body in bodies]
        stages[1] = [stage]
        step = Map(
            value=value,
            given=self.values.types[value],
            stored=behind.result,
            kind=kind,
            strides=self.values.strides[behind.result],
            layouts=layouts,
            stages=tuple(itertools.chain(*stages)),
            before=before.expression,
            window=window,
            fold=fold,
            after=after.expression,
            behind=behind.expression,
            body=tuple(itertools.chain(*bodies)),
        )
        return step, self._without_small(step, pooled)

    def _behind(self, reduction: Instr, kind: TensorType, name: str) -> Chain | None:
        """The chain behind a reduction over channels of ``kind``; None where kernels do not make its result."""
        out = self.values.types[reduction.outs[0]]
        if out.dtype is not kind.dtype:
            return None
        if len(out.shape) == len(kind.shape):
            return self.values.longest(reduction.outs[0], name, self._missing(), there=self.there)
        strides = self.values.strides[reduction.outs[0]]
        return Chain(reduction.outs[0]) if strides == dense(out.shape, "contiguous") else None

    def _folded(self, value: str, before: Chain, reduction: Instr) -> tuple[Step, Sequence[Instr]] | None:
        """The chain, the reduction over channels or over the last dims behind it, and the chain behind that."""
        kind = self.values.types[before.result]
        fold, after = fold_of(reduction, kind) or rows_of(reduction, kind), self._behind(reduction, kind, "After")
        if fold is None:
            return self._inside(value, before, reduction)
        if after is None:
            return None
        found = self._rows_and_pooled(value, before, fold, after, reduction) if isinstance(fold, Rows) else None
        return found or self._made(value, before, fold, after, (reduction,), " > ".join(names_of([reduction])))

    def _rows_and_pooled(
        self, value: str, before: Chain, rows: Rows, after: Chain, reduction: Instr
    ) -> tuple[Step, Sequence[Instr]] | None:
        """The chain, the reduction of rows, which keeps them, the chain behind it, a pool, the chain behind that."""
        pool, kind = self.values.only_reader(after.result), self.values.types[after.result]
        if pool is None or vocabulary.lookup(pool.op).kind is not Kind.POOL:
            return None
        window, out = window_of(pool, len(kind.shape) - 2), self.values.types[pool.outs[0]]
        if window is None or out.dtype is not kind.dtype or not rows.poolable(window):
            return None
        if math.prod(window.kernel[:2]) > MOST_OVERLAP * math.prod(window.stride[:2]):
            return None
        behind = self.values.longest(pool.outs[0], "Behind", self._missing(), there=self.there)
        names = value, after.result, behind.result
        if any(self.values.strides[n] != dense(self.values.types[n].shape, "contiguous") for n in names):
            return None
        bodies = before.body, (reduction,), after.body, (pool,), behind.body
        stages = [names_of(body) for body in bodies]
        stages[3] = (f"{pool.op} {'x'.join(map(str, dict(pool.attributes)['kernel']))}",)
        step = Map(
            value=value,
            given=self.values.types[value],
            stored=behind.result,
            kind=self.values.types[behind.result],
            strides=self.values.strides[behind.result],
            layouts=("contiguous", "contiguous"),
            stages=tuple(itertools.chain(*stages)),
            before=before.expression,
            rows=rows,
            window=window,
            after=after.expression,
            behind=behind.expression,
            body=tuple(itertools.chain(*bodies)),
        )
        return step, self._without_small(step, kind)

    def _inside(self, value: str, before: Chain, reduction: Instr) -> tuple[Step, Sequence[Instr]] | None:
        """A reduction over dims inside: of channels, in other dims, in which the chains must not ask for a place."""
        kind, given = self.values.types[before.result], self.values.types[value]
        found, after = inner_of(reduction, kind), self._behind(reduction, kind, "After")
        if found is None or after is None:
            return None
        fold, viewed = found
        if any(c.expression is not None and c.expression.fields for c in (before, after)):
            before, after = Chain(value), Chain(reduction.outs[0])
            if next(reduction.reads()) != value:
                return None
        if -(-fold.channels // fold.lanes(last=False, last_made=False)) > MOST_CHANNELS_EACH:
            return None
        out = self.values.types[after.result]
        if any(
            self.values.strides[n] != dense(self.values.types[n].shape, "contiguous") for n in (value, after.result)
        ):
            return None
        step = Map(
            value=value,
            given=TensorType(given.dtype, viewed.shape),
            stored=after.result,
            kind=out,
            strides=self.values.strides[after.result],
            layouts=("contiguous", "contiguous"),
            stages=names_of((*before.body, reduction, *after.body)),
            before=before.expression,
            fold=fold,
            after=after.expression,
            body=(*before.body, reduction, *after.body),
            viewed=True,
        )
        return step, self._without_small(step, kind)

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
        return step, self._without_small(step)

    def _without_small(self, step: Map, *made: TensorType) -> list[Instr]:
        """What a step takes. Small operands stay: others may need them, and they are dropped where nobody does.
        ``made``: what it makes on the way."""
        shapes = [kind.shape for kind in (step.given, step.kind, *made)]
        small = {i.outs[0] for i in step.body if self.values.types[i.outs[0]].shape not in shapes}
        return [i for i in step.body if i.outs[0] not in small]

    # --- statistics -----------------------------------------------------------------------------------
    def _gather(self, instr: Instr) -> tuple[Step | None, Sequence[Instr]]:
        (value,) = instr.reads()
        kind = self.values.types[value]
        instrs = tuple(i for i in self.left if i.op in KINDS and value in i.reads())
        if value == self.gathered:
            return Gather(value, kind, "", instrs), instrs
        if not self._readable(value) or instr.op != "statistics":
            return None, ()
        instrs = tuple(i for i in instrs if i.op == "statistics")
        return Gather(value, kind, layouts_of(kind.shape, self.values.strides[value])[0], instrs), instrs
