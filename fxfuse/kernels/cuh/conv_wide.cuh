// Stores of a convolution of which samples lie side by side in the rows of an instruction: neighbouring threads have other
// samples, so that each thread stores by itself as much of a row of the output as it has.
#pragma once
#include "conv_store.cuh"

namespace fxfuse {

// As `store_direct`, but a thread's tiles of rows are neighbours along w, two by two, and so are all classes along w: twice
// as many elements at once.
template <class Problem, class Out, int classes, int width, bool reversed, class Value, class Expression>
FXFUSE_INLINE void store_wide(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                              const Residue (&residue)[classes], const Value& value, const Expression& expression) {
  constexpr int twos = Problem::m_tiles / 2, runs = classes / width, each = 2 * width;
  static_assert(width == Problem::stride_w && Problem::m_tiles % 2 == 0);
  const Tile& t = place.box;
  const int first = t.column * Problem::columns, channel0 = t.group * g.out_channels + first;
  Out* const sample = to.out + t.n * to.stride.n + channel0 * to.stride.c;
  // a box begins at an even position, so does each two of its positions
  const uint64_t strides = to.stride.n | to.stride.c | to.stride.d | to.stride.h;
  const bool aligned = (((uint64_t)to.out | strides * sizeof(Out)) & (each * sizeof(Out) - 1)) == 0;
  const uint32_t inside = inside_mask(g, place, o, residue);
  int offset[twos][2][runs];
#pragma unroll
  for (int k = 0; k < twos; ++k)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int p = 0; p < runs; ++p) {
        const Residue& one = residue[p * width];
        offset[k][r][p] = place.sample(r) * (int)to.stride.n + ((t.d + place.z(2 * k, r)) * o.step_d + one.d) * (int)to.stride.d +
                          ((t.h + place.y(2 * k, r)) * o.step_h + one.h) * (int)to.stride.h + (t.w + place.x(2 * k, r)) * o.step_w;
      }
#pragma unroll
  for (int j = 0; j < Problem::columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      schedule_barrier();
      const int column = place.column(j, e);
      if (first + column >= g.out_channels) continue;
      const Results<Problem, Value, Expression> results(g, place, value, expression, j, e);
      Out* out = sample + column * to.stride.c;
      settle(out);
#pragma unroll
      for (int k = 0; k < twos; ++k)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int p = 0; p < runs; ++p) {
            float v[each];
            uint32_t there = 0;
#pragma unroll
            for (int u = 0; u < each; ++u) {
              const int i = 2 * k + u / width, q = p * width + (reversed ? width - 1 - u % width : u % width);
              const bool one = inside >> ((i * 2 + r) * classes + q) & 1;
              there |= (uint32_t)one << u;
              v[u] = results(place, o, residue[q], one, i, r, q);
            }
            Out* const to_ = out + (uint32_t)offset[k][r][p];
            if (aligned && there == (1u << each) - 1) {
              store_some(to_, v);
            } else {
#pragma unroll
              for (int u = 0; u < each; ++u)
                if (there >> u & 1) to_[u] = from_float<Out>(v[u]);
            }
          }
    }
}

}  // namespace fxfuse
