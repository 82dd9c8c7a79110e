"""Operands of kernels: addresses and strides as a tensor tells them, whatever was known of it before."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.expression import Expression, Field
from fxfuse.kernels.codegen.operands import Operands, Place, views
from fxfuse.program import Program

VIEWS = """
def chain(a: f32[16], b: f32[2, 8, 3]):
    p = reshape(a, shape=(16, 1, 1, 1))
    q = permute(b, dims=(0, 2, 1))
    return p, q
"""


def expression(*fields: tuple[str, int | None]) -> Expression:
    made = (
        Field(f"f{i}", value, "pointer" if axis is None else "stride", axis, axis)
        for i, (value, axis) in enumerate(fields)
    )
    return Expression("Before", "", tuple(made), 0)


def read(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 8}q", packed)


def test_fields_are_those_of_the_tensor() -> None:
    g, h = torch.randn(4, 1, 6).transpose(0, 2), torch.randn(5)[1:]
    took = expression(("g", None), ("g", 0), ("g", 1), ("h", None), ("g", None), ("g", 2), ("h", None), ("h", 0))
    expected = (g.data_ptr(), 1, 0, h.data_ptr(), g.data_ptr(), 6, h.data_ptr(), 1)
    values = {"g": g, "h": h}
    for known in ([], ["g"], ["h"], ["g", "h"]):
        made = Operands(took, {n: Place.of(n, values[n]) for n in known})
        assert made.size == 64
        assert made.pack is not None
        assert read(made.pack(values)) == expected
        told = iter(made.tell(values))  # what a call has to say of it
        parts = [p if isinstance(p, bytes) else struct.pack(f"<{p}", next(told)) for p in made.parts]
        assert b"".join(parts) == made.pack(values) and not [*told]
        moved = {n: t.clone(memory_format=torch.preserve_format) for n, t in values.items()}
        assert read(made.pack(moved))[::3] == (moved["g"].data_ptr(), moved["h"].data_ptr(), moved["h"].data_ptr())


def test_no_fields() -> None:
    for none in (None, expression()):
        made = Operands(none, {})
        assert (made.size, made.pack, made.parts, made.tell({})) == (8, None, (bytes(8),), ())


def test_views_lie_where_their_tensors_lie() -> None:
    program = Program.parse(VIEWS)[1]
    a, b = torch.randn(20)[3:19], torch.randn(2, 8, 3)
    found = views(program, {"a": Place.of("a", a), "b": Place("whole", 12, b.dtype, (2, 8, 3), b.stride())})
    for name, made in zip(program.outputs, program.run([a, b]), strict=True):
        assert (found[name].shape, found[name].strides) == (made.shape, made.stride())
    assert [(p.base, p.offset) for p in found.values()] == [("a", 0), ("whole", 12)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("p = relu(a)", "it computes"),
        ("p = reshape(a, shape=(32,))", "it copies"),
        ("p = reshape(c, shape=(2, 2))", "nothing is known of c"),
    ],
    ids=lambda text: text.replace(" ", "-"),
)
def test_what_is_no_view(body: str, why: str) -> None:
    program = Program.parse(f"def chain(a: f32[8, 4], c: f32[4]):\n    {body}\n    return p\n")[1]
    turned: Tensor = torch.randn(4, 8).t()
    assert TensorType(turned.dtype, tuple(turned.shape)) == program.inputs[0][1]
    assert views(program, {"a": Place.of("a", turned)}) == {}, why
