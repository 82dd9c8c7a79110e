// What training-mode BatchNorm does to its buffers, in place and in one launch: every product and sum is rounded as
// torch's operators, one after the other, round it.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

constexpr int kRunningThreads = 256;

template <class T>
FXFUSE_INLINE float rounded(float v) { return to_float(from_float<T>(v)); }

template <class T, class B>
FXFUSE_INLINE void move_to(T& running, const B& batch, float factor, float rest) {
  running = from_float<T>(rounded<T>(to_float(running) * rest) + rounded<T>(rounded<T>(to_float(batch)) * factor));
}

// One block. `count`, where there is one, grows by one, and is what a `cumulative` average divides by; others have
// `factor` of the batch, and `rest` of what was there.
template <class T, class B>
FXFUSE_INLINE void move_running(T* mean, T* var, int64_t* count, const B* batch_mean, const B* batch_var, int channels,
                                float factor, float rest, bool cumulative) {
  const int64_t batches = count ? *count + 1 : 0;
  __syncthreads();  // all have read it
  if (count && threadIdx.x == 0) *count = batches;
  if (cumulative) factor = rounded<T>(1.f / rounded<T>((float)batches)), rest = rounded<T>(1.f - factor);
  for (int c = threadIdx.x; c < channels; c += kRunningThreads) {
    move_to(mean[c], batch_mean[c], factor, rest);
    move_to(var[c], batch_var[c], factor, rest);
  }
}

}  // namespace fxfuse
