"""CUDA C++ of a planar convolution kernel, beside what ``emit.py`` has for all: the tables and the entry."""

from __future__ import annotations

from collections.abc import Iterable

from fxfuse.kernels.convolution import Specialisation
from fxfuse.kernels.factors import DEPTH, factors_of, instructions

_ENTRIES = """
extern "C" __global__ void __launch_bounds__(fxfuse::kThreads, 1)
convolution(const __grid_constant__ fxfuse::TensorMap map, const {t}* weights,
            const __grid_constant__ fxfuse::Geometry g, uint32_t* marks,
            const __grid_constant__ Problem::Epilogue::Arguments arguments) {{
  fxfuse::conv_planar<Problem>(&map, weights, g, marks, arguments);
}}
extern "C" __global__ void __launch_bounds__(256)
unmark(const __grid_constant__ fxfuse::SampleState samples, int count, const {bias}* bias, float* wide,
       int all_channels) {{
  fxfuse::begin_dependent();
  fxfuse::unmark_samples(samples, count);
  if (bias) fxfuse::widen(bias, wide, all_channels);
}}
"""


def entries(t: str, bias: str) -> str:
    """For x and weights of the C++ type ``t``, and a ``bias`` of that."""
    return _ENTRIES.format(t=t, bias=bias)


def tables(made: Specialisation) -> list[str]:
    """What the instructions multiply, and where those of each class begin."""
    low, _ = made.layer.reach
    factors, taps, begins = list[str](), list[int](), list[str]()
    listed: dict[tuple[int, ...], int] = {}  # where a factor's taps begin
    for one in made.passes:
        begin = []
        for some in factors_of(one, made.chunk):
            begin.append(len(factors) // DEPTH)
            for f in some:
                d, h, w = (a - b for a, b in zip(f.delta, low, strict=True))
                if f.taps not in listed:
                    listed[f.taps] = len(taps)
                    taps += f.taps
                factors.append(f"{{{d}, {h}, {w}, {f.channel}, {listed[f.taps]}, {len(f.taps)}}}")
            factors += ["{}"] * (-len(factors) % DEPTH)
        begins.append(_list(begin + [len(factors) // DEPTH] * (made.residues + 1 - len(begin))))
    return [
        f"__constant__ unsigned short kSeries[][{made.residues + 1}] = {_list(begins)};",
        f"__constant__ fxfuse::Factor kFactors[] = {_list(factors or ['{}'])};",
        f"__constant__ unsigned short kTap[] = {_list(taps or [0])};",
    ]


def members(made: Specialisation) -> str:
    """Of ``Problem``: see ``conv_planar.cuh``."""
    return f"""  static constexpr int instructions = {instructions(made.passes, made.chunk)};
  static FXFUSE_INLINE fxfuse::Factor factor(int i) {{ return kFactors[i]; }}
  static FXFUSE_INLINE int tap(int i) {{ return kTap[i]; }}
  static FXFUSE_INLINE int series(int pass, int q) {{ return kSeries[pass][q]; }}"""


def _list(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"
