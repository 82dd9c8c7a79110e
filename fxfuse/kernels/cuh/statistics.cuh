// Mean and variance in three stages, every sum in a fixed order: partial statistics of slots of elements, in float32
// around the slot's own mean; per sample and channel; of groups of those. The later stages add in float64.
#pragma once
#include "ptx.cuh"

namespace fxfuse {

// Partial statistics of a sample's elements: [sample][slot][channel] of mean and sum of squares around it, and how
// many elements every [sample][slot] has of a channel.
struct Partials {
  float2* parts;
  int* counts;
  int slots, channels;
};

// Of one sample and channel.
struct Moments {
  double mean, squares;  // squares around the mean
};

// Statistics of elements that come one by one, from sums around the first of them.
struct Running {
  double count = 0, sum = 0, shift = 0, shifted = 0, squares = 0;
  FXFUSE_INLINE void add(float v) {
    if (count == 0) shift = v;
    const double d = v - shift;
    count += 1, sum += v, shifted += d, squares += d * d;
  }
};

// Of any number of elements.
struct Counted {
  double count, mean, squares;
  FXFUSE_INLINE Counted(const Running& r)
      : count(r.count), mean(r.count > 0 ? r.sum / r.count : 0), squares(r.count > 0 ? r.squares - r.shifted * r.shifted / r.count : 0) {}
  FXFUSE_INLINE void merge(const Counted& o) {
    if (o.count == 0) return;
    const double all = count + o.count, d = o.mean - mean;
    mean = (count * mean + o.count * o.mean) / all;  // Inf stays Inf
    squares += o.squares + d * d * (count * o.count / all);
    count = all;
  }
};

// Sums of the threads of a block in a fixed order, in thread 0. `threads` is a power of two.
template <int threads, int numbers>
FXFUSE_INLINE void block_sum(double (&v)[numbers]) {
  __shared__ double shared[numbers][threads];
#pragma unroll
  for (int k = 0; k < numbers; ++k) shared[k][threadIdx.x] = v[k];
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (threadIdx.x < half)
#pragma unroll
      for (int k = 0; k < numbers; ++k) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < numbers; ++k) v[k] = shared[k][0];
  __syncthreads();
}

// Of all elements of a block's threads, a power of two of them, in a fixed order. `shared` is used before and after.
template <int threads, int doubles>
FXFUSE_INLINE Moments block_moments(const Running& mine, double (&shared)[doubles]) {
  static_assert(sizeof(shared) >= threads * sizeof(Counted), "there is room for what each thread has");
  Counted* const all = (Counted*)shared;
  __syncthreads();
  all[threadIdx.x] = Counted(mine);
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (threadIdx.x < half) all[threadIdx.x].merge(all[threadIdx.x + half]);
    __syncthreads();
  }
  const Moments made = {all[0].mean, all[0].squares};
  __syncthreads();
  return made;
}

constexpr int kMergeThreads = 512, kMerged = 8;  // per kMerged channels of a sample

// Merges the partial statistics of a sample's channels: a block of kMergeThreads per sample and kMerged channels. Where
// `fallback(n, c, running)` says that it has made them by itself, those count.
template <class Fallback>
FXFUSE_INLINE void merge_partials(const Partials& p, Moments* out, Fallback fallback) {
  constexpr int lanes = kMergeThreads / kMerged;
  __shared__ double shared[4 * kMergeThreads];
  double(*const sums)[kMergeThreads] = (double(*)[kMergeThreads])shared;  // count, sum, sum less shift, squares
  const int blocks = (p.channels + kMerged - 1) / kMerged, n = blockIdx.x / blocks;
  const int first = (blockIdx.x - n * blocks) * kMerged, lane = threadIdx.x / kMerged, c = first + threadIdx.x % kMerged;
  double count = 0, sum = 0, shifted = 0, squares = 0;
  const bool there = c < p.channels;
  const float2* parts = p.parts + (int64_t)n * p.slots * p.channels + (there ? c : 0);
  const int* counts = p.counts + (int64_t)n * p.slots;
  const double shift = parts[0].x;
#pragma unroll 8
  for (int slot = lane; slot < p.slots; slot += lanes) {
    const float2 part = parts[(int64_t)slot * p.channels];
    const double k = counts[slot], d = part.x - shift;
    count += k, sum += k * part.x, shifted += k * d, squares += part.y + k * d * d;  // an empty slot is all zero
  }
  sums[0][threadIdx.x] = count, sums[1][threadIdx.x] = sum, sums[2][threadIdx.x] = shifted, sums[3][threadIdx.x] = squares;
  __syncthreads();
  for (int half = kMergeThreads / 2; half >= kMerged; half /= 2) {
    if (threadIdx.x < half)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
    __syncthreads();
  }
  if (lane == 0 && there) {
    count = sums[0][threadIdx.x], shifted = sums[2][threadIdx.x];
    squares = sums[3][threadIdx.x] - shifted * shifted / count;
    out[(int64_t)n * p.channels + c] = {sums[1][threadIdx.x] / count, squares < 0 ? 0 : squares};
  }
  for (int i = 0; i < kMerged && first + i < p.channels; ++i) {
    Running mine;
    if (!fallback(n, first + i, mine)) continue;
    const Moments made = block_moments<kMergeThreads>(mine, shared);
    if (threadIdx.x == 0) out[(int64_t)n * p.channels + first + i] = made;
  }
}

constexpr int kFinishThreads = 128;

// Mean, variance and 1/sqrt(variance + eps) of groups of `members` channels, and of all samples where `batch`. A block
// per group (and sample); `count` elements per sample and channel.
FXFUSE_INLINE void finish_statistics(const Moments* moments, float* mean_out, float* var_out, float* scale_out,
                                     int samples, int channels, int members, bool batch, double count, double eps) {
  const int groups = channels / members, row = blockIdx.x / groups, group = blockIdx.x - row * groups;
  const Moments* from = moments + (int64_t)row * channels + group * members;
  const int all = members * (batch ? samples : 1);
  const double shift = from[0].mean;
  double v[3] = {0, 0, 0};
  for (int i = threadIdx.x; i < all; i += kFinishThreads) {
    const int n = i / members;
    const Moments m = from[(int64_t)n * channels + i - n * members];
    const double d = m.mean - shift;
    v[0] += m.mean, v[1] += d, v[2] += m.squares + count * d * d;
  }
  block_sum<kFinishThreads>(v);
  const double squares = v[2] - count * v[1] * v[1] / all;
  const double mean = v[0] / all, var = (squares < 0 ? 0 : squares) / (count * all);
  const float scale = (float)(1.0 / sqrt(var + eps));
  for (int i = threadIdx.x; i < members; i += kFinishThreads) {
    const int at = row * channels + group * members + i;
    mean_out[at] = (float)mean, var_out[at] = (float)var, scale_out[at] = scale;
  }
}

}  // namespace fxfuse
