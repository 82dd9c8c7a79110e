// Reductions over channels, bound by memory: all channels of a position in the registers of one thread, or of a few
// neighbouring ones where channels are neighbours in memory.
#pragma once
#include "fold.cuh"
#include "map.cuh"

namespace fxfuse {

// `Fold` has constants: channels, lanes (a power of two, threads per position), last, last_made (channels are
// neighbours in the input, in the result); and `Op`, a reduction of fold.cuh.
template <class Fold>
struct Folding {
  static constexpr int each = (Fold::channels + Fold::lanes - 1) / Fold::lanes;
  float v[each];
  int lane;

  FXFUSE_INLINE bool there(int k) const { return Fold::channels % Fold::lanes == 0 || k * Fold::lanes + lane < Fold::channels; }
  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    float r = zero;
#pragma unroll
    for (int k = 0; k < each; ++k)
      if (there(k)) r = combine(r, of(v[k]));
#pragma unroll
    for (int o = Fold::lanes / 2; o; o /= 2) r = combine(r, __shfl_xor_sync(~0u, r, o));
    return r;
  }
  FXFUSE_INLINE void subtract(float shift) {
#pragma unroll
    for (int k = 0; k < each; ++k) v[k] -= shift;
  }
  FXFUSE_INLINE void raise(const Powers& powers) {
#pragma unroll
    for (int k = 0; k < each; ++k) v[k] = powers(v[k]);
  }
};

template <class Fold, class In, class Out, class Before, class After>
FXFUSE_INLINE void fold_channels(const ReductionArguments<In, Out, Before, After>& a) {
  const unsigned plane = (unsigned)a.size.d * a.size.h * a.size.w, units = plane * a.size.n;
  const unsigned thread = block_from_end() * (unsigned)kMapThreads + threadIdx.x;
  const unsigned found = thread / Fold::lanes, unit = found < units ? found : units - 1;  // all take part in shuffles
  const unsigned n = unit / plane, p = unit - n * plane, row = p / a.size.w, slab = row / a.size.h;
  const int w = p - row * a.size.w, h = row - slab * a.size.h, d = slab;
  const int64_t step = Fold::last ? 1 : plane;
  const int64_t base = (int64_t)n * Fold::channels * plane + (Fold::last ? (int64_t)p * Fold::channels : p);
  Folding<Fold> f;
  f.lane = thread % Fold::lanes;
#pragma unroll
  for (int k = 0; k < f.each; ++k) {
    const int c = k * Fold::lanes + f.lane;
    f.v[k] = f.there(k) ? to_float(a.in[base + c * step]) : 0.f;
  }
#pragma unroll
  for (int k = 0; k < f.each; ++k)
    if (f.there(k)) f.v[k] = a.before(f.v[k], n, k * Fold::lanes + f.lane, d, h, w);
  const auto r = Fold::Op::fold(f, Fold::channels);
  if (found >= units) return;
  if constexpr (Fold::Op::keeps) {
    const int64_t step_made = Fold::last_made ? 1 : plane;
    const int64_t to = (int64_t)n * Fold::channels * plane + (Fold::last_made ? (int64_t)p * Fold::channels : p);
#pragma unroll
    for (int k = 0; k < f.each; ++k) {
      const int c = k * Fold::lanes + f.lane;
      if (f.there(k)) a.out[to + c * step_made] = from_float<Out>(a.after(Fold::Op::result(f.v[k], r), n, c, d, h, w));
    }
  } else {
    if (f.lane == 0) a.out[unit] = from_float<Out>(a.after(r, n, 0, d, h, w));
  }
}

}  // namespace fxfuse
