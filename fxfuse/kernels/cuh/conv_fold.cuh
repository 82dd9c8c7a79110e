// Reductions over channels in a convolution's epilogue: one tile of columns holds all channels, so that a position's lie
// in the accumulators of four neighbouring threads.
//
// `Problem::Fold` is a reduction of fold.cuh with a constant `channels`, or NoFold.
#pragma once
#include "conv_store.cuh"
#include "fold.cuh"

namespace fxfuse {

struct NoFold {};

// The channels of one position: `at(j, e)` is the accumulator of column j * 8 + (lane & 3) * 2 + e.
template <class Problem, class At>
struct QuadChannels {
  static constexpr int blocks = Problem::columns / 8, channels = Problem::Fold::channels;
  At at;
  int lane;

  static FXFUSE_INLINE bool there(int lane, int j, int e) { return j * 8 + 8 <= channels || j * 8 + (lane & 3) * 2 + e < channels; }
  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    float r = zero;
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (there(lane, j, e)) r = combine(r, of(at(j, e)));
    r = combine(r, __shfl_xor_sync(~0u, r, 1));
    return combine(r, __shfl_xor_sync(~0u, r, 2));
  }
  template <class Made>
  FXFUSE_INLINE void each(Made made) {
#pragma unroll
    for (int j = 0; j < blocks; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) at(j, e) = made(at(j, e));
  }
  FXFUSE_INLINE void subtract(float shift) {
    each([&](float v) { return v - shift; });
  }
  FXFUSE_INLINE void exponentials() { each(exponential); }
};

// Reduces expression(value(i, r, j, e, q)) over channels. `kept(i, r, j, e, q)` are accumulators: they become the results
// of every channel, or, where there is one of all, those of j = e = 0 become it in all four threads.
template <class Problem, int classes, class Kept, class Value, class Expression>
FXFUSE_INLINE void fold_accumulators(const Geometry& g, const Place<Problem>& place, const Extent& o,
                                     const Residue (&residue)[classes], Kept kept, Value value, const Expression& expression) {
  using Fold = typename Problem::Fold;
  static_assert(Fold::channels <= Problem::columns, "one tile of columns holds all channels");
  constexpr int blocks = Problem::columns / 8;
  const Tile& t = place.box;
  const uint32_t inside = inside_mask(g, place, o, residue);
#pragma unroll
  for (int j = 0; j < blocks; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      schedule_barrier();  // or the loads of all columns are hoisted, and the accumulators spilt
#pragma unroll
      for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int q = 0; q < classes; ++q) {
            float y = value(i, r, j, e, q);
            if ((inside >> ((i * 2 + r) * classes + q) & 1) && place.column(j, e) < Fold::channels)
              y = expression(y, t.n, place.column(j, e), (t.d + place.z(i, r)) * o.step_d + residue[q].d,
                             (t.h + place.y(i, r)) * o.step_h + residue[q].h, (t.w + place.x(i, r)) * o.step_w + residue[q].w);
            kept(i, r, j, e, q) = y;
          }
    }
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int q = 0; q < classes; ++q) {
        auto at = [&](int j, int e) -> float& { return kept(i, r, j, e, q); };
        QuadChannels<Problem, decltype(at)> channels{at, place.lane};
        const float made = Fold::fold(channels, Fold::channels);
        if constexpr (Fold::keeps)
          channels.each([&](float v) { return Fold::result(v, made); });
        else
          at(0, 0) = made;
      }
}

// Stores value(i, r, 0, 0, q), one per position, straight from registers: one of four threads does.
template <class Problem, class Out, int classes, class Value, class Expression>
FXFUSE_INLINE void store_one(const Destination<Out>& to, const Geometry& g, const Place<Problem>& place, const Extent& o,
                             const Residue (&residue)[classes], Value value, const Expression& expression) {
  const Tile& t = place.box;
  const uint32_t inside = (place.lane & 3) == 0 ? inside_mask(g, place, o, residue) : 0;
  Out* const sample = to.out + t.n * to.stride.n;
#pragma unroll
  for (int i = 0; i < Problem::m_tiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int q = 0; q < classes; ++q) {
        if (!(inside >> ((i * 2 + r) * classes + q) & 1)) continue;
        const int d = (t.d + place.z(i, r)) * o.step_d + residue[q].d, h = (t.h + place.y(i, r)) * o.step_h + residue[q].h,
                  w = (t.w + place.x(i, r)) * o.step_w + residue[q].w;
        sample[d * to.stride.d + h * to.stride.h + w * to.stride.w] =
            from_float<Out>(expression(value(i, r, 0, 0, q), t.n, 0, d, h, w));
      }
}

}  // namespace fxfuse
