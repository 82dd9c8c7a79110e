"""Average pools in front of arithmetic: ``pool(a*y + c) = a*pool(y) + c`` where a and c do not vary in space.

A rule does so to the chain as it was written (:mod:`fxfuse.patterns.means`); here it is the arithmetic that
normalisations were taken apart to. A convolution's kernel then does it once per window. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from fxfuse.instr import Instr, Ref, TensorType
from fxfuse.program import Program

_ARITHMETIC = ("add", "sub", "mul", "div")


def pool_first(program: Program, types: Mapping[str, TensorType]) -> Program:
    """``program`` with float32's average pools moved in front of the arithmetic that leads to them.

    ``types``: of every value of the program.
    """
    body, types = list(program.body), dict(types)
    for pool in program.body:
        chain = _chain(body, pool, program.outputs, types) if _plain(pool) else []
        if chain:
            at, done = body.index(pool), [instr for instr, _ in chain]
            body = [*(i for i in body[:at] if i not in done), *_moved(pool, chain, types), *body[at + 1 :]]
    return Program(program.inputs, tuple(body), program.outputs)


def _plain(pool: Instr) -> bool:
    """Whether the weights of each window add up to 1."""
    attributes = dict(pool.attributes)
    if pool.op == "avg_pool":
        return not (any(attributes["padding"]) or attributes["ceil_mode"] or attributes["divisor_override"])
    return pool.op == "adaptive_avg_pool"


def _chain(
    body: Sequence[Instr], pool: Instr, outputs: Sequence[str], types: Mapping[str, TensorType]
) -> list[tuple[Instr, str]]:
    """The arithmetic whose result the pool alone reads, in order, each with the value that it is done to."""
    found: list[tuple[Instr, str]] = []
    reader, (value,) = pool, pool.reads()
    while [i for i in body if value in i.reads()] == [reader] and value not in outputs:
        maker = next((i for i in body if value in i.outs), None)
        source = _source(maker, types) if maker is not None and maker.op in _ARITHMETIC else None
        if maker is None or source is None:
            break
        found.insert(0, (maker, source))
        reader, value = maker, source
    return found


def _source(instr: Instr, types: Mapping[str, TensorType]) -> str | None:
    """The operand of the result's type, where the other one is the same all over a channel."""
    kind = types[instr.outs[0]]
    first, second = instr.operands
    for value, other in ((first, second), (second, first)):
        if not isinstance(value, Ref) or types[value.name] != kind or kind.dtype is not torch.float32:
            continue
        spatial = len(kind.shape) - 2
        flat = not isinstance(other, Ref) or all(s == 1 for s in types[other.name].shape[-spatial:])
        if flat and (instr.op != "div" or value is first):
            return value.name
    return None


def _moved(pool: Instr, chain: Sequence[tuple[Instr, str]], types: dict[str, TensorType]) -> list[Instr]:
    """The pool of what the chain is done to, and the chain behind it; ``types`` with their values."""

    def new(wanted: str) -> str:
        while wanted in types:
            wanted += "_"
        types[wanted] = types[pool.outs[0]]
        return wanted

    value = new(f"{chain[0][1]}_pooled")
    found = [dataclasses.replace(pool, outs=(value,), operands=(Ref(chain[0][1]),))]
    for i, (instr, source) in enumerate(chain):
        operands = tuple(Ref(value) if o == Ref(source) else o for o in instr.operands)
        value = pool.outs[0] if i == len(chain) - 1 else new(f"{instr.outs[0]}_pooled")
        found.append(dataclasses.replace(instr, outs=(value,), operands=operands))
    return found
