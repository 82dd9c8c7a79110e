"""Expressions compiled with the host's compiler and run over arrays, and the operands that their tests use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.instr import DTYPE_NAMES, TensorType
from fxfuse.kernels.codegen import arithmetic
from fxfuse.kernels.codegen.expression import Expression, emit_expression
from fxfuse.kernels.compilation import jit
from fxfuse.program import Program

CUH = jit.HEADERS
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler for the host")

SHAPE = (2, 4, 3, 5, 7)
SPECIAL = (
    0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 6.0, 20.0, 20.5, -20.0,
    88.0, -104.0, 1e-7, -1e-7, 1e-40, -1e-40, 1e18, -1e18, 3e38, -3e38,
)  # fmt: skip


# --- the host's compiler --------------------------------------------------------------------------
_ENTRY = """
static_assert(sizeof({name}) == {size}, "fields of eight bytes each");
extern "C" void run_{name}(const void* fields, const float* y, float* out, const int* size) {{
  {name} e;
  memcpy((void*)&e, fields, {bytes});
  for (int n = 0; n < size[0]; n++)
    for (int c = 0; c < size[1]; c++)
      for (int d = 0; d < size[2]; d++)
        for (int h = 0; h < size[3]; h++)
          for (int w = 0; w < size[4]; w++) *out++ = e(*y++, n, c, d, h, w);
}}
"""


def source(expressions: Sequence[Expression]) -> str:
    parts = [f'#include "{CUH / arithmetic.HEADER}"']
    for e in expressions:
        size = 8 * len(e.fields)
        parts += [e.code, _ENTRY.format(name=e.name, size=size or 1, bytes=size)]
    return "\n".join(parts)


@functools.lru_cache(maxsize=64)
def compiled(text: str) -> ctypes.CDLL:
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-ffp-contract=off"]
        done = subprocess.run(
            [COMPILER, *flags, "-x", "c++", "-", "-o", str(path)], input=text, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(path))


def run(library: ctypes.CDLL, e: Expression, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The expression over all elements of ``value``, as float32."""
    fields: list[int] = []
    for field in e.fields:
        t = tensors[field.value]
        if field.kind == "pointer":
            fields.append(t.data_ptr())
        else:
            assert field.axis is not None
            fields.append(t.stride(field.axis) if t.shape[field.axis] > 1 else 0)
    sizes = [*value.shape[:2], *(1,) * (5 - value.dim()), *value.shape[2:]]
    y, out = value.float().contiguous(), torch.empty(value.shape, dtype=torch.float32)
    getattr(library, f"run_{e.name}")(
        struct.pack(f"<{len(fields)}q", *fields),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        (ctypes.c_int * 5)(*sizes),
    )
    return out


# --- data -----------------------------------------------------------------------------------------
def spread(values: Sequence[float], every: int, shape: Sequence[int] = SHAPE) -> Tensor:
    """Each of ``values`` ``every`` times in a row, again and again; random numbers after all pairs of them."""
    count, pairs = math.prod(shape), len(values) ** 2
    generator = torch.Generator().manual_seed(every)
    flat = torch.randn(count, generator=generator) * 3
    for i in range(min(count, pairs)):
        flat[i] = values[i // every % len(values)]
    return flat.reshape(*shape)


def inputs() -> dict[str, Tensor]:
    """Operands in many shapes, dtypes and layouts, by name."""
    g = torch.Generator().manual_seed(5)
    n, c, d, h, w = SHAPE

    def random_(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "y": spread(SPECIAL, 1),
        "a": spread(SPECIAL, len(SPECIAL)),
        "b": random_(w, h, d, c, n).permute(4, 3, 2, 1, 0),
        "p": random_(*SHAPE).abs() + 0.5,
        "ch": random_(c, 1, 1, 1),
        "ch5": random_(1, 2 * c, 1, 1, 1)[:, ::2],
        "row": random_(w),
        "one": random_(1),
        "s": random_(()),
        "plane": random_(n, 1, d, 1, 2 * w)[..., 1::2],
        "wide": random_(n, c, 1, 1, 1).expand(SHAPE),
        "half": random_(*SHAPE).half(),
        "brain": random_(1, c, 1, 1, w).bfloat16(),
        "hs": torch.tensor([65504, 6e-8, -3e-5, math.inf, -math.inf, math.nan, -0.0]).half(),
        "bs": torch.tensor([3e38, 1e-40, -3e-5, math.inf, -math.inf, math.nan, -0.0]).bfloat16(),
        "double_": torch.tensor(0.1, dtype=torch.float64),
        "m": random_(*SHAPE) > 0,
        "mw": random_(w) > 0,
        "weight": random_(2 * c)[::2],
        **{
            f"n{name}": torch.randint(0 if name.startswith("u") else -100, 100, SHAPE[-2:], generator=g).to(dtype)
            for dtype, name in DTYPE_NAMES.items()
            if not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
        },
    }


INPUTS = inputs()
TYPES = {name: TensorType(t.dtype, tuple(t.shape)) for name, t in INPUTS.items()}


def parse(lines: str, types: Mapping[str, TensorType] = TYPES) -> Program:
    """Lines ``name = op(...)``, separated by ``;``; the last one is the result."""
    statements = [line.strip() for line in lines.split(";")]
    head = ", ".join(f"{n}: {t}" for n, t in types.items())
    text = [f"def f({head}):", *(f"    {s}" for s in statements), f"    return {statements[-1].split('=')[0]}"]
    return Program.parse("\n".join(text))[1]


def emit(lines: str, name: str = "E", types: Mapping[str, TensorType] = TYPES, **more: Any) -> Expression:
    program = parse(lines, types)
    return emit_expression(name, program.body, value="y", result=program.outputs[0], types=types, **more)


def eager(lines: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """What torch makes of it, with floats in another dtype where one is given."""
    types = {k: TensorType(t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    given = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in tensors.values()]
    return parse(lines, types).run(given)[0]
