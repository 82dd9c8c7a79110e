// A row of neighbours in memory, in the registers of several threads.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

// sizeof(T) * count consecutive bytes at once.
template <class T, int count>
struct alignas(sizeof(T) * count) Vector {
  T v[count];
};

// Elements of a row in the registers of `lanes` threads, for the reductions of fold.cuh: of thread `lane` those from
// (k * lanes + lane) * count on, `count` neighbours each.
template <int lanes, int count, int each>
struct HeldRow {
  float v[each * count];
  int lane, length;
  float* shared;  // of more than a warp, which hold one row: one number of each

  FXFUSE_INLINE int at(int k) const { return (k * lanes + lane) * count; }
  template <class Combine, class Of>
  FXFUSE_INLINE float all(float zero, Combine combine, Of of) const {
    float r = zero;
#pragma unroll
    for (int k = 0; k < each; ++k)
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (at(k) < length) r = combine(r, of(v[k * count + i]));
#pragma unroll
    for (int o = (lanes < 32 ? lanes : 32) / 2; o; o /= 2) r = combine(r, __shfl_xor_sync(~0u, r, o));
    if constexpr (lanes > 32) {
      constexpr int warps = lanes / 32;
      if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = r;
      __syncthreads();
      r = shared[0];
#pragma unroll
      for (int w = 1; w < warps; ++w) r = combine(r, shared[w]);
      __syncthreads();
    }
    return r;
  }
  template <class Made>
  FXFUSE_INLINE void make(Made made) {
#pragma unroll
    for (int k = 0; k < each * count; ++k) v[k] = made(v[k]);
  }
  FXFUSE_INLINE void subtract(float shift) {
    make([&](float v) { return v - shift; });
  }
  template <class Powers>
  FXFUSE_INLINE void raise(const Powers& powers) { make(powers); }
};

}  // namespace fxfuse
