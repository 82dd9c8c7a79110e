"""CUDA C++ of the kernels of a collapsed mean: entries around ``tap_sums.cuh`` and ``contract_taps.cuh``. Pure."""

from __future__ import annotations

from fxfuse.kernels.codegen.expression import Expression
from fxfuse.kernels.convolution.entries import TYPES


def emit_sums(dtype: str, count: int, *, keeps: bool) -> str:
    """Entries ``tap_sums`` and ``add_slots``. ``count`` elements are read at once; ``keeps``: the inner dim is kept."""
    return f"""#include "dependent.cuh"
#include "tap_sums.cuh"
extern "C" __global__ void __launch_bounds__(fxfuse::kSumThreads, 3)
tap_sums(const __grid_constant__ fxfuse::SumsArguments<{TYPES[dtype]}> a) {{
  fxfuse::begin_dependent();
  fxfuse::tap_sums<{count}, {str(keeps).lower()}>(a);
}}
extern "C" __global__ void __launch_bounds__(fxfuse::kSumThreads)
add_slots(const __grid_constant__ fxfuse::SlotsArguments a) {{
  fxfuse::begin_dependent();
  fxfuse::add_slots(a);
}}
"""


def emit_contraction(dtype: str, output: str, after: Expression | None, *, rows: int, across: int, taps: int) -> str:
    """The entry ``contract_taps``. ``dtype``: of the weights; ``rows`` samples and ``across`` channels of a block."""
    name = "fxfuse::Identity" if after is None else after.name
    arguments = f"fxfuse::ContractArguments<{TYPES[dtype]}, {TYPES[output]}, {name}, {taps}>"
    return "\n".join([
        '#include "contract_taps.cuh"',
        '#include "dependent.cuh"',
        *([] if after is None else [after.code]),
        'extern "C" __global__ void __launch_bounds__(fxfuse::kContractThreads)',
        f"contract_taps(const __grid_constant__ {arguments} a) {{",
        "  fxfuse::begin_dependent();",
        f"  fxfuse::contract_taps<{rows}, {across}>(a);",
        "}",
        "",
    ])  # fmt: skip
