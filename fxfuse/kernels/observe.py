"""The values of a program without their elements: sizes, strides, dtypes, devices, as torch's operators make them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse import vocabulary
from fxfuse.chain import no_autocast
from fxfuse.instr import Ref
from fxfuse.program import Program


class Unscheduled(Exception):  # noqa: N818 - a refusal, not an error
    """No kernel runs this chain; the message is a sentence for the report."""


def examples(program: Program) -> list[Tensor]:
    """Contiguous stand-ins, without memory, for a program's inputs; Unscheduled where a size is not known."""
    if any(size is None for _, kind in program.inputs for size in kind.shape):
        raise Unscheduled("sizes are not known before the call")
    with FakeTensorMode():
        return [torch.empty([s or 0 for s in kind.shape], dtype=kind.dtype) for _, kind in program.inputs]


def observe(program: Program, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every value of the program, without its elements. ``inputs`` may be fake tensors, or others."""
    with FakeTensorMode(), torch.no_grad(), no_autocast():
        values = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for (name, _), t in zip(program.inputs, inputs, strict=True)
        }
        for instr in program.body:
            operands = [values[o.name] if isinstance(o, Ref) else o for o in instr.operands]
            try:
                result = vocabulary.lookup(instr.op)(*operands, **dict(instr.attributes))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise Unscheduled(f"`{instr}`: {(str(error) or 'torch refuses it').splitlines()[0]}") from None
            results: Sequence[Tensor] = result if isinstance(result, tuple) else (result,)
            values.update(zip(instr.outs, results, strict=True))
    return values
