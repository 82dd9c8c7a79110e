"""CUDA C++ of the entries of a convolution's kernels: one per launch, each a call of an algorithm of ``cuh/``."""

from __future__ import annotations

from collections.abc import Iterator

from fxfuse.kernels.convolution import Specialisation

#: C++ types of elements in memory
TYPES = {"f32": "float", "f16": "fxfuse::Half", "bf16": "fxfuse::BFloat"}
ITEMSIZES = {"f32": 4, "f16": 2, "bf16": 2}
#: types of matrix operands
OPERANDS = {"f32": "f16", "f16": "f16", "bf16": "bf16"}


def entries(made: Specialisation, dtype: str, output: str, bias: str, *, gathers: bool) -> Iterator[str]:
    """For x and weights of ``dtype``, results of ``output``, and a ``bias`` of that; ``gathers``: with statistics."""
    t = TYPES[dtype]
    yield _PLANAR.format(t=t, bias=TYPES[bias]) if made.planar else _multiplying(dtype, bias)
    yield _DIRECT.format(t=t)
    if dtype == "f32" and not made.planar:
        yield _SCALED.format(half=TYPES[OPERANDS[dtype]], bias=TYPES[bias])
    if made.watched:
        yield _WATCHED
    if gathers:
        yield _MERGE.format(t=t, out=TYPES[output])


def _multiplying(dtype: str, bias: str) -> str:
    t, half, scaled = TYPES[dtype], TYPES[OPERANDS[dtype]], str(dtype == "f32").lower()
    return f"""
extern "C" __global__ void __launch_bounds__(fxfuse::kThreads, 1)
convolution(const __grid_constant__ fxfuse::TensorMap map, const uint8_t* weights,
            const __grid_constant__ fxfuse::Geometry g,
            const __grid_constant__ Problem::Epilogue::Arguments arguments) {{
  fxfuse::conv_wgmma<Problem>(&map, weights, g, arguments);
}}
extern "C" __global__ void __launch_bounds__(256, {4 if scaled == "true" else 3})
prepare(const {t}* x, {half}* rows, const __grid_constant__ fxfuse::SampleState samples,
        const __grid_constant__ fxfuse::RowGeometry g, const {t}* w, uint8_t* packed, const float* scale, int chunks,
        int column_tiles, int in_channels, int out_channels, int volume, int weight_bytes,
        int blocks_weights{_BIAS.format(bias=TYPES[bias]) if scaled == "false" else ""}) {{
  fxfuse::begin_dependent();{_WIDEN if scaled == "false" else ""}
  if (blockIdx.x < g.blocks)
    fxfuse::to_rows<{t}, {half}, Problem>(blockIdx.x, x, rows, samples, g);
  else
    fxfuse::pack_weights<Problem, {t}, {half}, {scaled}>(blockIdx.x - g.blocks, blocks_weights, w, packed, scale,
                                                         chunks, column_tiles, in_channels, out_channels, volume,
                                                         weight_bytes);
}}
"""


_DIRECT = """
extern "C" __global__ void __launch_bounds__(256, 4)
direct(const {t}* x, const {t}* w, fxfuse::DirectGeometry d, fxfuse::Geometry g,
       const __grid_constant__ Problem::Epilogue::Arguments arguments) {{
  fxfuse::begin_dependent();
  fxfuse::direct_elements<Problem, Direct>(x, w, d, g, arguments);
}}
"""
#: without scales to be measured, `prepare` has what `measure` does of the bias
_BIAS = ", const {bias}* bias, float* wide, int all_channels"
_WIDEN = """
  if (bias) fxfuse::widen(bias, wide, all_channels);"""
_SCALED = """
extern "C" __global__ void __launch_bounds__(256)
measure(const float* w, const {bias}* bias, const __grid_constant__ fxfuse::ChannelState channels, const float* x,
        const __grid_constant__ fxfuse::SampleState samples, int64_t size, int in_channels, int out_channels,
        int volume, int all_channels) {{
  fxfuse::begin_dependent();
  if (blockIdx.x < all_channels)
    fxfuse::measure_weights<{bias}, Problem::headroom>(blockIdx.x, w, bias, channels, in_channels, out_channels,
                                                       volume);
  else
    fxfuse::measure_sample(blockIdx.x - all_channels, x, samples, size);
}}
extern "C" __global__ void __launch_bounds__(256, 4)
again(const float* x, {half}* rows, const __grid_constant__ fxfuse::SampleState samples,
      const __grid_constant__ fxfuse::RowGeometry g) {{
  fxfuse::begin_dependent();
  fxfuse::to_rows_again<float, {half}, Problem>(x, rows, samples, g);
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
merge(const {t}* x, const {t}* w, fxfuse::DirectGeometry d, fxfuse::Geometry g,
      const __grid_constant__ Problem::Epilogue::Arguments arguments, int pieces, fxfuse::Moments* moments) {{
  fxfuse::begin_dependent();
  fxfuse::direct_statistics<Problem, Direct, {out}>(x, w, d, g, arguments, pieces, moments);
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
