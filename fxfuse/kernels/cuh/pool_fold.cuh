// Pools with a reduction over channels behind them, bound by memory: what a pool makes is never written. Both tensors
// are contiguous.
#pragma once
#include "fold.cuh"
#include "map_pool.cuh"

namespace fxfuse {

template <class In, class Out, class Before, class After, class Behind>
struct PoolFoldArguments {
  const In* in;
  Out* out;
  Sizes size, made;  // of the input, of what the pool makes
  alignas(8) Before before;
  alignas(8) After after;
  alignas(8) Behind behind;
};

// All channels of one position, of which `slices` threads, a warp apart or more, make some each while they reduce them:
// once, so that the reduction is one that asks for them once.
template <class Pool, int slices, class In, class Out, class Before, class After, class Behind>
struct PoolFolding {
  static constexpr int planes = Pool::planes, together = kMapThreads / slices;
  const PoolFoldArguments<In, Out, Before, After, Behind>& a;
  int n, d, h, w;

  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    __shared__ float shared[slices][together];
    const int place = threadIdx.x % together, slice = threadIdx.x / together;
    const int64_t inputs = (int64_t)a.size.d * a.size.h * a.size.w;
    float result = zero;
#pragma unroll 1
    for (int first = slice; first < a.size.c; first += planes * slices) {
      Plane<In> from[planes];
      float y[planes];
#pragma unroll
      for (int r = 0; r < planes; ++r) {
        const int c = first + r * slices < a.size.c ? first + r * slices : first;
        from[r] = {a.in + ((int64_t)n * a.size.c + c) * inputs, n, c};
      }
      pool_at<Pool, false>(y, from, a.size, a.made, d, h, w, a.before);
#pragma unroll
      for (int r = 0; r < planes; ++r)
        if (first + r * slices < a.size.c) result = combine(result, of(a.after(y[r], n, from[r].c, d, h, w)));
    }
    shared[slice][place] = result;
    __syncthreads();
    result = shared[0][place];
#pragma unroll
    for (int k = 1; k < slices; ++k) result = combine(result, shared[k][place]);
    return result;
  }
};

// `Op`: a reduction of fold.cuh that makes one value.
template <class Pool, class Op, int slices, class In, class Out, class Before, class After, class Behind>
FXFUSE_INLINE void pool_fold(const PoolFoldArguments<In, Out, Before, After, Behind>& a) {
  constexpr int together = kMapThreads / slices;
  const unsigned positions = (unsigned)a.made.d * a.made.h * a.made.w, units = positions * a.made.n;
  const unsigned found = block_from_end() * (unsigned)together + threadIdx.x % together;
  const unsigned unit = found < units ? found : units - 1;  // all meet
  const unsigned n = unit / positions, p = unit - n * positions, row = p / a.made.w;
  const int w = p - row * a.made.w, d = row / a.made.h, h = row - d * a.made.h;
  PoolFolding<Pool, slices, In, Out, Before, After, Behind> f = {a, (int)n, d, h, w};
  const float y = Op::fold(f, a.size.c);
  if (threadIdx.x < together && found < units) a.out[unit] = from_float<Out>(a.behind(y, n, 0, d, h, w));
}

}  // namespace fxfuse
