// Kernels behind a convolution, bound by memory: a pointwise chain over a tensor, and the first stage of statistics.
#pragma once
#include "combine.cuh"
#include "held_row.cuh"
#include "pointwise.cuh"
#include "statistics.cuh"

namespace fxfuse {

struct Sizes {
  int n, c, d, h, w;
};

template <class In, class Out, class Before>
struct MapArguments {
  const In* in;
  Out* out;
  Sizes size;
  int unused;
  alignas(8) Before before;
};

// Of a reduction, of channels or of rows.
template <class In, class Out, class Before, class After>
struct ReductionArguments {
  const In* in;
  Out* out;
  Sizes size;  // of the input
  int length;  // of a row
  alignas(8) Before before;
  alignas(8) After after;
};

constexpr int kMapThreads = 256;

// Which block this one is: the first ones take what is last in memory, which was written last and may lie in the L2 cache.
FXFUSE_INLINE unsigned block_from_end() { return gridDim.x - 1 - blockIdx.x; }

// The expression for `count` neighbours from a place on. `whole`: they are of the same sample and channel.
template <int count, bool whole, class In, class Out, class Before>
FXFUSE_INLINE void map_neighbours(const Vector<In, count>& v, Vector<Out, count>& r, const Before& before, const Sizes& size,
                                  int n, int c, int d, int h, int w) {
#pragma unroll
  for (int k = 0; k < count; ++k) {
    r.v[k] = from_float<Out>(before(to_float(v.v[k]), n, c, d, h, w));
    if (++w == size.w) {
      w = 0;
      if (++h == size.h) {
        h = 0;
        if (++d == size.d && !whole) {
          d = 0;
          if (++c == size.c) c = 0, ++n;
          if (n == size.n) n = c = 0;  // behind the last one: nothing is stored, but operands are read
        }
      }
    }
  }
}

// Contiguous: `count` neighbours per thread. `whole`: of all threads they are of the same sample and channel.
template <int count, bool whole, class In, class Out, class Before>
FXFUSE_INLINE void map_contiguous(const MapArguments<In, Out, Before>& a) {
  const unsigned plane = (unsigned)a.size.d * a.size.h * a.size.w, elements = plane * a.size.c * a.size.n;
  const unsigned i = (block_from_end() * (unsigned)kMapThreads + threadIdx.x) * count;
  if (i >= elements) return;
  const unsigned row = i / a.size.w, slab = row / a.size.h, channel = slab / a.size.d;
  const int w = i - row * a.size.w, h = row - slab * a.size.h, d = slab - channel * a.size.d;
  const int n = channel / a.size.c, c = channel - n * a.size.c;
  Vector<In, count> v;
  Vector<Out, count> r;
  const bool full = i + count <= elements;
  if (full) {
    v = *(const Vector<In, count>*)(a.in + i);
  } else {
    for (int k = 0; k < count; ++k)
      if (i + k < elements) v.v[k] = a.in[i + k];
  }
  if (whole || i - channel * plane + count <= plane)  // what depends on the channel is read once
    map_neighbours<count, true>(v, r, a.before, a.size, n, c, d, h, w);
  else
    map_neighbours<count, false>(v, r, a.before, a.size, n, c, d, h, w);
  if (full) {
    *(Vector<Out, count>*)(a.out + i) = r;
  } else {
    for (int k = 0; k < count; ++k)
      if (i + k < elements) a.out[i + k] = r.v[k];
  }
}

// Channels are neighbours: a thread has `count` of them at kRows positions of a sample, so that what depends on the
// channel alone is read once. Blocks: of positions, samples, of channels.
constexpr int kRows = 8;
template <int count, class In, class Out, class Before>
FXFUSE_INLINE void map_channels(const MapArguments<In, Out, Before>& a) {
  const int units = a.size.c / count, across = units < kMapThreads ? units : kMapThreads;
  const int unit = threadIdx.x % across + blockIdx.z * across, down = kMapThreads / across;
  const int plane = a.size.d * a.size.h * a.size.w, n = blockIdx.y, c = unit * count;
  if (unit >= units || threadIdx.x >= across * down) return;
  const int first = blockIdx.x * down * kRows + threadIdx.x / across;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const int p = first + k * down;
    if (p >= plane) break;
    const int row = p / a.size.w, w = p - row * a.size.w, d = row / a.size.h, h = row - d * a.size.h;
    const int64_t at = ((int64_t)n * plane + p) * a.size.c + c;
    const Vector<In, count> v = *(const Vector<In, count>*)(a.in + at);
    Vector<Out, count> r;
#pragma unroll
    for (int e = 0; e < count; ++e) r.v[e] = from_float<Out>(a.before(to_float(v.v[e]), n, c + e, d, h, w));
    *(Vector<Out, count>*)(a.out + at) = r;
  }
}

// --- statistics ---------------------------------------------------------------------------------------
constexpr int kMeasured = 32;  // elements per thread

FXFUSE_INLINE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Contiguous: a block per sample, channel and slot of kMeasured * kMapThreads positions.
template <class In>
FXFUSE_INLINE void measure_contiguous(const In* x, const Partials& p, int positions) {
  __shared__ float shared[2][kMapThreads / 32];
  const int slot = blockIdx.x % p.slots, channel = blockIdx.x / p.slots, n = channel / p.channels, c = channel - n * p.channels;
  const int first = slot * kMeasured * kMapThreads, rest = positions - first;
  const int count = rest < kMeasured * kMapThreads ? rest : kMeasured * kMapThreads;
  const In* from = x + (int64_t)channel * positions + first;
  float v[kMeasured], sum = 0.f, squares = 0.f;
#pragma unroll
  for (int k = 0; k < kMeasured; ++k) {
    const int i = k * kMapThreads + threadIdx.x;
    v[k] = i < count ? to_float(from[i]) : 0.f;
  }
#pragma unroll
  for (int k = 0; k < kMeasured; ++k) sum += v[k];
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) shared[0][threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.f;
  for (int k = 0; k < kMapThreads / 32; ++k) sum += shared[0][k];
  const float mean = sum / (float)count;
#pragma unroll
  for (int k = 0; k < kMeasured; ++k)
    if (k * kMapThreads + threadIdx.x < count) squares = fmaf(v[k] - mean, v[k] - mean, squares);
  squares = warp_sum(squares);
  if ((threadIdx.x & 31) == 0) shared[1][threadIdx.x / 32] = squares;
  __syncthreads();
  if (threadIdx.x == 0) {
    squares = 0.f;
    for (int k = 0; k < kMapThreads / 32; ++k) squares += shared[1][k];
    p.parts[((int64_t)n * p.slots + slot) * p.channels + c] = make_float2(mean, squares);
    if (c == 0) p.counts[n * p.slots + slot] = count;
  }
}

// Channels are neighbours: a block per sample, 32 channels and slot of kMeasured * kMapThreads / 32 positions.
template <class In>
FXFUSE_INLINE void measure_channels(const In* x, const Partials& p, int positions) {
  constexpr int warps = kMapThreads / 32, size = kMeasured * warps;
  __shared__ float shared[2][warps][32];
  const int blocks = (p.channels + 31) / 32, block = blockIdx.x % blocks, rest = blockIdx.x / blocks;
  const int slot = rest % p.slots, n = rest / p.slots, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int c = block * 32 + lane, first = slot * size, count = positions - first < size ? positions - first : size;
  const bool there = c < p.channels;
  const In* from = x + ((int64_t)n * positions + first) * p.channels + (there ? c : 0);
  float v[kMeasured], sum = 0.f, squares = 0.f;
#pragma unroll
  for (int k = 0; k < kMeasured; ++k) {
    const int i = k * warps + warp;
    v[k] = i < count ? to_float(from[(int64_t)i * p.channels]) : 0.f;
  }
#pragma unroll
  for (int k = 0; k < kMeasured; ++k) sum += v[k];
  shared[0][warp][lane] = sum;
  __syncthreads();
  sum = 0.f;
  for (int k = 0; k < warps; ++k) sum += shared[0][k][lane];
  const float mean = sum / (float)count;
#pragma unroll
  for (int k = 0; k < kMeasured; ++k)
    if (k * warps + warp < count) squares = fmaf(v[k] - mean, v[k] - mean, squares);
  shared[1][warp][lane] = squares;
  __syncthreads();
  if (warp == 0) {
    squares = 0.f;
    for (int k = 0; k < warps; ++k) squares += shared[1][k][lane];
    if (there) p.parts[((int64_t)n * p.slots + slot) * p.channels + c] = make_float2(mean, squares);
    if (c == 0) p.counts[n * p.slots + slot] = count;
  }
}

}  // namespace fxfuse
