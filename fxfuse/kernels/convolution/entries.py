"""CUDA C++ of the entries of a convolution's kernels: one per launch, each a call of an algorithm of ``cuh/``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxfuse.kernels.convolution.specialisation import Specialisation

#: C++ types of elements in memory
TYPES = {"f32": "float", "f16": "fxfuse::Half", "bf16": "fxfuse::BFloat"}
ITEMSIZES = {"f32": 4, "f16": 2, "bf16": 2}
#: types of matrix operands
OPERANDS = {"f32": "f16", "f16": "f16", "bf16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Prologue:
    """What is made of elements of x on their way, which are of the dtype ``given`` in memory: ``front``, the name of an
    expression struct in ``code``.
    """

    given: str
    front: str
    code: str


def entries(
    made: Specialisation, dtype: str, output: str, bias: str, prologue: Prologue | None, *, gathers: bool
) -> Iterator[str]:
    """For x and weights of ``dtype``, results of ``output``, and a ``bias`` of that; ``gathers``: with statistics."""
    words = {
        "t": TYPES[dtype],
        "half": TYPES[OPERANDS[dtype]],
        "bias": TYPES[bias],
        "out": TYPES[output],
        **_of_bias(TYPES[bias], scaled=dtype == "f32"),
        **_of_x(TYPES[dtype], prologue),
        # blocks per multiprocessor, for which there are registers; `again` has little to do
        "resident": (4 if dtype == "f32" else 3) - (prologue is not None),
        "resident_again": 4 if prologue is None else 2,
    }
    yield (_PLANAR if made.planar else _MULTIPLYING).format(**words)
    yield _DIRECT.format(**words)
    if dtype == "f32" and not made.planar:
        yield _SCALED.format(**words)
    if made.watched:
        yield _WATCHED
    if gathers:
        yield _MERGE.format(**words)


def _of_bias(kind: str, *, scaled: bool) -> dict[str, str]:
    """Without scales to be measured, `prepare` has what `measure` does of the bias."""
    if scaled:
        return {"scaled": "true", "wide": "", "widen": ""}
    wide = f", const {kind}* bias, float* wide, int all_channels"
    return {
        "scaled": "false",
        "wide": wide,
        "widen": "\n  if (bias) fxfuse::widen(bias, wide, all_channels);",
    }


def _of_x(t: str, prologue: Prologue | None) -> dict[str, str]:
    """``given``: the type of its elements; ``front``: the parameter in which what is made of them has its operands;
    ``input``: both. `measure` counts elements of a sample: ``g`` tells it which they are, where that matters.
    """
    if prologue is None:
        return {"given": t, "front": "", "input": f"const fxfuse::Input<{t}, {t}, fxfuse::Identity> input(x, {{}});",
                "parameter": "", "g": "{}"}  # fmt: skip
    given = TYPES[prologue.given]
    return {
        "given": given,
        "front": f", const __grid_constant__ {prologue.front} front",
        "input": f"const fxfuse::Input<{given}, {t}, {prologue.front}> input{{x, front}};",
        "parameter": ", const __grid_constant__ fxfuse::RowGeometry g",
        "g": "g",
    }


_MULTIPLYING = """
extern "C" __global__ void __launch_bounds__(fxfuse::kThreads, 1)
convolution(const __grid_constant__ fxfuse::TensorMap map, const uint8_t* weights,
            const __grid_constant__ fxfuse::Geometry g,
            const __grid_constant__ Problem::Epilogue::Arguments arguments) {{
  fxfuse::conv_wgmma<Problem>(&map, weights, g, arguments);
}}
extern "C" __global__ void __launch_bounds__(256, {resident})
prepare(const {given}* x, {half}* rows, const __grid_constant__ fxfuse::SampleState samples,
        const __grid_constant__ fxfuse::RowGeometry g, const {t}* w, uint8_t* packed, const float* scale, int chunks,
        int column_tiles, int in_channels, int out_channels, int volume, int weight_bytes,
        int blocks_weights{wide}{front}) {{
  fxfuse::begin_dependent();{widen}
  {input}
  if (blockIdx.x < g.blocks)
    fxfuse::to_rows<decltype(input), {half}, Problem>(blockIdx.x, input, rows, samples, g);
  else
    fxfuse::pack_weights<Problem, {t}, {half}, {scaled}>(blockIdx.x - g.blocks, blocks_weights, w, packed, scale,
                                                         chunks, column_tiles, in_channels, out_channels, volume,
                                                         weight_bytes);
}}
"""
_DIRECT = """
extern "C" __global__ void __launch_bounds__(256, 4)
direct(const {given}* x, const {t}* w, fxfuse::DirectGeometry d, fxfuse::Geometry g,
       const __grid_constant__ Problem::Epilogue::Arguments arguments{front}) {{
  fxfuse::begin_dependent();
  {input}
  fxfuse::direct_elements<Problem, Direct>(input, w, d, g, arguments);
}}
"""
_SCALED = """
extern "C" __global__ void __launch_bounds__(256)
measure(const float* w, const {bias}* bias, const __grid_constant__ fxfuse::ChannelState channels, const float* x,
        const __grid_constant__ fxfuse::SampleState samples, int64_t size, int in_channels, int out_channels,
        int volume, int all_channels{parameter}{front}) {{
  fxfuse::begin_dependent();
  {input}
  if (blockIdx.x < all_channels)
    fxfuse::measure_weights<{bias}, Problem::headroom>(blockIdx.x, w, bias, channels, in_channels, out_channels,
                                                       volume);
  else
    fxfuse::measure_sample(blockIdx.x - all_channels, input, samples, size, {g});
}}
extern "C" __global__ void __launch_bounds__(256, {resident_again})
again(const float* x, {half}* rows, const __grid_constant__ fxfuse::SampleState samples,
      const __grid_constant__ fxfuse::RowGeometry g{front}) {{
  fxfuse::begin_dependent();
  {input}
  fxfuse::to_rows_again<decltype(input), {half}, Problem>(input, rows, samples, g);
}}
"""
_WATCHED = """
extern "C" __global__ void __launch_bounds__(256)
unmark(const __grid_constant__ fxfuse::SampleState samples, int count) {
  fxfuse::begin_dependent();
  fxfuse::unmark_samples(samples, count);
}
"""
_MERGE = """
extern "C" __global__ void __launch_bounds__(fxfuse::kMergeThreads, 2)
merge(const {given}* x, const {t}* w, fxfuse::DirectGeometry d, fxfuse::Geometry g,
      const __grid_constant__ Problem::Epilogue::Arguments arguments, int pieces, double* merged{front}) {{
  fxfuse::begin_dependent();
  {input}
  fxfuse::direct_statistics<Problem, Direct, {out}>(input, w, d, g, arguments, pieces, merged);
}}
"""
_PLANAR = """
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
