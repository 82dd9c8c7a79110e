"""The values of a program without their elements: dtypes, sizes, strides, devices, as torch's operators make them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import forms, vocabulary
from fxfuse.chain import no_autocast
from fxfuse.forms import Form
from fxfuse.instr import Instr, Ref
from fxfuse.program import Program


class Unscheduled(Exception):  # noqa: N818 - a refusal, not an error
    """No kernel runs this chain; the message is a sentence for the report."""


def examples(program: Program) -> list[Tensor]:
    """Contiguous stand-ins, without memory, for a program's inputs; Unscheduled where a size is not known."""
    if any(size is None for _, kind in program.inputs for size in kind.shape):
        raise Unscheduled("sizes are not known before the call")
    with FakeTensorMode():
        return [torch.empty([s or 0 for s in kind.shape], dtype=kind.dtype) for _, kind in program.inputs]


def observe(program: Program, inputs: Sequence[Tensor | Form]) -> dict[str, Form]:
    """The form of every value of the program. Raises Unscheduled where torch refuses an instruction."""
    values = {name: Form.of(t) for (name, _), t in zip(program.inputs, inputs, strict=True)}
    with contextlib.ExitStack() as stack:
        fakes: _Fakes | None = None
        for instr in program.body:
            operands = [values[o.name] if isinstance(o, Ref) else o for o in instr.operands]
            key = forms.key_of(instr.op, instr.attributes, operands)
            results = forms.recall(key)
            if results is None:
                fakes = fakes or _Fakes(values, stack)
                results = fakes.run(instr)
                forms.remember(key, results)
            values.update(zip(instr.outs, results, strict=True))
    return values


class _Fakes:
    """Runs instructions on fake tensors of the forms in ``values``, until ``stack`` is left."""

    def __init__(self, values: dict[str, Form], stack: contextlib.ExitStack) -> None:
        for context in (FakeTensorMode(), torch.no_grad(), no_autocast()):
            stack.enter_context(context)
        self.values = values
        self.made: dict[str, Tensor] = {}

    def run(self, instr: Instr) -> tuple[Form, ...]:
        operands = [self._tensor(o.name) if isinstance(o, Ref) else o for o in instr.operands]
        try:
            result = vocabulary.lookup(instr.op)(*operands, **dict(instr.attributes))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise Unscheduled(f"`{instr}`: {(str(error) or 'torch refuses it').splitlines()[0]}") from None
        results: Sequence[Tensor] = result if isinstance(result, tuple) else (result,)
        self.made.update(zip(instr.outs, results, strict=True))
        return tuple(map(Form.of, results))

    def _tensor(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = self.values[name].empty()
        return self.made[name]
