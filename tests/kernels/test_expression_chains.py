"""Random chains of pointwise operators as C++: for the host, against torch, and for a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from expression_cases import ALL
from expressions import compiled, emit, needs_compiler, run, source
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Chain, Draw, Growing, convolution, pointwise
from torch import Tensor

import fxfuse
from fxfuse.instr import TensorType
from fxfuse.kernels.codegen.arithmetic import HEADER, NotEmittable
from fxfuse.kernels.codegen.expression import Expression, emit_expression
from fxfuse.kernels.compilation import jit
from fxfuse.program import Program
from fxfuse.region import Region

#: what a region of these chains may hold that is refused: a view of an operand is a place for a schedule, no expression
REFUSALS = re.compile("float64 arithmetic|(reshape|permute|expand) is not pointwise")


@st.composite
def stages(draw: Draw) -> Chain:
    """A transposed convolution and up to six pointwise stages."""
    g = Growing((2, 3, *(draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 3))))), train=False)
    g.space["v"] = g.space["x"]
    while not g.count:
        with g.attempt():
            g.assign(str(convolution(draw, g, "x")))
    for _ in range(draw(st.integers(1, 6))):
        floats = [v for v in g.values() if g.value(v).is_floating_point()]
        with g.attempt():
            g.assign(pointwise(draw, g, draw(st.sampled_from([floats[-1], floats[-1], *floats]))))
    return g.finish((g.values()[-1],), export=False)


def regions(chain: Chain) -> list[tuple[Region, dict[str, Tensor]]]:
    """The chain's regions in float32, with data for their inputs."""
    model, x = chain.make(torch.float32)
    found = []
    for part in fxfuse.explain(model, x).regions:
        g = torch.Generator().manual_seed(0)
        given = {
            n: torch.randn([s or 1 for s in t.shape], generator=g).to(t.dtype) for n, t in part.region.original.inputs
        }
        found.append((part.region, given))
    return found


def split(name: str, region: Region, given: dict[str, Tensor]) -> tuple[Expression, Program, dict[str, Tensor]]:
    """The expression behind the region's convolution, and the program of it with all that it reads."""
    program = region.original
    (value,) = region.anchor.outs
    at = program.body.index(region.anchor)
    before = Program(program.inputs, program.body[: at + 1], (value,))
    tensors = {**given, value: before.run(list(given.values()))[0]}
    types = {n: TensorType(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    result = program.outputs[0]
    e = emit_expression(name, program.body, value=value, result=result, types=types)
    return e, Program(tuple(types.items()), program.body[at + 1 :], (result,)), {value: tensors.pop(value), **tensors}


@needs_compiler
@settings(max_examples=12)
@given(st.lists(stages(), min_size=1, max_size=8))
def test_random_chains(chains: list[Chain]) -> None:
    made = []
    for i, (region, data) in enumerate(r for chain in chains for r in regions(chain)):
        try:
            made.append(split(f"E{i}", region, data))
        except NotEmittable as reason:
            if not REFUSALS.search(str(reason)):
                raise
    library = compiled(source([e for e, _, _ in made])) if made else None
    for e, program, tensors in made:
        assert library is not None
        value = next(iter(tensors))
        got = run(library, e, tensors[value], tensors)
        ordered = [tensors[n] for n, _ in program.inputs]
        expected = program.run(ordered)[0].float()
        truth = program.run([t.double() if t.is_floating_point() else t for t in ordered])[0].float()
        settled = torch.isclose(expected, truth, rtol=1e-4, atol=1e-5, equal_nan=True)
        wrong = settled & ~torch.isclose(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert wrong.sum() <= 0.01 * wrong.numel(), f"{program}\n{e.code}\n{got[wrong]}\n{expected[wrong]}"


# --- the same text on a GPU's compiler ------------------------------------------------------------
def kernels(expressions: list[Expression]) -> str:
    """One kernel per expression, over a block of elements."""
    parts = [f'#include "{HEADER}"']
    for e in expressions:
        call = "expression(out[i], blockIdx.z, blockIdx.y, blockIdx.x, threadIdx.y, threadIdx.x)"
        head = f'extern "C" __global__ void run_{e.name}(const __grid_constant__ {e.name} expression, float* out)'
        size = 8 * len(e.fields) or 1
        parts += [e.code, f"static_assert(sizeof({e.name}) == {size});"]
        parts.append(f"{head} {{ const int i = threadIdx.x; out[i] = {call}; }}")
    return "\n".join(parts)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_text_is_cuda(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs the extra fxfuse[cuda]")
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    made = [emit(case.lines, f"E{i}") for i, (_, case) in enumerate(ALL)]
    cubin = jit.compile_cubin(kernels(made), arch)
    assert cubin.kernels.keys() == {f"run_{e.name}" for e in made}
    assert all(k.spills == 0 for k in cubin.kernels.values())
