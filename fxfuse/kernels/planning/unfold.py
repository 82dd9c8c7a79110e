"""Scales out of the weights again: where a chain follows the convolution it multiplies by them at no cost.

``conv(x; scale * W, b) = scale * conv(x; W) + b`` per output channel. Folded scales save a pass over the outputs of
a library's convolution; where that pass is made anyway, making scaled weights on every call is what costs. Pure.
"""

from __future__ import annotations

from fxfuse import vocabulary
from fxfuse.instr import Instr, Operand, Ref
from fxfuse.program import Program


def unfold(program: Program, *, numbers: bool = True) -> Program:
    """``program`` with scales of the convolution's weights behind it, as far as nothing else reads those weights.

    ``numbers``: also where all of them are numbers, by which a kernel of ours multiplies anyway.
    """
    body = list(program.body)
    for anchor in [i for i in body if i.op == "conv_transpose"]:
        scales = _scales(body, anchor, program.outputs)
        if any(numbers or isinstance(s.operands[1], Ref) for s in scales):
            body = _moved(program, body, anchor, scales)
    return Program(program.inputs, tuple(body), program.outputs)


def _scales(body: list[Instr], anchor: Instr, outputs: tuple[str, ...]) -> list[Instr]:
    """The ``scale_weight`` instructions, last first, that alone lead to the anchor's weight."""
    found: list[Instr] = []
    reader, weight = anchor, anchor.operands[1]
    while isinstance(weight, Ref):
        maker = next((i for i in body if weight.name in i.outs), None)
        readers = [i for i in body if weight.name in i.reads()]
        if maker is None or maker.op != "scale_weight" or readers != [reader] or weight.name in outputs:
            break
        if not isinstance(maker.operands[0], Ref):
            break
        found.append(maker)
        reader, weight = maker, maker.operands[0]
    return found


def _moved(program: Program, body: list[Instr], anchor: Instr, scales: list[Instr]) -> list[Instr]:
    taken = {n for n, _ in program.inputs} | {o for i in body for o in i.outs}
    made: list[Instr] = []

    def call(op: str, *operands: Operand, out: str | None = None, **attributes: object) -> Ref:
        number = len(taken)
        while out is None or (out in taken and out != anchor.outs[0]):
            out, number = f"{op}_{number}", number + 1
        taken.add(out)
        complete = vocabulary.lookup(op).complete(dict(attributes))
        made.append(Instr((out,), op, operands, tuple(complete.items())))
        return Ref(out)

    def per_channel(operand: Operand) -> Operand:
        if not isinstance(operand, Ref):
            return operand
        spatial = len(dict(anchor.attributes)["stride"])
        return call("reshape", operand, shape=(-1, *(1 for _ in range(spatial))))

    x, _, bias = anchor.operands
    value: Operand = call("conv_transpose", x, scales[-1].operands[0], None, **dict(anchor.attributes))
    for i, scale in enumerate(reversed(scales)):
        last = i == len(scales) - 1 and bias is None
        value = call("mul", value, per_channel(scale.operands[1]), out=anchor.outs[0] if last else None)
    if bias is not None:
        call("add", value, per_channel(bias), out=anchor.outs[0])
    rest = [i for i in body if i not in scales]
    at = rest.index(anchor)
    return [*rest[:at], *made, *rest[at + 1 :]]
