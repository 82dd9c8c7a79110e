// Sums of x times weights, one number per sample and output channel, and the pointwise chain behind that. A block has a
// few samples and channels, its threads the products, of which every sum is in a fixed order, in float32.
#pragma once
#include "map.cuh"

namespace fxfuse {

constexpr int kContractThreads = 512, kContractLoads = 4;

// `channels`, `columns`: input and output channels of a group. `width`: sums per sample and channel. `table`: of each
// tap its number among the weights and, 16 bits higher, that of its sum.
template <class Weight, class Out, class After, int taps>
struct ContractArguments {
  const float* sums;
  const Weight* weight;
  Out* out;
  int64_t channel_stride, column_stride, tap_stride;
  int samples, channels, columns, groups, width;
  float factor;
  unsigned table[taps];
  alignas(8) After after;
};

// `rows` samples and `across` output channels of a block.
template <int rows, int across, class Weight, class Out, class After, int taps>
FXFUSE_INLINE void contract_taps(const ContractArguments<Weight, Out, After, taps>& a) {
  constexpr int warps = kContractThreads / 32, made = rows * across;
  __shared__ unsigned table[taps];
  __shared__ float shared[warps][made];
  for (int i = threadIdx.x; i < taps; i += kContractThreads) table[i] = a.table[i];
  __syncthreads();
  const int tiles = (a.columns + across - 1) / across, rest = blockIdx.x / tiles, column = (blockIdx.x - rest * tiles) * across;
  const int group = rest % a.groups, sample = rest / a.groups * rows;
  const int there = a.samples - sample < rows ? a.samples - sample : rows;
  const int of_them = a.columns - column < across ? a.columns - column : across;
  const int64_t plane = (int64_t)a.groups * a.channels * a.width;
  const float* sums = a.sums + sample * plane + (int64_t)group * a.channels * a.width;
  const Weight* weight = a.weight + group * (a.channels * a.channel_stride) + column * a.column_stride;
  float total[rows][across];
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int o = 0; o < across; ++o) total[r][o] = 0.f;
  const int products = a.channels * taps;
  for (int first = threadIdx.x; first < products; first += kContractThreads * kContractLoads) {
    const float* from[kContractLoads];
    float ws[kContractLoads][across];
#pragma unroll
    for (int k = 0; k < kContractLoads; ++k) {  // weights come from further away than sums
      const int i = first + k * kContractThreads, c = i / taps;
      const bool one = i < products;
      const unsigned places = one ? table[i - c * taps] : 0;
      const Weight* w = weight + c * a.channel_stride + (places & 0xffff) * a.tap_stride;
      from[k] = one ? sums + ((int64_t)c * a.width + (places >> 16)) : nullptr;
#pragma unroll
      for (int o = 0; o < across; ++o) ws[k][o] = one && o < of_them ? to_float(w[o * a.column_stride]) : 0.f;
    }
#pragma unroll
    for (int k = 0; k < kContractLoads; ++k) {
      float ss[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) ss[r] = from[k] && r < there ? from[k][r * plane] : 0.f;
#pragma unroll
      for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int o = 0; o < across; ++o) total[r][o] = fmaf(ss[r], ws[k][o], total[r][o]);
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int o = 0; o < across; ++o) {
      const float sum = warp_sum(total[r][o]);
      if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32][r * across + o] = sum;
    }
  __syncthreads();
  const int r = threadIdx.x / across, o = threadIdx.x % across;
  if (r >= there || o >= of_them) return;
  float sum = 0.f;
  for (int k = 0; k < warps; ++k) sum += shared[k][threadIdx.x];
  const int n = sample + r, c = group * a.columns + column + o;
  a.out[(int64_t)n * a.groups * a.columns + c] = from_float<Out>(a.after(sum * a.factor, n, c, 0, 0, 0));
}

}  // namespace fxfuse
