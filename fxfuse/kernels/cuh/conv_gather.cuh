// Partial statistics of what a convolution stores, from its accumulators.
#pragma once
#include "conv_store.cuh"

namespace fxfuse {

// A slot of statistics per warp and pass: of up to m_tiles * 16 * classes elements of a channel.
template <class Problem, class Out, int classes, class Value, class Expression>
FXFUSE_INLINE void gather(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                          const Residue (&residue)[classes], int group, int pass, int passes, Value value,
                          const Expression& expression) {
  constexpr int rows = Problem::m_tiles * 2 * classes;
  static_assert(rows <= 32, "one bit per row and class");
  const Tile& t = place.box;
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int q = 0; q < classes; ++q)
        if (residue[q].valid && place.inside(i, r) && (t.d + place.z(i, r)) * o.step_d + residue[q].d < o.size_d &&
            (t.h + place.y(i, r)) * o.step_h + residue[q].h < o.size_h &&
            (t.w + place.x(i, r)) * o.step_w + residue[q].w < o.size_w)
          inside |= 1u << ((i * 2 + r) * classes + q);
  int count = __popc(inside);
#pragma unroll
  for (int s = 4; s < 32; s *= 2) count += __shfl_xor_sync(~0u, count, s);  // lanes with other rows
  const float reciprocal = 1.f / (float)(count > 0 ? count : 1);
  const int warp = (threadIdx.x >> 5) & 3, number = ((t.number * passes + pass) * kConsumers + group) * 4 + warp;
  const int64_t slot = (int64_t)t.n * to.partials.slots + number;
  if (place.lane == 0) to.partials.counts[slot] = count;
  const int first = t.column * Problem::columns, channel0 = t.group * g.out_channels + first;
  float2* const parts = to.partials.parts + slot * to.partials.channels + channel0;
#pragma unroll
  for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      schedule_barrier();
      const int column = place.column(j, e);
      float v[rows];
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int q = 0; q < classes; ++q) {
            const int k = (i * 2 + r) * classes + q;
            v[k] = 0.f;
            if (inside >> k & 1) {
              // as it is stored
              v[k] = to_float(from_float<Out>(expression(value(i, r, j, e, q), t.n, channel0 + column,
                                                         (t.d + place.z(i, r)) * o.step_d + residue[q].d,
                                                         (t.h + place.y(i, r)) * o.step_h + residue[q].h,
                                                         (t.w + place.x(i, r)) * o.step_w + residue[q].w)));
              sum += v[k];
            }
          }
#pragma unroll
      for (int s = 4; s < 32; s *= 2) sum += __shfl_xor_sync(~0u, sum, s);
      const float mean = sum * reciprocal;
#pragma unroll
      for (int k = 0; k < rows; ++k)
        if (inside >> k & 1) squares = fmaf(v[k] - mean, v[k] - mean, squares);
#pragma unroll
      for (int s = 4; s < 32; s *= 2) squares += __shfl_xor_sync(~0u, squares, s);
      if (place.lane < 4 && first + column < g.out_channels) parts[column] = make_float2(mean, squares);
    }
}

}  // namespace fxfuse
