// Mean and variance in three stages, every sum in a fixed order: partial statistics of slots of elements, in float32
// around the slot's own mean; per sample, piece of the slots and channel; of groups of those. The later stages add in
// float64.
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

// Statistics of elements that come one by one, from sums around the first of them.
struct Running {
  double count = 0, sum = 0, shift = 0, shifted = 0, squares = 0;
  FXFUSE_INLINE void add(float v) {
    if (count == 0) shift = v;
    const double d = v - shift;
    count += 1, sum += v, shifted += d, squares += d * d;
  }
};

// Of any number of elements: their mean, and the sum of squares around it. Of none, all is zero.
struct Moments {
  double count, mean, squares;
  FXFUSE_INLINE void merge(const Moments& o) {
    if (o.count == 0) return;
    const double all = count + o.count, d = o.mean - mean;
    mean = (count * mean + o.count * o.mean) / all;  // Inf stays Inf
    squares += o.squares + d * d * (count * o.count / all);
    count = all;
  }
};
// From sums around a shift; `sum` is around zero.
FXFUSE_INLINE Moments moments_of(double count, double sum, double shifted, double squares) {
  if (count == 0) return {0, 0, 0};
  const double around = squares - shifted * shifted / count;
  return {count, sum / count, around < 0 ? 0 : around};
}

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
  static_assert(sizeof(shared) >= threads * sizeof(Moments), "there is room for what each thread has");
  Moments* const all = (Moments*)shared;
  __syncthreads();
  all[threadIdx.x] = moments_of(mine.count, mine.sum, mine.shifted, mine.squares);
  __syncthreads();
  for (int half = threads / 2; half; half /= 2) {
    if (threadIdx.x < half) all[threadIdx.x].merge(all[threadIdx.x + half]);
    __syncthreads();
  }
  const Moments made = all[0];
  __syncthreads();
  return made;
}

constexpr int kMergeThreads = 256, kMerged = 8;  // per kMerged channels of a sample
constexpr int kMergeSlots = 256;                 // that a block reads at once

// Where no elements are looked at instead of their partial statistics.
struct NoElements {
  FXFUSE_INLINE bool wanted(int) { return false; }
  FXFUSE_INLINE Running of(int, int, int, int) const { return {}; }
};

// Merges the partial statistics of a sample's channels into [sample][piece][channel], where a piece is one of `pieces`
// equal runs of slots, none of them empty: a block for each and kMerged channels. Neighbouring threads read the channels
// of a slot, so that a warp reads whole sectors; all that a thread reads is on its way before it waits for some of it.
// Where `elements.wanted(n)`, a sample's statistics are made of its elements: elements.of(n, c, thread, threads) are those
// of a thread.
template <class Elements>
FXFUSE_INLINE void merge_partials(const Partials& p, int pieces, Moments* out, Elements elements) {
  constexpr int lanes = kMergeThreads / kMerged, warps = kMergeThreads / 32, each = kMergeSlots / lanes;
  static_assert(4 * kMerged == 32, "a warp adds up what the warps have found: a thread per number and channel");
  __shared__ double shared[3 * kMergeThreads];
  const int blocks = (p.channels + kMerged - 1) / kMerged, row = blockIdx.x / blocks, n = row / pieces, piece = row - n * pieces;
  const int first = (blockIdx.x - row * blocks) * kMerged, mine = threadIdx.x % kMerged;
  const bool there = first + mine < p.channels;
  const int size = (p.slots + pieces - 1) / pieces, begin = piece * size, end = p.slots < begin + size ? p.slots : begin + size;
  const float2* const parts = p.parts + (int64_t)n * p.slots * p.channels + (there ? first + mine : 0);
  const int* const counts = p.counts + (int64_t)n * p.slots;
  float2 part[each];
  int count[each];
  auto load = [&](int slot) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int at = slot + i * lanes;
      part[i] = at < end ? parts[(int64_t)at * p.channels] : float2{0.f, 0.f};
      count[i] = at < end ? counts[at] : 0;
    }
  };
  const float reference = parts[(int64_t)begin * p.channels].x;
  int slot = begin + threadIdx.x / kMerged;
  load(slot);
  const double shift = reference;  // which waits for it
  double v[4] = {0, 0, 0, 0};      // count, sum, sum less shift, squares
  while (true) {
#pragma unroll
    for (int i = 0; i < each; ++i) {  // an empty slot is all zero
      const double k = count[i], mean = part[i].x, d = mean - shift;
      v[0] += k, v[1] += k * mean, v[2] += k * d, v[3] += part[i].y + k * d * d;
    }
    slot += kMergeSlots;
    if (slot >= end) break;
    load(slot);
  }
  double(*const found)[4][kMerged] = (double(*)[4][kMerged])shared;  // of a warp
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int distance = kMerged; distance < 32; distance *= 2) v[k] += __shfl_xor_sync(~0u, v[k], distance);
    if ((threadIdx.x & 31) < kMerged) found[threadIdx.x / 32][k][mine] = v[k];
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    double sum = 0;
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) sum += found[warp][threadIdx.x / kMerged][mine];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __shfl_sync(~0u, sum, k * kMerged + mine);
    if (threadIdx.x < kMerged && there) out[(int64_t)row * p.channels + first + mine] = moments_of(v[0], v[1], v[2], v[3]);
  }
  if (!elements.wanted(n)) return;
  for (int i = 0; i < kMerged && first + i < p.channels; ++i) {
    const Running some = elements.of(n, first + i, piece * kMergeThreads + threadIdx.x, pieces * kMergeThreads);
    const Moments made = block_moments<kMergeThreads>(some, shared);
    if (threadIdx.x == 0) out[(int64_t)row * p.channels + first + i] = made;
  }
}

constexpr int kFinishThreads = 128;

// Mean, variance and 1/sqrt(variance + eps) of groups of `members` channels, and of all samples where `batch`. A block
// per group (and sample).
FXFUSE_INLINE void finish_statistics(const Moments* moments, float* mean_out, float* var_out, float* scale_out,
                                     int samples, int channels, int members, bool batch, int pieces, double eps) {
  const int groups = channels / members, row = blockIdx.x / groups, group = blockIdx.x - row * groups;
  const Moments* const from = moments + (int64_t)row * pieces * channels + group * members;
  const int all = members * pieces * (batch ? samples : 1);
  const double shift = from[0].mean;
  double v[4] = {0, 0, 0, 0};  // count, sum, sum less shift, squares
  for (int i = threadIdx.x; i < all; i += kFinishThreads) {
    const int at = i / members;
    const Moments m = from[(int64_t)at * channels + i - at * members];
    const double d = m.mean - shift;
    v[0] += m.count, v[1] += m.count * m.mean, v[2] += m.count * d, v[3] += m.squares + m.count * d * d;
  }
  block_sum<kFinishThreads>(v);
  const Moments made = moments_of(v[0], v[1], v[2], v[3]);
  const double var = made.squares / made.count;
  const float scale = (float)(1.0 / sqrt(var + eps));
  for (int i = threadIdx.x; i < members; i += kFinishThreads) {
    const int at = row * channels + group * members + i;
    mean_out[at] = (float)made.mean, var_out[at] = (float)var, scale_out[at] = scale;
  }
}

}  // namespace fxfuse
