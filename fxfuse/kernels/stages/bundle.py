"""What is left to torch around large kernels, on small tensors, as few kernels: pointwise operators, products, views.

A chain leaves arithmetic on vectors and weights behind: a normalisation folded into a convolution, statistics that
become running ones. It runs on every call, an operator at a time, and each costs the host more than the GPU. Here it
waits until a kernel, or an operator of torch's, needs some of it; then all that can run runs, as one kernel. Views
that only say where a kernel's operands lie disappear into their strides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from fxfuse import vocabulary
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.kernels.codegen.arithmetic import NotEmittable
from fxfuse.kernels.codegen.chains import elements, needed_by
from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.codegen.indices import axes_of
from fxfuse.kernels.codegen.operands import Place, views
from fxfuse.kernels.stages.contraction import Contraction
from fxfuse.kernels.stages.emit_bundle import Emitted, emit_bundle
from fxfuse.kernels.stages.steps import Bundle, Map, Step, Torch
from fxfuse.program import Program
from fxfuse.vocabulary import Kind

#: operators that a kernel has to stand for, as long as others are torch's all the same
LEAST_OPERATORS = 3
#: elements of a view that is copied, for torch to have nothing left to do
MOST_COPIED = 2**16
_VIEWS = ("reshape", "permute", "lay_out", "crop", "detach")


class Bundler:
    """Makes bundles of the instructions that torch has left, for one schedule.

    ``values``: all of the schedule's, without their elements; ``stored``: those of its convolutions. ``kernels``: it
    has other kernels.
    """

    def __init__(
        self, values: Mapping[str, Form], steps: Sequence[Step], *, kernels: bool, stored: Collection[str] = ()
    ) -> None:
        self.types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in values.items()}
        self.strides = {n: tuple(t.stride()) for n, t in values.items()}
        body = [i for s in steps if isinstance(s, Torch) for i in s.program.body]
        self.views = {i.outs[0]: i for i in body if i.op in _VIEWS}
        self.small = {i.outs[0] for i in body if self._emits(i)}
        self.by_torch: set[str] = set()  # values whose strides are torch's affair
        self.inputs = {n: Place.of(n, t) for n, t in values.items()}  # of the schedule
        for name in (*stored, *(n for s in steps for n in s.makes), *(n for i in body for n in i.outs)):
            self.inputs.pop(name, None)
        self.kernels = kernels

    def _emits(self, instr: Instr) -> bool:
        """Whether a kernel of its own could run an instruction."""
        if len(instr.outs) > 1:
            return False
        try:
            self.emit(self.program([instr], instr.outs))
        except NotEmittable:
            return False
        return True

    def emit(self, program: Program) -> Emitted:
        return emit_bundle(program, self.types, self.strides)

    def program(self, body: Sequence[Instr], outputs: tuple[str, ...]) -> Program:
        made = {o for i in body for o in i.outs}
        read = dict.fromkeys(n for i in body for n in i.reads() if n not in made)
        return Program(tuple((n, self.types[n]) for n in read), tuple(body), outputs)

    # --- views in kernels ---------------------------------------------------------------------------
    def see_through(self, step: Step) -> Step:
        """The step, with the operands that are views read where their sources lie."""
        if isinstance(step, Map):
            before, after, behind = (self.direct(e) for e in (step.before, step.after, step.behind))
            made: Map | Contraction = dataclasses.replace(step, before=before, after=after, behind=behind)
        elif isinstance(step, Contraction):
            made = dataclasses.replace(step, after=self.direct(step.after))
        else:
            return step
        seen = needed_by(list(self.views.values()), {*step.reads} - {*made.reads})
        return dataclasses.replace(made, body=(*seen, *made.body))

    def direct(self, expression: Expression | None) -> Expression | None:
        """The expression, with its operands that are views of others read where those lie."""
        if expression is None:
            return None
        fields = list(expression.fields)
        while True:
            found = next((f.value for f in fields if self._source(f.value) is not None), None)
            if found is None:
                return dataclasses.replace(expression, fields=tuple(fields))
            source, axes = self._source(found) or ("", {})
            fields = [
                dataclasses.replace(f, value=source, axis=None if f.axis is None else axes[f.axis])
                if f.value == found
                else f
                for f in fields
            ]

    def _source(self, name: str) -> tuple[str, dict[int, int]] | None:
        """What ``name`` is a view of, and the dims there of its dims; None where it is none, or not of whole dims."""
        view = self.views.get(name)
        if view is None or not isinstance(view.operands[0], Ref):
            return None
        source = view.operands[0].name
        made, given = ([s or 0 for s in self.types[n].shape] for n in (name, source))
        axes = axes_of(view, made, given) if math.prod(made) else None
        return None if axes is None else (source, axes)

    def looks(self, body: Sequence[Instr], outputs: Collection[str]) -> list[Instr]:
        """What of ``body`` makes those ``outputs`` that are views of inputs: for kernels there is nothing to run."""
        seen = [i for i in body if i.op in _VIEWS]
        chains = [needed_by(seen, [name]) for name in outputs]
        only = [c[-1].outs[0] for c in chains if c and views(self.program(c, c[-1].outs), self.inputs)]
        return needed_by(seen, only)

    # --- order --------------------------------------------------------------------------------------
    def needed(self, steps: Sequence[Step], outputs: Collection[str]) -> list[Step | Instr]:
        """The steps, and torch's instructions one by one, without those that nothing needs any more."""
        wanted, found = set(outputs), list[Step | Instr]()
        every = [i for s in steps for i in (s.program.body if isinstance(s, Torch) else (s,))]
        for item in reversed(every):
            if not isinstance(item, Instr) or not wanted.isdisjoint(item.outs):
                wanted.update(reads_of(item))
                found.append(item)
        return found[::-1]

    def leaves_nothing(self, items: Sequence[Step | Instr]) -> bool:
        """Whether torch may have nothing left to do."""
        return self.kernels and all(not isinstance(i, Instr) or i.outs[0] in self.small for i in items)

    def arrange(self, items: Sequence[Step | Instr], outputs: Collection[str], *, all_small: bool) -> tuple[Step, ...]:
        """The steps that make ``outputs``, what is small together. ``all_small``: torch may have nothing left to do."""
        return _Arrangement(self, items, outputs, all_small).steps()


class _Arrangement:
    def __init__(
        self, bundler: Bundler, items: Sequence[Step | Instr], outputs: Collection[str], all_small: bool
    ) -> None:
        self.bundler, self.outputs, self.all_small = bundler, outputs, all_small
        small = bundler.small
        self.waiting = [i for i in items if isinstance(i, Instr) and i.outs[0] in small]
        self.left = [i for i in items if not isinstance(i, Instr) or i.outs[0] not in small]
        self.torch: list[Instr] = []
        self.found: list[Step] = []

    def steps(self) -> tuple[Step, ...]:
        while self.left:
            item = self.left[0]
            waiting = {o for i in self.waiting for o in i.outs}
            if not waiting.isdisjoint(reads_of(item)):
                self._run(self._ready())
            if isinstance(item, Instr):
                self._by_torch([item])
            else:
                self._flush()
                self.found.append(item)
            self.left.pop(0)
        self._run(self.waiting)
        self._flush()
        return tuple(self.found)

    def _ready(self) -> list[Instr]:
        """What waits for nothing that is still to be made."""
        missing = {o for item in self.left for o in _makes(item)}
        ready = []
        for instr in self.waiting:
            if missing.isdisjoint(instr.reads()):
                ready.append(instr)
            else:
                missing.update(instr.outs)
        return ready

    def _run(self, body: Sequence[Instr]) -> None:
        """One kernel of these, or torch."""
        rest = [i for i in self.waiting if all(i is not b for b in body)]
        wanted = self._wanted(body, (*self.left, *rest))
        looks = self.bundler.looks(body, wanted)
        looked = {o for i in looks for o in i.outs}
        outputs = tuple(o for o in wanted if o not in looked)
        body = needed_by(body, outputs)
        bundle = self._bundle(body, outputs)
        first = _before_last_product(body) if bundle is None else []
        if first:  # no element is made of the products of both
            self._run(first)
            self._run([i for i in body if all(i is not f for f in first)])
            return
        self.torch += looks
        if bundle is None:
            self._by_torch([i for i in body if i.outs[0] not in looked])
        else:
            self._flush()
            self.found.append(bundle)
        self.waiting = rest

    def _bundle(self, body: Sequence[Instr], outputs: tuple[str, ...]) -> Bundle | None:
        operators = sum(i.op not in _VIEWS for i in body)
        kinds = self.bundler.types
        if not body or (operators < LEAST_OPERATORS and not self.all_small):
            return None
        if not operators and any(elements(kinds[i.outs[0]]) > MOST_COPIED for i in body):
            return None
        program, strides = self.bundler.program(body, outputs), self.bundler.strides
        try:
            made = self.bundler.emit(program)
        except NotEmittable:
            return None
        doubtful = tuple((n, strides[n]) for n in made.reads if n in self.bundler.by_torch)
        return Bundle(program, made, tuple(kinds[n] for n in outputs), tuple(strides[n] for n in outputs), doubtful)

    def _by_torch(self, body: Sequence[Instr]) -> None:
        self.torch += body
        self.bundler.by_torch.update(o for i in body for o in i.outs)

    def _flush(self) -> None:
        if self.torch:
            body, self.torch = self.torch, []
            outputs = self._wanted(body, (*self.left, *self.waiting))
            self.found.append(Torch(self.bundler.program(body, outputs)))

    def _wanted(self, body: Sequence[Instr], others: Sequence[Step | Instr]) -> tuple[str, ...]:
        """What the chain and ``others``, which come later, need of what ``body`` makes."""
        wanted = {*self.outputs, *(n for item in others for n in reads_of(item))}
        return tuple(o for i in body for o in i.outs if o in wanted)


def _before_last_product(body: Sequence[Instr]) -> list[Instr]:
    """What the last product with a matrix needs, if there is another one among it."""
    products = [i for i in body if vocabulary.lookup(i.op).kind is Kind.PRODUCT]
    needed = needed_by(body, [*products[-1].reads()]) if products else []
    return needed if any(i is p for i in needed for p in products) else []


def reads_of(item: Step | Instr) -> Collection[str]:
    """The values that a step or an instruction reads."""
    return tuple(item.reads()) if isinstance(item, Instr) else item.reads


def _makes(item: Step | Instr) -> Collection[str]:
    return item.outs if isinstance(item, Instr) else item.makes
