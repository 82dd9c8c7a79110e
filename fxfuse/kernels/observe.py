"""The values of a program without their elements: dtypes, sizes, strides, devices, as torch's operators make them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import vocabulary
from fxfuse.chain import no_autocast
from fxfuse.instr import Instr, Ref
from fxfuse.program import Program

#: instructions on operands of certain forms whose results are known; beyond it all are forgotten
MOST_KNOWN = 4096


class Unscheduled(Exception):  # noqa: N818 - a refusal, not an error
    """No kernel runs this chain; the message is a sentence for the report."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A tensor without its elements; strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(value: Tensor | Form) -> Form:
        if isinstance(value, Form):
            return value
        return Form(value.dtype, tuple(value.shape), value.stride(), value.device)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def numel(self) -> int:
        return math.prod(self.shape)


def examples(program: Program) -> list[Tensor]:
    """Contiguous stand-ins, without memory, for a program's inputs; Unscheduled where a size is not known."""
    if any(size is None for _, kind in program.inputs for size in kind.shape):
        raise Unscheduled("sizes are not known before the call")
    with FakeTensorMode():
        return [torch.empty([s or 0 for s in kind.shape], dtype=kind.dtype) for _, kind in program.inputs]


def observe(program: Program, inputs: Sequence[Tensor | Form]) -> dict[str, Form]:
    """The form of every value of the program. Raises Unscheduled where torch refuses an instruction.

    What was observed once is known: versions of a program, and other programs, share most of their instructions.
    """
    values = {name: Form.of(t) for (name, _), t in zip(program.inputs, inputs, strict=True)}
    settings = torch.get_default_dtype(), torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    with contextlib.ExitStack() as stack:
        fakes: _Fakes | None = None
        for instr in program.body:
            operands = [values[o.name] if isinstance(o, Ref) else (type(o), o) for o in instr.operands]
            # 1, 1.0 and True are equal, and not the same: so are not the texts of attributes
            key = instr.op, repr(instr.attributes), *operands, settings
            results = _known.get(key)
            if results is None:
                fakes = fakes or _Fakes(values, stack)
                results = fakes.run(instr)
                if len(_known) >= MOST_KNOWN:
                    _known.clear()
                _known[key] = results
            values.update(zip(instr.outs, results, strict=True))
    return values


_known: dict[Any, tuple[Form, ...]] = {}


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
            form = self.values[name]
            self.made[name] = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
        return self.made[name]
