"""CUDA C++ of a planar convolution kernel, beside what ``emit.py`` has for all: the tables."""

from __future__ import annotations

from collections.abc import Iterable

from fxfuse.kernels.convolution.factors import DEPTH, factors_of, instructions
from fxfuse.kernels.convolution.specialisation import Specialisation


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
